"""Shardings of parameters and batches on the device mesh.

A parameter is sharded in two steps: the `AXES` table of its model maps its path to axis words ("layers embed mlp"), and
`config.mesh.rules` maps axis words to mesh axes. Models are therefore independent of the mesh. Mesh axes: `data` (data parallel,
also across slices), `fsdp` (batch and parameters), `tensor` (heads, MLP width, vocabulary).
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AxisRules = Sequence[tuple[str, str]]
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is sharded over both


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Build the mesh over `devices` (default: all). `data=-1` takes the devices that the other two axes leave.

    Raises:
      ValueError: the product of the axes is not the number of devices, or `data` is not a multiple of the number of slices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if data == -1 and count % (fsdp * tensor) == 0:
        data = count // (fsdp * tensor)
    if data * fsdp * tensor != count:
        raise ValueError(
            f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} is not the number of devices ({count}); change one of them"
        )
    kinds = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices or jax.devices()})
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=kinds, devices=devices)
    if data % slices:
        raise ValueError(
            f"config.mesh: data={data} is not a multiple of the {slices} slices, but only data may span slices; change it"
        )
    inside, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, list(devices or jax.devices()))
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)


def under(prefix: str, axes: AxisRules) -> tuple[tuple[str, str], ...]:
    """The axis words of a module whose parameters stand below `prefix`, such as "vision/"."""
    return tuple((prefix + path, words) for path, words in axes)


def axis_words(path: str, axes: AxisRules) -> tuple[str, ...]:
    """Return the axis words of a parameter path, e.g. ("layers", "embed", "mlp").

    Raises:
      ValueError: not exactly one regex of `axes` matches the whole path.
    """
    found = [words for pattern, words in axes if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(
            f"parameter {path!r} matches {len(found)} rules of the model's AXES; change AXES so that exactly one matches"
        )
    return tuple(found[0].split())


def spec_of(
    path: str, shape: Sequence[int], axes: AxisRules, rules: Mapping[str, str], mesh: jax.sharding.Mesh
) -> PartitionSpec:
    """Return the PartitionSpec of a parameter.

    A dimension whose size is not a multiple of its mesh axis is replicated, as is the second dimension of the same mesh axis.

    Raises:
      ValueError: AXES names another number of dimensions than the parameter has.
    """
    words = axis_words(path, axes)
    if len(words) != len(shape):
        raise ValueError(
            f"parameter {path!r} has shape {tuple(shape)}, but AXES names {len(words)} axes ({' '.join(words)}); change AXES"
        )
    used: set[str] = set()
    entries: list[str | None] = []
    for word, size in zip(words, shape, strict=True):
        axis = rules.get(word)
        fits = axis is not None and axis not in used and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
        if axis is not None and fits:
            used.add(axis)
        entries.append(axis if fits else None)
    return PartitionSpec(*entries)


def param_shardings(params: Mapping, axes: AxisRules, rules: Mapping[str, str], mesh: jax.sharding.Mesh) -> dict:
    """Return the tree of NamedSharding for a nested, possibly abstract, parameter tree.

    Raises:
      ValueError: a rule names an unknown mesh axis.
    """
    if unknown := [axis for axis in rules.values() if axis not in MESH_AXES]:
        raise ValueError(f"config.mesh.rules: unknown mesh axis {unknown[0]!r}; choose one of {', '.join(MESH_AXES)}")
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {k: NamedSharding(mesh, spec_of(k, v.shape, axes, rules, mesh)) for k, v in flat.items()}, sep="/"
    )


def uncut(params: Mapping, axes: AxisRules, rules: Mapping[str, str], mesh: jax.sharding.Mesh) -> list[str]:
    """Describe dimensions that are replicated although a rule shards them: one line per dimension, size and mesh axis.

    Args:
      params: nested, possibly abstract, parameter tree.
      axes: the model's table of axis words.
      rules: axis word -> mesh axis.
      mesh: mesh of the run.
    """
    found: dict[tuple[str, int, str], list[str]] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        for word, size in zip(axis_words(path, axes), leaf.shape, strict=True):
            axis = rules.get(word)
            if axis is not None and size % mesh.shape[axis]:
                found.setdefault((word, size, axis), []).append(path)
    lines = []
    for (word, size, axis), paths in found.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(
            f"{paths[0]}{more}: dimension {word} of {size} is not a multiple of mesh axis {axis}={mesh.shape[axis]}; it is "
            "replicated on every device of the axis"
        )
    return lines


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_all_hosts(make: Callable[[], Any], place: jax.sharding.Sharding) -> Any:
    """Compute `make()` with sharding `place`, which may span hosts. Called on all hosts, as device_put reaches only local devices."""
    return jax.jit(make, out_shardings=place)()


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of a batch: leading axis over data and fsdp, other axes replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Return the rows of the global batch on this host's devices, ascending, int64[b]. Hosts along `tensor` share rows.

    Raises:
      ValueError: the batch size is not a multiple of the mesh axes data x fsdp.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"batch size {batch_size} is not a multiple of {parts} (mesh data x fsdp); choose a multiple of {parts}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places]))


def put_batch(
    batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Assemble global arrays [batch_size, ...] from this host's rows (NumPy [b, ...], in the order of `rows`)."""
    sharding = batch_sharding(mesh)

    def put(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index[0] if index else slice(None)).indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {key: put(value) for key, value in batch.items()}


