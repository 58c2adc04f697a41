"""The report that `benchmarks.device` prints and writes: results of finished steps survive if a later step fails or hangs, or the machine disappears."""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class OverBudget(BaseException):
    """A step exceeded its time. Not a subclass of Exception, so that a step's own error handling does not catch it."""


class Report:
    """The JSON file, rewritten after every addition; each addition also prints one line."""

    def __init__(self, path: Path, limit: float, began: float):
        """Args:
        path: of the file.
        limit: seconds from `began` after which the process ends itself; see `watch`.
        began: `time.perf_counter()` of the start.
        """
        self.path, self.limit, self.began = path, limit, began
        self.result: dict[str, Any] = {"steps": {}}
        self._lock = threading.RLock()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def put(self, **facts: Any) -> None:
        """Add facts about the run without printing a line."""
        with self._lock:
            self.result |= facts
            self._write()

    def add(self, step: str, name: str, value: dict[str, Any], line: str) -> None:
        """Add a result of a step and print its line."""
        with self._lock:
            self.result["steps"].setdefault(step, {}).setdefault("results", {})[name] = value
            self._write()
        print(f"[{self.elapsed():5.0f} s] {step:<9} {name:<24} {line}", flush=True)

    def fail(self, step: str, name: str, error: BaseException | str) -> None:
        """Record one line instead of a result."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {_first_line(error)}"
        self.add(step, name, {"error": text}, f"FAILED  {text}")

    def run(self, step: str, budget: float, work: Callable[[], None]) -> None:
        """Run a step for at most `budget` seconds or the rest of the limit; a failure becomes one line of the report."""
        left = self.limit - self.elapsed()
        facts: dict[str, Any] = {"budget_seconds": budget}
        with self._lock:
            self.result["steps"].setdefault(step, {}).update(facts)
        if left < 1:
            self.fail(step, "step", f"skipped: the limit of {self.limit:.0f} s is used up")
            return
        began = time.perf_counter()
        try:
            with _alarm(min(budget, left)):
                work()
        except (Exception, OverBudget) as error:  # libraries raise errors of any type; the next step runs anyway
            self.fail(step, "step", error)
        with self._lock:
            self.result["steps"][step]["seconds"] = round(time.perf_counter() - began, 2)
            self._write()

    @contextlib.contextmanager
    def watch(self, grace: float = 5.0) -> Iterator[None]:
        """End the process after the limit and `grace` seconds: nothing interrupts a compiler that hangs in native code."""

        def stop() -> None:
            with self._lock:
                self.result["error"] = f"stopped after {self.elapsed():.0f} s: a step did not end"
                self._write()
            print(self.result["error"], flush=True)
            os._exit(1)

        timer = threading.Timer(max(self.limit + grace - self.elapsed(), 0.0), stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _write(self) -> None:
        self.result["seconds"] = round(self.elapsed(), 1)
        part = self.path.with_name(f".{self.path.name}.tmp")
        part.write_text(json.dumps(_plain(self.result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OverBudget after `seconds`, as soon as Python code runs again."""

    def ring(*_: object) -> None:
        raise OverBudget(f"over its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _plain(value: Any) -> Any:
    """The value for JSON; non-finite numbers become text."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
