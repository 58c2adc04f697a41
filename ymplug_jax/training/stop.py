"""How a training run ends before its time: signals that ask for it, places that fail, and values that mean nothing."""

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
from ymplug_jax.training.step import TrainingStopped

# What worker processes pass on is text alone.
FAILED_READ = re.compile(
    r"\b(FileNotFoundError|PermissionError|OSError|IsADirectoryError|NotADirectoryError)\b:?[^\n]*"
)


class _Asked(BaseException):
    """Ends what may be left unfinished when the run was asked to stop."""


class Stop:
    """Notices SIGINT (Ctrl-C) and SIGTERM. On several hosts all of them must stop at the same step, which JAX's preemption sync
    decides.

    Inside its context, until `listen`, SIGINT ends the process at once: there is nothing to save. From then on the first one asks to
    stop and the second ends the process.
    """

    def __init__(self):
        self.alone = jax.process_count() == 1
        self._flag = False
        self._at_once = False
        self._before: dict[int, Any] = {}
        self._main = threading.current_thread() is threading.main_thread()  # only there can handlers be set

    def __enter__(self) -> "Stop":
        # Python's own handler would wait for the compiler and then print a traceback. What ignores SIGINT goes on to.
        if self._main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._handle(signal.SIGINT, signal.SIG_DFL)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """From now on there is something to save."""
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
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on to all

    def _ask(self, number: int, frame: Any) -> None:
        self._flag = True
        if self._at_once:
            self._at_once = False
            raise _Asked

    def asked(self, step: int) -> bool:
        """Whether to save and stop after this step; with several processes call it once a step on all of them."""
        return self._flag if self.alone else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around what nothing depends on, such as an evaluation: a signal leaves it. Alone only; several processes must stay together."""
        try:
            self._at_once = self.alone
            yield
        except _Asked:
            pass
        finally:
            self._at_once = False


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Around what reads data in the middle of a run: a place that worked at the start and fails now is PlaceFailed, in one line."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        raise PlaceFailed(f"{where}: cannot be read any more ({reason}); bring it back") from error
    except RuntimeError as error:
        if isinstance(error, jax.errors.JaxRuntimeError | PlaceFailed) or not (found := FAILED_READ.search(str(error))):
            raise
        raise PlaceFailed(f"{path}: cannot be read any more ({found[0].strip()}); bring it back") from error


def must_have_targets(step: int, weight: float) -> None:
    """`weight` is that of the step's loss.

    Raises:
      TrainingStopped: it is 0, so that the loss is the mean of nothing.
    """
    if weight == 0:
        raise TrainingStopped(
            f"step {step}: no example of the batch has a target, so there is no loss; look at the titles, captions or labels of "
            "config.data.path, and whether its shards were built for this task"
        )


def finite_scores(step: int, values: Mapping[str, float], split: str) -> dict[str, float]:
    """The values of an evaluation that were counted over something.

    Raises:
      TrainingStopped: the loss, or an infinite value: it would be written as null and pass for a run that is well.
    """
    for name, value in values.items():
        if math.isinf(value) or (name == "loss" and math.isnan(value)):
            raise TrainingStopped(
                f"step {step}: the evaluation's {name} is {value}; look whether examples of split {split!r} have targets for this "
                "task, and whether training diverged (config.optim.lr)"
            )
    return {name: value for name, value in values.items() if not math.isnan(value)}
