"""Orbax checkpoints of a run: the frozen parameters once, the rest every so many steps; strict on names and shapes.

Layout under the run's folder:
    checkpoints/frozen/                    frozen parameters, written once
    checkpoints/steps/<n>/trainable/       float32 parameters after n steps
    checkpoints/steps/<n>/opt_state/       optimizer state
    checkpoints/steps/<n>/progress/        {"step": n, "examples_seen": ...}
A step appears under its name only when it is whole (Orbax renames a temporary folder); what a kill leaves behind is
ignored and removed at the next start. Restoring always goes into an abstract tree that carries shapes, dtypes and
shardings, so any mesh and any number of hosts can read what another wrote.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ymplug_jax import sharding
from ymplug_jax import state as state_lib

FROZEN = "frozen"
STEPS = "steps"
CONVERTED = "converted"  # parameters of another program's checkpoint, in a folder of their own


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit; the message names the folder, the parameter and the fix."""


class Checkpoints:
    """Saves and restores one run. Saving is asynchronous; `close` waits for the last save."""

    def __init__(self, workdir: str, *, keep: int = 3):
        self.folder = _whole(workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder / STEPS, options=options)
        self._frozen = ocp.StandardCheckpointer()

    def latest_step(self) -> int | None:
        """Newest whole step, or None for a fresh run."""
        return self._manager.latest_step()

    def save_frozen(self, frozen: state_lib.Params) -> None:
        """Write the frozen tree unless this run has it already."""
        if state_lib.flatten(frozen) and not (self.folder / FROZEN).exists():
            self._frozen.save(self.folder / FROZEN, frozen)

    def save(self, state: state_lib.TrainState, step: int, examples_seen: int) -> None:
        """Start saving the state after `step` steps (a step that is there already is left alone)."""
        if step in self._manager.all_steps():
            return
        self._frozen.wait_until_finished()  # a step without its frozen half would be no checkpoint
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                opt_state=ocp.args.StandardSave(_wrapped(state.opt_state)),
                progress=ocp.args.JsonSave({"step": step, "examples_seen": examples_seen}),
            ),
        )

    def restore(self, abstract: state_lib.TrainState, step: int) -> tuple[state_lib.TrainState, int]:
        """(state, examples_seen) of a step, placed as `abstract` says.

        Raises:
          CheckpointError: parameter names or shapes differ from `abstract`.
        """
        folder = self.folder / STEPS / str(step) / "trainable"
        _check(stored_in(folder), state_lib.flatten(abstract.trainable), folder)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(abstract.trainable),
                opt_state=ocp.args.StandardRestore(_wrapped(abstract.opt_state)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        place = abstract.step.sharding
        state = state_lib.TrainState(
            step=sharding.on_all_hosts(lambda: jax.numpy.int32(restored.progress["step"]), place),
            trainable=restored.trainable,
            opt_state=restored.opt_state["state"],
        )
        return state, restored.progress["examples_seen"]

    def wait(self) -> None:
        """Until every save that was started is whole on disk."""
        self._frozen.wait_until_finished()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and let go of the threads."""
        self.wait()
        self._manager.close()
        self._frozen.close()


def folder_of(name: str) -> epath.Path:
    """The folder that a flag or a setting names: local, local as file:///..., or gs://bucket/... (which pathlib would break)."""
    return epath.Path(str(name).removeprefix("file://")).expanduser()


def _whole(name: str) -> epath.Path:
    """The same from the root; epath's own `absolute` takes gs:// for a local name."""
    folder = folder_of(name)
    return folder if "://" in str(folder) else folder.absolute()


def _wrapped(opt_state: Any) -> dict:
    return {"state": opt_state}


def sources(init_from: str) -> list[tuple[str, str, str]]:
    """[(subtree, its name in the folder, folder)] of the setting `init_from`: "DIR" is every parameter (subtree ""),
    "llm=DIR,vision=DIR" are some, "prompter:=DIR" is all that the folder has, put below that name, and
    "vision/blocks/temporal_attn:vision/blocks/attn=DIR" is a part under another name.

    Raises:
      CheckpointError: a part that cannot be read so.
    """
    parts = [part.strip() for part in init_from.split(",") if part.strip()]
    pairs = []
    for part in parts:
        names, _, folder = part.partition("=") if "=" in part else ("", "", part)
        subtree, other, stored_as = names.partition(":")
        pairs.append((subtree, stored_as if other else subtree, folder))
    if len(pairs) > 1 and any(not subtree for subtree, _, _ in pairs):
        raise CheckpointError(
            f'config.train.init_from is {init_from!r}; write one "DIR", or "llm=DIR,vision=DIR" with a name for each'
        )
    return pairs


def latest_step(workdir: str) -> int | None:
    """Newest whole step of a run, or None."""
    folder = _whole(workdir) / "checkpoints" / STEPS
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return max(steps, default=None)


def places(workdir: str) -> list[epath.Path]:
    """Item folders that together hold all parameters of the newest checkpoint."""
    folder = _whole(workdir) / "checkpoints"
    step = latest_step(workdir)
    possible = [folder / CONVERTED, folder / FROZEN, folder / STEPS / str(step) / "trainable"]
    return [place for place in possible if place.exists()]


def fingerprint(workdir: str) -> str:
    """SHA-256 of the weights of a run's newest checkpoint or of a converted one, as 64 hex digits: the names, sizes and bytes
    of their files. A copied or moved folder has the same one. Of a file above 64 MiB the first and last 32 MiB are read.

    Raises:
      CheckpointError: no checkpoint there.
    """
    if not (found := places(workdir)):
        raise CheckpointError(f"{workdir}: no checkpoint here; give the folder of a run or of a conversion")
    half = 32 * 2**20
    digest = hashlib.sha256()
    for place in found:
        for name, path in sorted(_files_below(place, "")):
            size = path.stat().length
            digest.update(f"{place.name}/{name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(half))
                if size > half:
                    file.seek(max(half, size - half))
                    digest.update(file.read(half))
    return digest.hexdigest()


def _files_below(folder: epath.Path, prefix: str) -> Iterable[tuple[str, epath.Path]]:
    """(path below the first folder, file); epath refuses `**`."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_below(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name, path


def stored_params(workdir: str) -> dict[str, Any]:
    """Path -> metadata (shape, dtype) of every parameter of a run's newest checkpoint or a converted one.

    Raises:
      CheckpointError: no checkpoint there.
    """
    if not (found := places(workdir)):
        raise CheckpointError(f"{workdir}: no checkpoint here; give the folder of a run or of a conversion")
    return {path: leaf for place in found for path, leaf in stored_in(place).items()}


def load_params(
    workdir: str,
    abstract: Mapping,
    *,
    subtree: str = "",
    stored_as: str | None = None,
    allow_missing: Sequence[str] = (),
    resize: Mapping[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Parameters of a run or a converted checkpoint, flat by path, placed and cast as `abstract` says.

    Args:
      workdir: the run's folder (the newest step is taken).
      abstract: nested tree of ShapeDtypeStructs with shardings: the parameters wanted.
      subtree: take only the paths under this name ("llm"); every one of them must be in the checkpoint.
      stored_as: the name of that subtree in the checkpoint where it is another, "" for all that is there.
      allow_missing: path regexes that the checkpoint may lack; they are then not in the result.
      resize: path -> function (stored value, wanted shape) for tables that may be stored in another size.

    Raises:
      CheckpointError: no checkpoint there, or a wanted parameter is missing or has another shape.
    """
    folder = _whole(workdir) / "checkpoints"
    wanted = {
        path: leaf
        for path, leaf in state_lib.flatten(abstract).items()
        if not subtree or path.startswith(subtree + "/")
    }
    if not wanted:
        tops = sorted({path.split("/")[0] for path in state_lib.flatten(abstract)})
        raise CheckpointError(
            f"config.train.init_from: the model has no subtree {subtree!r}; there are {', '.join(tops)}"
        )
    found = places(workdir)
    if not found:
        raise CheckpointError(
            f"{workdir}: no checkpoint here (looked for {folder}); give the --workdir of a finished run"
        )
    here_name, there_name = (
        f"{name}/" if name else "" for name in (subtree, subtree if stored_as is None else stored_as)
    )

    def in_model(path: str) -> str:
        return here_name + path.removeprefix(there_name)

    def in_checkpoint(path: str) -> str:
        return there_name + path.removeprefix(here_name)

    stored = {
        place: {in_model(path): leaf for path, leaf in stored_in(place).items() if path.startswith(there_name)}
        for place in found
    }
    there = {path: leaf for leaves in stored.values() for path, leaf in leaves.items()}
    if subtree and not there.keys() & wanted.keys():
        raise CheckpointError(f"{folder} has nothing under {there_name!r} that {subtree!r} could take")
    wanted = {
        path: leaf
        for path, leaf in wanted.items()
        if path in there or not any(re.fullmatch(pattern, path) for pattern in allow_missing)
    }
    other = {
        path for path in wanted if path in resize and path in there and tuple(there[path].shape) != wanted[path].shape
    }
    _check(there, {path: leaf for path, leaf in wanted.items() if path not in other}, folder, extra_allowed=True)

    def as_stored(path: str) -> jax.ShapeDtypeStruct:
        if path not in other:
            return wanted[path]
        return jax.ShapeDtypeStruct(tuple(there[path].shape), "float32", sharding=wanted[path].sharding)

    loaded: dict[str, jax.Array] = {}
    for place in found:
        here = {in_checkpoint(path): as_stored(path) for path in wanted if path in stored[place]}
        if not here:
            continue
        with ocp.PyTreeCheckpointer() as reader:
            tree = state_lib.unflatten(here)
            args = ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            )
            read = state_lib.flatten(reader.restore(place, args=args))
        loaded |= {in_model(path): leaf for path, leaf in read.items()}
    for path in other:
        leaf = wanted[path]
        make = jax.jit(lambda x, p=path, w=leaf: resize[p](x, w.shape).astype(w.dtype), out_shardings=leaf.sharding)
        loaded[path] = make(loaded[path])
    return loaded


def stored_in(folder: epath.Path) -> dict[str, Any]:
    """Path -> Orbax metadata (shape, dtype) of the leaves in one item folder."""
    with ocp.PyTreeCheckpointer() as reader:
        return state_lib.flatten(reader.metadata(folder).item_metadata.tree)


def _check(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: epath.Path, *, extra_allowed: bool = False
) -> None:
    missing = sorted(set(wanted) - set(stored))
    extra = [] if extra_allowed else sorted(set(stored) - set(wanted))
    shapes = [
        f"{p} is {tuple(stored[p].shape)}, wanted {tuple(wanted[p].shape)}"
        for p in wanted
        if p in stored and tuple(stored[p].shape) != tuple(wanted[p].shape)
    ]
    problems = [
        f"{name} {_some(items)}"
        for name, items in (("missing:", missing), ("not in the model:", extra), ("other shape:", shapes))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not fit the model of this config; {'; '.join(problems)}. Use the config that wrote it"
        )


def _some(items: Iterable[str], most: int = 4) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
