"""Progress of long loops: a bar on a terminal, a plain line at intervals in a log file.

A bar redraws its line with control codes, which would fill a redirected log with thousands of copies.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TextIO, TypeAlias, TypeVar, cast

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")
Bar: TypeAlias = "tqdm[Item] | Lines[Item]"
EVERY = 30.0  # seconds between two lines of a log


def bar(
    items: Iterable[Item] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    hidden: bool = False,
    leave: bool = False,
    scale: bool = False,
    file: TextIO | None = None,
) -> "Bar[Item]":
    """Return a progress display: iterate over it, or call `update(n)`, `set_postfix_str(text)` and `close()`.

    Args:
      items: items to iterate over, or None.
      desc: text before the counts.
      unit: unit of the counts, singular.
      total: number of items; default: `len(items)` if it has a length.
      initial: number of items already done.
      hidden: show nothing (on hosts other than the first).
      leave: keep the finished bar on the terminal; in a log, write a last line even for a short loop.
      scale: write large counts, such as bytes, with k, M or G.
      file: output stream; default: the current stderr.
    """
    file = file or sys.stderr
    if file.isatty() and not hidden:
        from tqdm import tqdm

        return tqdm(
            cast("Iterable[Item]", items),  # the stubs of tqdm(None) lose the type of the items
            total=total, initial=initial, desc=desc, unit=unit, unit_scale=scale, file=file, leave=leave, mininterval=1.0,
        )  # fmt: skip
    return Lines(items, desc, unit, total, initial, hidden, leave, scale, file)


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line to stderr, above the bar on a terminal."""
    file = file or sys.stderr
    if file.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=file)
    else:
        print(text, file=file, flush=True)


class Lines(Generic[Item]):
    """The part of tqdm's interface that this package uses, with plain lines as output."""

    def __init__(
        self, items: Iterable[Item] | None, desc: str, unit: str, total: int | None, initial: int, hidden: bool, leave: bool,
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
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.n: float = initial
        self.disable = hidden
        self._initial, self._note, self._closed = initial, "", False
        self._began = self._told = time.monotonic()
        self._lines, self._shown = 0, -1.0

    def __iter__(self) -> Iterator[Item]:
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
        """Add `n` to the count."""
        self.n += n
        if not self.disable and time.monotonic() - self._told >= EVERY:
            self._tell()

    def set_postfix_str(self, text: str) -> None:
        """Set the text shown after the counts."""
        self._note = text

    def close(self) -> None:
        """Write a last line if lines were written before or `leave` is set."""
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
