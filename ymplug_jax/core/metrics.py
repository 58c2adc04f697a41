"""Metrics: `Mean` on device, JSON lines and TensorBoard events on disk."""

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import struct

from ymplug_jax.core import places, text_files


@struct.dataclass
class Mean:
    """A weighted mean that is divided only at the end, so it adds up exactly over micro-batches, steps and hosts."""

    total: jax.Array  # float32 scalar
    weight: jax.Array  # float32 scalar

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """Return total / weight as a host float; NaN if the weight is 0."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else math.nan


Metrics = dict[str, Mean]


class Writer:
    """Appends metrics to `metrics.jsonl` and TensorBoard in the run's folder. Does nothing on hosts other than the first.

    Objects in a bucket cannot be appended to, so in gs:// the whole file is rewritten every 30 seconds and at `flush`.
    """

    def __init__(self, workdir: epath.Path, *, active: bool):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter  # imported here, since only the first host needs it

        self._path = workdir / "metrics.jsonl"
        self._remote = places.is_remote(workdir)
        board = str(workdir / "tensorboard")
        if self._remote:
            # Its own writers for buckets need other libraries, and without them it makes a local folder of that name.
            self._local = tempfile.TemporaryDirectory(prefix="ymplug_jax_board_")
            self._boards, board = workdir / "tensorboard", self._local.name
            self._text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            self._written = time.monotonic()
        else:
            torn = self._path.exists() and self._path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = self._path.open("a", encoding="utf-8")
            if torn:  # by a kill or a full disk: the next line must not continue this one
                self._file.write("\n")
        self._board = SummaryWriter(board)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one line {"step", "time", ...}. Non-finite values become null, since JSON cannot represent them."""
        if not self._active:
            return
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            line[name] = value if np.isfinite(value) else None
            self._board.add_scalar(name, value, step)
        text = json.dumps(line, ensure_ascii=False) + "\n"
        if not self._remote:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        if time.monotonic() - self._written > 30:
            self.flush()

    def flush(self) -> None:
        """Write all lines to the file. Called before a checkpoint, so that a resumed run has the metrics of every earlier step."""
        if self._active and self._remote:
            places.write_text(self._path, self._text)
            self._board.flush()
            self._copy_board()
            self._written = time.monotonic()

    def _copy_board(self) -> None:
        for file in Path(self._local.name).iterdir():
            places.upload(file, self._boards / file.name)

    def close(self) -> None:
        """Flush and close both files."""
        if self._active:
            self.flush()
            if not self._remote:
                self._file.close()
            self._board.close()
            if self._remote:
                self._copy_board()
                self._local.cleanup()


def read_metrics(workdir: epath.Path) -> list[dict]:
    """Read `metrics.jsonl` in order of steps. Where a resumed run repeated steps, only the newest lines are kept."""
    path = workdir / "metrics.jsonl"
    lines: list[dict] = []
    for text in text_files.read_lines(path) if path.exists() else []:
        try:
            line = json.loads(text)
            step, names = line["step"], line.keys() - {"step", "time"}
        except (ValueError, TypeError, KeyError, AttributeError):  # a line truncated when the process was killed
            continue
        # A step may have several lines (training, evaluation), but each metric only once.
        again = any(old["step"] == step and names & old.keys() for old in lines[-8:])
        if lines and (step < lines[-1]["step"] or again):
            lines = [old for old in lines if old["step"] < step]
        lines.append(line)
    return lines
