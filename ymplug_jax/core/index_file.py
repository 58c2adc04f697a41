"""Indices of videos on disk (`index.npz`), and what binds each of them to the weights that computed it.

Vectors of two runs are not comparable, even where they have the same width, so that a search across runs would return a
plausible order without meaning. Every index therefore carries its origin, and every reader compares it.
"""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake

Origin = dict[str, Any]


def origin(experiment: Experiment, workdir: str) -> Origin:
    """What vectors depend on, as plain values: fingerprint of the weights ("" without a checkpoint), step, task, frames."""
    step = checkpoint_files.latest_step(workdir)
    return {
        "fingerprint": "" if step is None else checkpoint_files.fingerprint(workdir),
        "step": step or 0,
        "task": experiment.task,
        "frames": experiment.data.frames,
    }


def write(path: str | Path | epath.Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays under exactly this name. A local file appears only when it is whole; an old one stays until then.

    Raises:
      OSError: the folder is missing or cannot be written, or the disk is full; nothing half-written stays.
    """
    path = epath.Path(path)
    if "://" in str(path):  # an object appears when it is closed
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | Path, keys: tuple[str, ...], *, setting: str) -> dict[str, np.ndarray]:
    """All arrays of an index that has `keys`.

    Args:
      path: of the file; the very name, nothing is appended.
      keys: that must be there.
      setting: the flag or setting that named the file, for messages.

    Raises:
      Mistake: no such file, a damaged one, or no index with these keys.
    """
    if Path(path).is_dir():
        raise Mistake(f"{path}: {setting} is a folder; give the index file in it (index.npz)")
    if not Path(path).exists():
        raise Mistake(f"{path}: {setting} does not exist; give an index that was written before")
    try:
        with np.load(path, allow_pickle=False) as index:
            arrays = dict(index)
    # Text, a single array, a truncated archive and a flipped bit each raise something else.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Mistake(f"{path}: {setting} cannot be read as an index ({reason}); write it again") from None
    if missing := [key for key in keys if key not in arrays]:
        raise Mistake(f"{path}: {setting} is no index of this kind, it lacks {', '.join(missing)}; write it again")
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Mistake(f"{path}: {setting} holds values in {key!r} that are not finite; write it again")
    return arrays


def check_origin(path: str | Path, arrays: Mapping[str, Any], wanted: Origin, run: str) -> None:
    """Compare where an index came from with the run that is to search it.

    Args:
      path: of the index, for messages.
      arrays: of the index; keys of `wanted` that are missing in indices of an evaluation are not compared.
      wanted: `origin` of the run.
      run: the run's folder, for messages.

    Raises:
      Mistake: an index without a fingerprint, or of other weights, step, task or frames.
    """
    if "fingerprint" not in arrays or not str(arrays["fingerprint"]):
        raise Mistake(
            f"{path}: this index does not say which run computed it; export it again with the run that is to search it"
        )
    found = {key: np.asarray(arrays[key]).item() for key in wanted if key in arrays}
    if any(found[key] != wanted[key] for key in found):
        raise Mistake(
            f"{path}: computed by {describe(found)}, but {run} is {describe(wanted)}; export it again with this run"
        )


def describe(found: Origin) -> str:
    """One phrase for an origin: "task 'retrieve' at step 3, 4 frames, weights 0123456789ab"."""
    parts = [f"task {found['task']!r}" if "task" in found else "", f"step {found['step']}" if "step" in found else ""]
    parts += [f"{found['frames']} frames" if "frames" in found else "", f"weights {str(found.get('fingerprint'))[:12]}"]
    return ", ".join(part for part in parts if part)
