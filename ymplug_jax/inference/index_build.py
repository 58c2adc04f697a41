"""An index of many videos that survives interruptions: finished vectors are kept in a side file.

The side file (`index.npz.part`) holds JSON lines: the origin of the vectors, then one line per video. Lines are only appended, so that
the file is valid at any time; a last line that was cut off is dropped. Each vector is bound to name, size and modification time of its
file, and the side file to the weights. The index is written when all vectors are there, and the side file is removed.
"""

import base64
import contextlib
import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ymplug_jax.core import index_file, place_copies, places
from ymplug_jax.core.exits import Mistake, writing
from ymplug_jax.core.index_file import Origin

KIND = "ymplug_jax export"


class Export:
    """The vectors computed so far and the side file that more are appended to. A lock admits one process at a time."""

    def __init__(self, path: Path | epath.Path, origin: Origin):
        """Open the side file and read the vectors of an interrupted export.

        Args:
          path: of the index.
          origin: of the vectors that will be added.

        Raises:
          Mistake: the side file belongs to other weights, is not a side file, or is locked by another process.
          PlaceFailed: the side file cannot be opened.
        """
        self.path, self._origin = path, origin
        # Objects cannot be appended to: beside an index in a bucket the side file is local, and a repeated command finds it again.
        self._work = contextlib.ExitStack()
        folder = (
            self._work.enter_context(place_copies.working_folder(path)) if places.is_remote(path) else Path(path.parent)
        )
        folder.mkdir(exist_ok=True)
        self.part = folder / (path.name + ".part")
        self.vectors: dict[str, np.ndarray] = {}  # name -> f32[E]
        self._stamps: dict[str, list[int]] = {}
        with writing(self.part, "--export"):
            self._file = self.part.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def has(self, name: str) -> bool:
        """Whether the vector of this file is stored and the file has not changed since."""
        return name in self.vectors and self._stamps[name] == _stamp(name)

    def drop(self, names: Iterable[str]) -> None:
        """Remove the vectors of these files, which have changed."""
        for name in names:
            self.vectors.pop(name, None)

    def add(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Append the vector f32[E] of each file.

        Raises:
          PlaceFailed: the disk failed; earlier vectors are kept.
        """
        lines = []
        for name, vector in vectors.items():
            vector = np.ascontiguousarray(vector, "<f4")
            self.vectors[name], self._stamps[name] = vector, _stamp(name)
            line = {"video": name, "stamp": self._stamps[name], "vector": base64.b64encode(vector.tobytes()).decode()}
            lines.append(json.dumps(line) + "\n")
        with writing(self.part, "--export"):
            self._file.write("".join(lines).encode())
            self._file.flush()

    def finish(self, names: Sequence[str]) -> int:
        """Write the index of the `names` that have a vector, in this order, and remove the side file. Returns their number.

        Raises:
          PlaceFailed: the disk failed; the side file is kept.
        """
        there = [name for name in names if name in self.vectors]
        if there:
            arrays = {"video": np.stack([self.vectors[name] for name in there]), "video_id": np.array(there)}
            with place_copies.failing(), writing(self.path, "--export"):
                index_file.write(self.path, arrays | self._origin)
        self.close()
        self.part.unlink(missing_ok=True)
        self._work.close()
        return len(there)

    def close(self) -> None:
        """Close the side file, and remove it if it has no vectors."""
        if not self._file.closed:
            self._file.close()
            if not self.vectors:
                self.part.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(
                f"{self.part}: another process is writing this index; wait for it, or give --export another name"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _read(self) -> None:
        """Read the complete lines and truncate the file behind them."""
        self._file.seek(0)
        head = self._file.readline()
        if head.endswith(b"\n") or len(head) > 4096:
            found = _line(head)
            if found.pop("kind", None) != KIND:
                raise Mistake(
                    f"{self.part}: --export needs this name, but the file is not a partial export; move it away"
                )
            if found != self._origin:
                raise Mistake(
                    f"{self.part}: this partial export comes from {index_file.describe(found)}, this run is "
                    f"{index_file.describe(self._origin)}; remove the file, or give --export another name"
                )
            whole = self._file.tell()
            for text in self._file:
                line = _line(text)
                vector = _vector(line.get("vector"))
                if not text.endswith(b"\n") or vector is None or not isinstance(line.get("video"), str):
                    break
                self.vectors[line["video"]], self._stamps[line["video"]] = vector, line.get("stamp") or []
                whole += len(text)
            self._file.truncate(whole)
        else:  # new, or interrupted before the first line was complete
            self._file.truncate(0)
            with writing(self.part, "--export"):
                self._file.write(json.dumps({"kind": KIND, **self._origin}).encode() + b"\n")
                self._file.flush()


def _stamp(name: str) -> list[int]:
    """[size, modification time in ns] of a file; [] if it does not exist."""
    try:
        return places.stamp(name)
    except OSError:
        return []


def _line(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _vector(text: object) -> np.ndarray | None:
    if not isinstance(text, str):
        return None
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (ValueError, TypeError):
        return None
