"""From a parameter's path to its place on the device mesh, in two steps.

A model's `AXES` table turns a path into axis words ("layers embed mlp"); the config's mesh rules turn a word into a mesh
axis. Models therefore know no mesh, and the mesh changes in one place. Mesh axes: `data` (replicas, also across slices),
`fsdp` (batch and parameters), `tensor` (heads, mlp width, vocabulary).
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
BATCH_AXES = ("data", "fsdp")  # the batch is cut along both


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Mesh over all devices (or those given); `data=-1` takes what the other two axes leave.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if data == -1 and count % (fsdp * tensor) == 0:
        data = count // (fsdp * tensor)
    if data * fsdp * tensor != count:
        raise ValueError(
            f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not make {count} devices; change config.mesh"
        )
    kinds = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices or jax.devices()})
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=kinds, devices=devices)
    if data % slices:
        raise ValueError(
            f"mesh: data={data} is no multiple of the {slices} slices; only data runs over the network between them"
        )
    inside, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, list(devices or jax.devices()))
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)


def axis_words(path: str, axes: AxisRules) -> tuple[str, ...]:
    """Axis words of the one rule whose regex matches the whole path, e.g. ("layers", "embed", "mlp").

    Raises:
      ValueError: no rule, or more than one, matches: there is no catch-all.
    """
    found = [words for pattern, words in axes if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(
            f"parameter {path!r} matches {len(found)} rules of the model's AXES; it must match exactly one"
        )
    return tuple(found[0].split())


def spec_of(
    path: str, shape: Sequence[int], axes: AxisRules, rules: Mapping[str, str], mesh: jax.sharding.Mesh
) -> PartitionSpec:
    """PartitionSpec of one parameter. A dimension that the mesh axis does not divide stays whole; an axis is used once."""
    words = axis_words(path, axes)
    if len(words) != len(shape):
        raise ValueError(
            f"parameter {path!r} has shape {tuple(shape)} but AXES names {len(words)} axes: {' '.join(words)}"
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
    """Tree of NamedSharding for a (nested, possibly abstract) parameter tree.

    Raises:
      ValueError: a rule for a mesh axis that there is not.
    """
    if unknown := [axis for axis in rules.values() if axis not in MESH_AXES]:
        raise ValueError(f"config.mesh.rules: no mesh axis {unknown[0]!r}; there are {', '.join(MESH_AXES)}")
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {k: NamedSharding(mesh, spec_of(k, v.shape, axes, rules, mesh)) for k, v in flat.items()}, sep="/"
    )


def uncut(params: Mapping, axes: AxisRules, rules: Mapping[str, str], mesh: jax.sharding.Mesh) -> list[str]:
    """What stays whole although the rules name a mesh axis for it, one line for each dimension, size and axis.

    Args:
      params: (nested, possibly abstract) parameter tree.
      axes: the model's table.
      rules: axis word -> mesh axis.
      mesh: of the run.
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
            f"{paths[0]}{more}: dimension {word} of {size} is no multiple of mesh axis {axis}={mesh.shape[axis]}; it stays "
            "whole on every device of the axis"
        )
    return lines


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_all_hosts(make: Callable[[], Any], place: jax.sharding.Sharding) -> Any:
    """What `make` computes, placed on devices of all hosts: every host runs it (device_put reaches only its own devices)."""
    return jax.jit(make, out_shardings=place)()


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Leading axis cut over data and fsdp; further axes whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Rows of the global batch that this host's devices hold, ascending: int64[b]. Hosts along `tensor` hold the same rows.

    Raises:
      ValueError: the batch cannot be cut evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"batch size {batch_size} cannot be cut into {parts} equal parts (mesh data x fsdp); choose a multiple of {parts}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places]))


def put_batch(
    batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """One global array a key out of this host's rows ([b, ...] numpy, in the order of `rows`)."""
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
    """Inside, programs are traced for `mesh`, and `axis_of` and `by_device` follow the run's mesh rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules)):
        yield


def axis_of(word: str) -> str | None:
    """Mesh axis of an axis word by the rules of `computing`; None outside of it, or where the rules do not name the word."""
    axis = dict(nn.get_logical_axis_rules()).get(word)
    return axis if isinstance(axis, str) else None  # flax also knows rules with several axes; `computing` sets none


def device_kind() -> str:
    """Kind of the devices of the current mesh ("TPU v5e"); without a mesh, of JAX's first device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.devices()[0].device_kind
    return mesh.abstract_device.device_kind if mesh.abstract_device is not None else ""


def computes_on(maker: str) -> bool:
    """Whether the devices of the current mesh are of that kind ("tpu", "nvidia"); with no mesh, whether JAX's only device is.

    A program for several devices without a mesh gets False: custom kernels need explicit shardings.
    """
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return False
    return maker in device_kind().lower()


def computes_on_first(maker: str) -> bool:
    """Whether this process's first device is of that kind, whatever the mesh."""
    return maker in jax.local_devices()[0].device_kind.lower()


def by_device(run: Callable[..., jax.Array], *arrays: jax.Array, axes: Sequence[tuple[str | None, ...]]) -> jax.Array:
    """`run` on every device's part of `arrays`: for kernels, which XLA cannot cut.

    Args:
      run: arrays -> an array of the first one's shape, the same for any part.
      *arrays: whole, of any shapes.
      axes: for each array the axis word of each dimension, "batch" for (data, fsdp), None for a whole one. A word stays whole
        where one of the dimensions that bear it is not a multiple of its mesh axis.

    Returns:
      The result, cut as the first array is.
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
    """Into how many parts the mesh cuts dimensions of an axis word ("heads"), or "batch"; without a mesh, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _axes_of(word))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Pin an activation to mesh axes, e.g. `constrain(x, "batch", None, None)`; "batch" means (data, fsdp). No mesh: no effect."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec: list[Any] = [BATCH_AXES if axis == "batch" else axis for axis in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
