"""Video indices on disk (`index.npz`), each with the origin of the weights that computed it.

Embeddings of two runs are not comparable, even when they have the same width: searching one run's index with another run
would return a meaningless ranking. Every index therefore stores its origin, and every reader compares it.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, place_copies, places
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake

Origin = dict[str, Any]


def origin(experiment: Experiment, workdir: str) -> Origin:
    """Return what the embeddings depend on: fingerprint of the weights ("" without a checkpoint), step, task and frames."""
    step = checkpoint_files.latest_step(workdir)
    return {
        "fingerprint": "" if step is None else checkpoint_files.fingerprint(workdir),
        "step": step or 0,
        "task": experiment.task,
        "frames": experiment.data.frames,
    }


def write(path: str | Path | epath.Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays to exactly this path. A local file is replaced atomically.

    Raises:
      OSError: the folder is missing or cannot be written, or the disk is full. No partial file remains.
    """
    path = epath.Path(path)
    if places.is_remote(path):
        content = io.BytesIO()
        np.savez(content, **arrays)
        places.write_bytes(path, content.getvalue())
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | Path | epath.Path, keys: tuple[str, ...], *, setting: str) -> dict[str, np.ndarray]:
    """Read all arrays of an index.

    Args:
      path: path of the file, used as it is; no suffix is appended.
      keys: arrays that the index must contain.
      setting: the flag or setting that named the file, for messages.

    Raises:
      Mistake: the file is missing or damaged, lacks one of `keys`, or holds non-finite values.
    """
    try:
        with place_copies.local_copy(path, setting) as file:
            return _read(path, file, keys, setting)
    except FileNotFoundError:
        raise Mistake(f"{setting} {path}: no such file; correct the path") from None
    except IsADirectoryError:
        raise Mistake(f"{setting} {path}: a folder, not a file; give the index file in it (index.npz)") from None


def _read(path: str | Path | epath.Path, file: Path, keys: tuple[str, ...], setting: str) -> dict[str, np.ndarray]:
    """Read a local `file`; messages name `path`."""
    if file.is_dir():
        raise Mistake(f"{setting} {path}: a folder, not a file; give the index file in it (index.npz)")
    if not file.exists():
        raise Mistake(f"{setting} {path}: no such file; correct the path")
    try:
        with np.load(file, allow_pickle=False) as index:
            arrays = dict(index)
    # A text file, a single array, a truncated archive and a flipped bit each raise a different error.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Mistake(f"{setting} {path}: cannot be read as an index ({reason}); write it again") from None
    if missing := [key for key in keys if key not in arrays]:
        raise Mistake(f"{setting} {path}: not an index of this kind (no {', '.join(missing)}); write it again")
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Mistake(f"{setting} {path}: holds non-finite values in {key!r}; write it again")
    return arrays


def check_origin(path: str | Path | epath.Path, arrays: Mapping[str, Any], wanted: Origin, run: str) -> None:
    """Check that an index was computed by the run that searches it.

    Args:
      path: path of the index, for messages.
      arrays: arrays of the index. Keys of `wanted` that it lacks are not compared; the index of an evaluation lacks some.
      wanted: `origin` of the run.
      run: the run's folder, for messages.

    Raises:
      Mistake: the index has no fingerprint, or was computed with other weights, another step or task, or other frames.
    """
    if "fingerprint" not in arrays or not str(arrays["fingerprint"]):
        raise Mistake(
            f"{path}: the index does not record which run computed it; export it again with the run that searches it"
        )
    found = {key: np.asarray(arrays[key]).item() for key in wanted if key in arrays}
    if any(found[key] != wanted[key] for key in found):
        raise Mistake(
            f"{path}: computed by {describe(found)}, but {run} is {describe(wanted)}; export the index again with this run"
        )


def describe(found: Origin) -> str:
    """Describe an origin in one phrase: "task 'retrieve' at step 3, 4 frames, weights 0123456789ab"."""
    parts = [f"task {found['task']!r}" if "task" in found else "", f"step {found['step']}" if "step" in found else ""]
    parts += [f"{found['frames']} frames" if "frames" in found else "", f"weights {str(found.get('fingerprint'))[:12]}"]
    return ", ".join(part for part in parts if part)
