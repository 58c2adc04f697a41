"""Parameters of a run or of a conversion, loaded for another run: a subtree, under another name, resized or in eight bits."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from etils import epath

from ymplug_jax.core import quantize, quantized_read
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.checkpoint_files import (
    CheckpointError,
    damaged,
    fits,
    latest_step,
    places,
    say_unverified,
    step_folder,
    sums_in,
    whole,
)
from ymplug_jax.core.verified_read import Damaged, stored_in


def load_params(
    workdir: str,
    abstract: Mapping[str, Any],
    *,
    subtree: str = "",
    stored_as: str | None = None,
    allow_missing: Sequence[str] = (),
    resize: Mapping[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = MappingProxyType({}),
    values: bool = True,
) -> dict[str, jax.Array]:
    """Load parameters of a run or a converted checkpoint.

    Args:
      workdir: folder of a run (its newest step is loaded) or of a conversion.
      abstract: nested tree of ShapeDtypeStructs with shardings: the parameters to load. Leaves of `quantize.abstract` are
        quantised while they are read, see `quantized_read`.
      subtree: load only the paths below this name, e.g. "llm". All of them must be in the checkpoint.
      stored_as: name of that subtree in the checkpoint. None: the same name; "": the whole checkpoint.
      allow_missing: path regexes of parameters that the checkpoint may lack. Missing ones are left out of the result.
      resize: path -> function (stored value, wanted shape), for tables that may be stored in another size.
      values: False: compare names and shapes only, and return an empty dict.

    Returns:
      {path: array}, with the dtypes and shardings of `abstract`. Leaves without a sharding are NumPy arrays.

    Raises:
      CheckpointError: the folder holds no checkpoint, or a wanted parameter is missing or has another shape.
    """
    folder = whole(workdir)
    wanted = {
        path: leaf
        for path, leaf in state_lib.flatten(abstract).items()
        if not subtree or path.startswith(subtree + "/")
    }
    if not wanted:
        tops = sorted({path.split("/")[0] for path in state_lib.flatten(abstract)})
        raise CheckpointError(f"config.train.init_from: unknown subtree {subtree!r}; choose one of {', '.join(tops)}")
    if not places(workdir):
        raise CheckpointError(
            f"{workdir}: no checkpoint here (looked in {folder / 'checkpoints'}); give the --workdir of a run or the --out of a conversion"
        )
    names = (subtree, subtree if stored_as is None else stored_as)

    def load(step: int | None) -> dict[str, jax.Array]:
        return _load(folder, step, wanted, names, allow_missing, resize, values)

    step = latest_step(workdir)
    try:
        return load(step)
    except Damaged as error:
        raise damaged(folder, step, error, load) from None


def _resized(stored: Any, wanted: jax.ShapeDtypeStruct) -> bool:
    """Whether a stored table has another size than the wanted one. With another number of axes it is another parameter."""
    return tuple(stored.shape) != wanted.shape and len(stored.shape) == len(wanted.shape)


def _load(
    workdir: epath.Path,
    step: int | None,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    names: tuple[str, str],
    allow_missing: Sequence[str],
    resize: Mapping[str, Callable],
    values: bool,
) -> dict[str, jax.Array]:
    """`load_params` for one step. `names`: name of the subtree in the model, and in the checkpoint."""
    folder, found = workdir / "checkpoints", places(str(workdir), step)
    here_name, there_name = (f"{name}/" if name else "" for name in names)

    def in_model(path: str) -> str:
        return here_name + path.removeprefix(there_name)

    def in_checkpoint(path: str) -> str:
        return there_name + path.removeprefix(here_name)

    stored = {
        place: {in_model(path): leaf for path, leaf in stored_in(place).items() if path.startswith(there_name)}
        for place in found
    }
    there = {path: leaf for leaves in stored.values() for path, leaf in leaves.items()}
    if names[0] and not there.keys() & wanted.keys():
        raise CheckpointError(
            f"{folder}: no parameter below {there_name!r} fits the subtree {names[0]!r}; correct config.train.init_from"
        )
    wanted = {
        path: leaf
        for path, leaf in wanted.items()
        if path in there or not any(re.fullmatch(pattern, path) for pattern in allow_missing)
    }
    other = {path for path in wanted if path in resize and path in there and _resized(there[path], wanted[path])}
    fits(there, {path: leaf for path, leaf in wanted.items() if path not in other}, folder, extra_allowed=True)
    if not values:
        return {}

    def as_stored(path: str) -> jax.ShapeDtypeStruct:
        if path not in other:
            return wanted[path]
        return jax.ShapeDtypeStruct(tuple(there[path].shape), "float32", sharding=wanted[path].sharding)

    loaded: dict[str, jax.Array] = {}
    eight = any(isinstance(leaf, quantize.Quantized) for leaf in wanted.values())
    for place in found:
        here = {in_checkpoint(path): as_stored(path) for path in wanted if path in stored[place]}
        if not here:
            continue
        if (sums := sums_in(place, step_folder(workdir, step))) is None:
            say_unverified(place)
        dtypes = {in_checkpoint(path): leaf.dtype for path, leaf in stored[place].items()}
        whole_only = {in_checkpoint(path) for path in other} if eight else set(here)
        read = quantized_read.leaves(place, here, sums, dtypes, whole_only)
        loaded |= {in_model(path): leaf for path, leaf in read.items()}
    for path in other:
        leaf = wanted[path]
        make = jax.jit(lambda x, p=path, w=leaf: resize[p](x, w.shape).astype(w.dtype), out_shardings=leaf.sharding)
        loaded[path] = make(loaded[path])
    return loaded