@contextlib.contextmanager
def computing(mesh: jax.sharding.Mesh, rules: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Trace programs in the block for `mesh`; `axis_of` and `by_device` use the run's mesh rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules)):
        yield


def axis_of(word: str) -> str | None:
    """Return the mesh axis of an axis word inside `computing`; None outside of it, or if no rule names the word."""
    axis = dict(nn.get_logical_axis_rules()).get(word)
    return axis if isinstance(axis, str) else None  # Flax also allows several axes per rule; `computing` sets one


def device_kind() -> str:
    """Return the device kind of the current mesh, e.g. "TPU v5e"; without a mesh, of JAX's first device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.devices()[0].device_kind
    return mesh.abstract_device.device_kind if mesh.abstract_device is not None else ""


def computes_on(maker: str) -> bool:
    """Return whether the devices of the current mesh are of that kind ("tpu", "nvidia"); without a mesh, JAX's only device.

    False for several devices without a mesh, since custom kernels need explicit shardings.
    """
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return False
    return maker in device_kind().lower()


def computes_on_first(maker: str) -> bool:
    """Return whether this process's first device is of that kind, regardless of the mesh."""
    return maker in jax.local_devices()[0].device_kind.lower()


def by_device(run: Callable[..., jax.Array], *arrays: jax.Array, axes: Sequence[tuple[str | None, ...]]) -> jax.Array:
    """Apply `run` to each device's shard of `arrays`, for custom kernels, which XLA cannot partition.

    Args:
      run: arrays -> array of the shape of the first one. Must be correct for any shard.
      *arrays: global arrays.
      axes: for each array, the axis word of each dimension; "batch" means (data, fsdp), None means replicated. An axis word is
        replicated if one of its dimensions is not a multiple of the mesh axis.

    Returns:
      The global result, sharded like the first array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*arrays)
    sizes: dict[str, list[int]] = {}
    for x, words in zip(arrays, axes, strict=True):
        for size, word in zip(x.shape, words, strict=True):
            if word is not None:
                sizes.setdefault(word, []).append(size)
    cut = {word: _axes_of(word) for word, found in sizes.items() if all(size % parts(word) == 0 for size in found)}
    specs = tuple(PartitionSpec(*(cut.get(word) or None if word else None for word in words)) for words in axes)
    return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _axes_of(word: str) -> tuple[str, ...]:
    if word == "batch":
        return BATCH_AXES
    axis = axis_of(word)
    return () if axis is None else (axis,)


def parts(word: str) -> int:
    """Return the number of shards of a dimension with an axis word such as "heads", or of "batch"; without a mesh, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in _axes_of(word))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrain the sharding of an activation, e.g. `constrain(x, "batch", None, None)`; "batch" means (data, fsdp). No effect without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec: list[Any] = [BATCH_AXES if axis == "batch" else axis for axis in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
