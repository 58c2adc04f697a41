"""Checksums of sharded arrays: exact, and independent of the sharding.

The checksum of an array is two sums, modulo 2**32, of hashes of the bits and index of every element. Sums do not depend on order,
so each device sums its own shards and nothing is gathered. Checksums detect damage, not deliberate changes.

A saved step stores checksums as one of its items. A conversion stores them beside its item folder, in
`checkpoints/converted.checksums.json`: {"path of a parameter": "float32[8,16]+0123456789abcdef"}. Orbax ignores that file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ymplug_jax.core import exits

SUFFIX = ".checksums.json"
SMALL = 4 * 2**20  # bytes; up to this size, hashing on the host is faster than compiling for the shape
BLOCK = 2**16  # elements that the host hashes at a time, chosen to stay in the cache of a core
PLACE = 0x9E3779B1  # odd constants of published integer hashes (2**32 / golden ratio, MurmurHash3)
MIX = (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)


def of(array: jax.Array | np.ndarray) -> str:
    """Return the checksum of an array, e.g. "float32[8,16]+0123456789abcdef". For an array on several hosts, call it on all of them."""
    return of_tree({"": array})[""]


def of_tree(flat: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """Return {path: checksum}. For arrays on several hosts, call it on all of them."""
    sums = {path: total(array) for path, array in flat.items()}
    sums = jax.device_get(sums)  # one wait, after all sums were dispatched
    return {path: text(array.dtype, array.shape, sums[path]) for path, array in flat.items()}


def text(dtype: Any, shape: Sequence[int], sums: Sequence[int] | np.ndarray) -> str:
    """Format a checksum as `of` returns it, from the two sums."""
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]+{int(sums[0]):08x}{int(sums[1]):08x}"


def total(array: jax.Array | np.ndarray) -> Any:
    """Return the two sums of an array, uint32[2]: on the host for small arrays, else on its devices."""
    if isinstance(array, jax.Array):
        near = array.is_fully_addressable or array.is_fully_replicated
        if not near or array.nbytes > SMALL:
            return _on_device(array)
        if array.is_fully_replicated:
            array = array.addressable_data(0)
    return part(np.asarray(array))


def part(array: np.ndarray, start: Sequence[int] = ()) -> np.ndarray:
    """Return the two sums of a block of an array, uint32[2]. Sums of blocks add up to those of the array, modulo 2**32.

    Args:
      array: the block.
      start: index of its first element in the whole array, one number per axis. (): zeros.
    """
    start = tuple(start) or (0,) * array.ndim
    sums = np.zeros(2, np.uint32)
    if array.size > BLOCK:
        # Split along the axis with the largest stride, so that blocks are contiguous in transposed arrays too.
        axis = max((a for a in range(array.ndim) if array.shape[a] > 1), key=lambda a: abs(array.strides[a]))
        before, first, after = start[:axis], start[axis], start[axis + 1 :]
        step = max(1, BLOCK * array.shape[axis] // array.size)
        for i in range(0, array.shape[axis], step):
            block = array[(*(slice(None),) * axis, slice(i, i + step))]
            sums += part(block, (*before, first + i, *after))
        return sums
    with np.errstate(over="ignore"):
        place = np.zeros((1,) * array.ndim, np.uint32)
        for axis, (size, first) in enumerate(zip(array.shape, start, strict=True)):
            index = (np.arange(first, first + size) & 0xFFFFFFFF).astype(np.uint32)
            place = _placed(place, index.reshape(-1, *(1,) * (array.ndim - axis - 1)), np.uint32)
        place ^= _bits(array)
        sums += np.array([x.sum(dtype=np.uint32) for x in _hash(place, np.uint32)], np.uint32)
    return sums


def _bits(array: np.ndarray) -> np.ndarray:
    """View the elements as unsigned integers of the same width, without a copy."""
    width = array.dtype.itemsize
    if width > 4:
        raise TypeError(f"{array.dtype}: checksums support elements of at most 32 bits")
    return array.view(f"uint{8 * width}")


@jax.jit
def _on_device(array: jax.Array) -> jax.Array:
    """Compute the same uint32[2] as `part` of the whole array."""
    return slice_sums(array, 0)


def slice_sums(array: jax.Array, first: jax.Array | int) -> jax.Array:
    """Compute the same uint32[2] as `part` of a block that begins at row `first` of the whole array, on its devices."""
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index = index + jnp.asarray(first, jnp.uint32) if axis == 0 else index
        place = _placed(place, index, jnp.uint32)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in _hash(bits ^ place, jnp.uint32)])


def _placed(place: Any, index: Any, word: Any) -> Any:
    """Extend the hash of the indices along the previous axes by the index along one more axis."""
    place = (place ^ index) * word(PLACE)
    place ^= place >> word(15)
    return place


def _hash(x: Any, word: Any) -> tuple[Any, Any]:
    """Return two 32-bit hashes of `x`, the bits of each element mixed with its index. NumPy arrays are changed in place, for speed.

    The first hash is a bijection of the bits, so a single changed element always changes the first sum.
    """
    x ^= x >> word(16)
    x *= word(MIX[0])
    x ^= x >> word(13)
    x *= word(MIX[1])
    x ^= x >> word(16)
    y = x * word(MIX[2])
    y ^= y >> word(15)
    return x, y


def file_of(folder: epath.Path) -> epath.Path:
    """Return the checksum file of a conversion's item folder, which lies beside it."""
    return folder.with_name(folder.name + SUFFIX)


def write(folder: epath.Path, sums: Mapping[str, str]) -> None:
    """Write the checksums {path: checksum} of an item folder, atomically."""
    file = file_of(folder)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(dict(sorted(sums.items())), indent=0) + "\n", encoding="utf-8")
    partial.replace(file)


def read(folder: epath.Path) -> dict[str, str] | None:
    """Read the checksums beside an item folder; None if the file does not exist, as for conversions of older versions.

    Raises:
      exits.Mistake: the file is damaged.
    """
    file = file_of(folder)
    if not file.exists():
        return None
    try:
        sums = json.loads(file.read_bytes())
    except ValueError:
        sums = None
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise exits.Mistake(
            f"{file}: damaged, not a JSON object of checksums; copy it again together with the checkpoint"
        )
    return sums
