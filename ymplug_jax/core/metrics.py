"""Metrics: `Mean` on the device, JSON lines and TensorBoard on disk."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import struct

from ymplug_jax.core import text_files


@struct.dataclass
class Mean:
    """A mean that is divided only at the end: add totals and weights over micro-batches, steps and hosts."""

    total: jax.Array  # float32 scalar
    weight: jax.Array  # float32 scalar

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """total / weight on the host; NaN where nothing was counted."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else math.nan


Metrics = dict[str, Mean]


def mean_of(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean of `values` where `mask` is non-zero (same shape)."""
    mask = mask.astype(jnp.float32)
    # where, not a product: a masked-out NaN or inf must not reach the total.
    return Mean(jnp.where(mask > 0, values * mask, 0.0).sum(), mask.sum())


class Writer:
    """Appends to `metrics.jsonl` and TensorBoard in the run's folder; on hosts other than the first it does nothing.

    An object of a bucket cannot grow and is there only when it is closed: in gs:// the lines are written anew, all of them,
    every half minute and at `flush`.
    """

    def __init__(self, workdir: epath.Path, *, active: bool):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter  # after the check: only the first host pays for it

        self._path = workdir / "metrics.jsonl"
        self._remote = "://" in str(workdir)
        if self._remote:
            self._text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            self._written = time.monotonic()
        else:
            self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One line {"step", "time", ...}; non-finite numbers become null, since JSON has none."""
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
        """All lines are in the file: before a checkpoint, so that a run that goes on from it lacks none."""
        if self._active and self._remote:
            self._path.write_text(self._text, encoding="utf-8")
            self._written = time.monotonic()

    def close(self) -> None:
        """Flush both."""
        if self._active:
            self.flush()
            if not self._remote:
                self._file.close()
            self._board.close()


def read_metrics(workdir: epath.Path) -> list[dict]:
    """Lines of `metrics.jsonl` by step. Where a resumed run went back, what it had written of later steps is left out."""
    path = workdir / "metrics.jsonl"
    lines: list[dict] = []
    for text in text_files.read_lines(path) if path.exists() else []:
        try:
            line = json.loads(text)
            step, names = line["step"], line.keys() - {"step", "time"}
        except (ValueError, TypeError, KeyError, AttributeError):  # cut off by a kill
            continue
        # One step may have several lines (training, evaluation), but each name once.
        again = any(old["step"] == step and names & old.keys() for old in lines[-8:])
        if lines and (step < lines[-1]["step"] or again):
            lines = [old for old in lines if old["step"] < step]
        lines.append(line)
    return lines
