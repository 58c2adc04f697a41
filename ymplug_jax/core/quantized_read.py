"""Reads a checkpoint in slices and quantises its stacked matrices on the way to the devices.

A whole matrix in its stored dtype never exists on a device: a slice of some layers is read, verified, quantised and written into
the int8 array, which is updated in place. Leaves that stay unquantised pass in slices as well. So the peak is the size of the
result and a few slices. See docs/models/language_models.md, "Frozen matrices in eight bits".
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import NamedSharding

from ymplug_jax.core import leaf_checksums, leaf_store, quantize, verified_read
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.quantize import Quantized
from ymplug_jax.core.verified_read import Damaged, call

SLICE = 16 * 2**20  # bytes of a slice in float32, its widest form
Leaf = jax.Array | Quantized
Stored = tensorstore.TensorStore | np.ndarray


def read(place: epath.Path, wanted: Mapping[str, Leaf], sums: Mapping[str, str] | None) -> dict[str, Leaf]:
    """Read leaves of an item folder; every leaf is verified.

    Args:
      place: the folder.
      wanted: path -> abstract leaf with shardings, quantised or not.
      sums: checksum by path. None: do not verify, for checkpoints of older versions.

    Returns:
      {path: leaf}, equal to the leaves read whole, cast to `quantize.STORED` and passed to `quantize.hold`.

    Raises:
      Damaged: a leaf cannot be read, or differs from what was saved.
      PlaceFailed: the folder cannot be reached.
    """
    found: dict[str, Leaf] = {}
    # Leaves that stay as they are come first: a large one needs most memory beside itself.
    for path in sorted(wanted, key=lambda path: (isinstance(wanted[path], Quantized), path)):
        found[path] = call(partial(_read, place, path, wanted[path], (sums or {}).get(path)), place, path)
        if sums is not None and path not in sums:
            raise Damaged(path, "no checksum stored in its checkpoint")
        _give_back()
    return found


def _give_back() -> None:
    """Return freed memory to the system. glibc keeps freed blocks of this size, which are a tenth of a model when they pile up."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def from_host(value: np.ndarray, leaf: Quantized) -> Quantized:
    """Quantise a matrix that is in the host's memory; `leaf` is the abstract result. On several hosts all hold the whole matrix."""
    made, _ = _passed(value, leaf)
    return made


def leaves(
    place: epath.Path,
    wanted: dict[str, Any],
    sums: Mapping[str, str] | None,
    dtypes: Mapping[str, Any],
    unsliced: set[str],
) -> dict[str, Any]:
    """Read leaves of one item folder: into the host's memory if they have no sharding, whole if they are `unsliced`, else in slices.

    Args:
      place: the folder.
      wanted: path -> abstract leaf.
      sums: checksum by path. None: do not verify.
      dtypes: stored dtype by path.
      unsliced: paths that `verified_read` reads.
    """
    host = {path: leaf for path, leaf in wanted.items() if leaf.sharding is None}
    rest = {path: leaf for path, leaf in wanted.items() if path not in host}
    entire = {path: leaf for path, leaf in rest.items() if path in unsliced}
    found: dict[str, Any] = {p: to_host(place, p, leaf, (sums or {}).get(p)) for p, leaf in host.items()}
    found |= read(place, {p: leaf for p, leaf in rest.items() if p not in entire}, sums)
    if entire:
        found |= state_lib.flatten(verified_read.read(place, state_lib.unflatten(entire), sums, dtypes))
    return found


def to_host(place: epath.Path, path: str, leaf: jax.ShapeDtypeStruct, expected: str | None) -> np.ndarray:
    """Read a leaf into the host's memory, verified against its checksum (None: not) and cast to the dtype of `leaf`.

    Raises:
      Damaged: the leaf cannot be read, or differs from what was saved.
      PlaceFailed: the folder cannot be reached.
    """
    value = call(lambda: np.asarray(leaf_store.open_leaf(place, path).read().result()), place, path)
    _compare(path, leaf_checksums.of(value), expected)
    return value.astype(leaf.dtype, copy=False)


def _read(place: epath.Path, path: str, leaf: Leaf, expected: str | None) -> Leaf:
    stored = leaf_store.open_leaf(place, path)
    made, total = _passed(stored, leaf)
    _compare(path, leaf_checksums.text(stored.dtype.numpy_dtype, stored.shape, total), expected)
    return made


def _compare(path: str, seen: str, expected: str | None) -> None:
    if expected is not None and seen != expected:
        raise Damaged(path, f"differs from what was saved (checksum {seen}, saved {expected})")


