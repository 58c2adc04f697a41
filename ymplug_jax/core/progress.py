"""Progress of long loops: a bar on a terminal, a plain line now and then in a log file.

A bar redraws its line with control codes, which fill a redirected log with thousands of copies of it.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TextIO

EVERY = 30.0  # seconds between two lines of a log


def bar(
    items: Iterable | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    hidden: bool = False,
    leave: bool = False,
    scale: bool = False,
    file: TextIO | None = None,
) -> Any:
    """A progress display: iterate over it, or call `update(n)`, `set_postfix_str(text)` and `close()`.

    Args:
      items: what is iterated over, or None.
      desc: stands before the counts.
      unit: of the counts, singular.
      total: items in all; default: `len(items)` where there is one.
      initial: items that were done before.
      hidden: show nothing (other hosts than the first).
      leave: keep the finished bar on the terminal; in a log, write a last line even if the loop was short.
      scale: counts are large (bytes): write them with k, M, G.
      file: default: stderr as it is now.
    """
    file = file or sys.stderr
    if file.isatty() and not hidden:
        from tqdm import tqdm

        return tqdm(
            items, total=total, initial=initial, desc=desc, unit=unit, unit_scale=scale, file=file, leave=leave, mininterval=1.0,
        )  # fmt: skip
    return _Lines(items, desc, unit, total, initial, hidden, leave, scale, file)


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line on stderr; on a terminal it is placed above the bar."""
    file = file or sys.stderr
    if file.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=file)
    else:
        print(text, file=file, flush=True)


class _Lines:
    """The part of tqdm's interface that this package uses, as plain lines."""

    def __init__(
        self, items: Iterable | None, desc: str, unit: str, total: int | None, initial: int, hidden: bool, leave: bool,
        scale: bool, file: TextIO,
    ):  # fmt: skip
        self._items, self._desc, self._unit, self._leave, self._scale, self._file = (
            items,
            desc,
            unit,
            leave,
            scale,
            file,
        )
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.n, self.disable = initial, hidden
        self._initial, self._note, self._closed = initial, "", False
        self._began = self._told = time.monotonic()
        self._lines, self._shown = 0, -1

    def __iter__(self) -> Iterator:
        try:
            for item in self._items or ():
                yield item
                self.update(1)
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self.n += n
        if not self.disable and time.monotonic() - self._told >= EVERY:
            self._tell()

    def set_postfix_str(self, text: str) -> None:
        self._note = text

    def close(self) -> None:
        """A last line closes the story, where one was begun or `leave` asks for it."""
        if self._closed or self.disable:
            return
        self._closed = True
        if self.n > self._initial and self.n != self._shown and (self._lines or self._leave):
            self._tell()

    def _tell(self) -> None:
        self._told, self._lines, self._shown = time.monotonic(), self._lines + 1, self.n
        count = _scaled(self.n) if self._scale else f"{self.n:g}"
        if self.total:
            total = _scaled(self.total) if self._scale else f"{self.total:g}"
            count += f" of {total} {self._unit}{'' if self._scale or self.total == 1 else self._plural()} ({100 * self.n / self.total:.0f} %)"
        else:
            count += f" {self._unit}{'' if self._scale or self.n == 1 else self._plural()}"
        parts = [count, f"{self._told - self._began:.0f} s", *([self._note] if self._note else [])]
        print(f"{self._desc}: {', '.join(parts)}", file=self._file, flush=True)

    def _plural(self) -> str:
        return "es" if self._unit.endswith(("s", "sh", "ch", "x")) else "s"


def _scaled(number: float) -> str:
    power = 0
    while abs(number) >= 1000 and power < 4:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {' kMGT'[power]}".rstrip()
