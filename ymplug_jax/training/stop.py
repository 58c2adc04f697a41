"""Reasons for a training run to end early: signals, failing disks or buckets, and values that are not finite."""

import contextlib
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.data.records import CorruptRecord
from ymplug_jax.training.step import TrainingStopped

# Errors of worker processes arrive as text, so they are recognised by it.
FAILED_READ = re.compile(
    r"\b(FileNotFoundError|PermissionError|OSError|IsADirectoryError|NotADirectoryError)\b:?[^\n]*"
)
CORRUPT = re.compile(r"\bCorruptRecord: ([^\n]+)")


class _Asked(BaseException):
    """Raised by a signal handler to abort work that may stay unfinished."""


class Stop:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a request to save and stop.

    Used as a context manager. Until `listen` is called there is nothing to save, and SIGINT ends the process immediately. After
    that, the first signal requests a stop and a second SIGINT ends the process. With several processes, JAX's preemption sync
    point makes all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.alone = jax.process_count() == 1
        self._flag = False
        self._at_once = False
        self._before: dict[int, Any] = {}
        # Python allows signal handlers to be set in the main thread only.
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Stop":
        # Python's default handler would wait for the compiler and print a traceback. Keep SIGINT ignored if it was ignored.
        if self._main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._handle(signal.SIGINT, signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Start handling signals as stop requests; call it once there is state to save."""
        if not self._main:
            return
        self._handle(signal.SIGINT, self._interrupt)
        if self.alone:
            self._handle(signal.SIGTERM, self._ask)

    def _handle(self, number: int, handler: Any) -> None:
        before = signal.signal(number, handler)
        self._before.setdefault(number, before)

    def _interrupt(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.alone:
            self._ask(number, frame)
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's preemption service notifies all processes

    def _ask(self, number: int, frame: Any) -> None:
        self._flag = True
        if self._at_once:
            self._at_once = False
            raise _Asked

    def asked(self, step: int) -> bool:
        """Return whether to save and stop after this step. With several processes, call it once per step on all of them."""
        return self._flag if self.alone else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal abort the work inside, such as an evaluation. Single process only: several must stay in step."""
        try:
            self._at_once = self.alone
            yield
        except _Asked:
            pass
        finally:
            self._at_once = False


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Convert errors of reading data during a run: to `PlaceFailed` if `path` fails, to `CorruptRecord` for a damaged record.

    Recognises the errors of worker processes as well.

    Args:
      path: value of `config.data.path`, for messages.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        raise PlaceFailed(f"{where}: can no longer be read ({reason}); restore access to it") from error
    except RuntimeError as error:
        if isinstance(error, jax.errors.JaxRuntimeError | PlaceFailed):
            raise
        if corrupt := CORRUPT.search(str(error)):
            raise CorruptRecord(corrupt[1].strip()) from error
        if not (found := FAILED_READ.search(str(error))):
            raise
        raise PlaceFailed(f"{path}: can no longer be read ({found[0].strip()}); restore access to it") from error


def must_have_targets(step: int, weight: float) -> None:
    """Check the weight (number of targets) of the step's loss.

    Raises:
      TrainingStopped: `weight` is 0, so the batch has no target and its loss is undefined.
    """
    if weight == 0:
        raise TrainingStopped(
            f"step {step}: no example of the batch has a target, so the loss is undefined; check that the shards in "
            "config.data.path were built for this task and have titles, captions or labels"
        )


def finite_scores(step: int, values: Mapping[str, float], split: str) -> dict[str, float]:
    """Return the finite values of an evaluation, without metrics for which no example counts (NaN).

    Raises:
      TrainingStopped: the loss is NaN or a value is infinite. metrics.jsonl would hold null and hide the failure.
    """
    for name, value in values.items():
        if math.isinf(value) or (name == "loss" and math.isnan(value)):
            raise TrainingStopped(
                f"step {step}: {name} of the evaluation is {value}; check that split {split!r} has targets for this task, or lower "
                "config.optim.lr if training diverged"
            )
    return {name: value for name, value in values.items() if not math.isnan(value)}