def _passed(stored: Stored, leaf: Any) -> tuple[Any, np.ndarray]:
    """(leaf on the devices, checksum terms of what was stored)."""
    parts, form = jax.tree.flatten(leaf)
    over = quantize.summed_in(leaf) if isinstance(leaf, Quantized) else ()
    places = tuple(part.sharding for part in parts)
    arrays = _empty(parts, places)
    total = np.zeros(2, np.uint32)
    for first, value in _slices(stored, leaf, _rows(leaf)):
        # Wait for each program, so that neither slices nor the programs' temporaries pile up.
        total += np.asarray(_sums(value, jnp.uint32(first)))
        arrays = jax.block_until_ready(_put(over, places)(arrays, value, jnp.int32(first)))
        del value  # on a CPU it is a view of the block, which ends before the next one is read
    return jax.tree.unflatten(form, arrays), total


_sums = jax.jit(leaf_checksums.slice_sums)


def _rows(leaf: Leaf) -> int:
    """Rows of the first axis in a slice: a divisor of their number, and all of them if that axis is sharded."""
    place, shape = leaf.sharding, leaf.shape
    if not shape or (isinstance(place, NamedSharding) and place.spec and place.spec[0] is not None):
        return shape[0] if shape else 0
    most = max(1, SLICE * shape[0] // max(4 * int(np.prod(shape)), 1))
    return next(rows for rows in range(min(most, shape[0]), 0, -1) if shape[0] % rows == 0)


def _slices(stored: Stored, leaf: Leaf, rows: int) -> Iterator[tuple[int, jax.Array]]:
    """(first row, slice on the devices in the stored dtype); the next block is read meanwhile. A scalar is one slice."""
    if not leaf.shape:
        yield 0, jax.device_put(np.asarray(_begun(stored, ())()), leaf.sharding)
        return
    place = leaf.sharding
    where = place.addressable_devices_indices_map((rows, *leaf.shape[1:]))
    indices = {device: tuple(index or ()) for device, index in where.items()}  # one slice for each axis
    columns = {_key(index[1:]): index[1:] for index in indices.values()}
    # A chunk on the disk is decoded whole, so it is read once and cut into slices.
    layout = stored.chunk_layout.read_chunk.shape if isinstance(stored, tensorstore.TensorStore) else None
    chunk = (layout[0] or rows) if layout else rows
    many = max(chunk, rows)

    def begun(first: int) -> dict[Any, Callable[[], np.ndarray]]:
        wanted = slice(first, min(first + many, leaf.shape[0]))
        return {key: _begun(stored, (wanted, *rest)) for key, rest in columns.items()}

    ahead = begun(0)
    for block in range(0, leaf.shape[0], many):
        values = {key: done() for key, done in ahead.items()}
        following = block + many
        ahead = begun(following) if many == rows and following < leaf.shape[0] else {}
        height = min(many, leaf.shape[0] - block)
        for first in range(0, height, rows):
            shape = (min(rows, height - first), *leaf.shape[1:])
            arrays = [
                jax.device_put(values[_key(rest)][first + (part.start or 0) : first + (part.stop or rows)], device)
                for device, (part, *rest) in indices.items()
            ]
            yield block + first, jax.make_array_from_single_device_arrays(shape, place, arrays)
            del arrays
        del values
        _give_back()
        if not ahead and following < leaf.shape[0]:
            ahead = begun(following)


def _key(index: Sequence[slice]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)


def _begun(stored: Stored, index: tuple[slice, ...]) -> Callable[[], np.ndarray]:
    """Begin to read a block; call the result to wait for it."""
    return stored[index].read().result if isinstance(stored, tensorstore.TensorStore) else lambda: stored[index]


def _empty(parts: list[Any], places: tuple[jax.sharding.Sharding, ...]) -> list[jax.Array]:
    """Zeros in the form of abstract arrays, created where they stay."""
    return jax.jit(lambda: [jnp.zeros(part.shape, part.dtype) for part in parts], out_shardings=list(places))()


@functools.lru_cache
def _put(over: tuple[int, ...], places: tuple[jax.sharding.Sharding, ...]) -> Callable[..., list[jax.Array]]:
    """Compiled function (arrays of a leaf so far, slice, first row) -> arrays with the slice.

    Args:
      over: contracted axes of a quantised leaf; (): the leaf is one array.
      places: shardings of the arrays.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=list(places))
    def put(arrays: list[jax.Array], value: jax.Array, first: jax.Array) -> list[jax.Array]:
        if over:
            made: list[jax.Array] = jax.tree.leaves(quantize.quantized(quantize.bfloat16_values(value), over))
        else:
            made = [value.astype(arrays[0].dtype)]
        new = []
        for array, part in zip(arrays, made, strict=True):
            start: list[jax.Array | int] = [first, *[0] * (part.ndim - 1)]
            new.append(jax.lax.dynamic_update_slice(array, part, start[: part.ndim]))
        return new

    return put
