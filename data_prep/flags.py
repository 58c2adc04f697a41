"""What the programs of data_prep have in common: flags, and mistakes that end in one line."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

MISTAKE, PLACE = 2, 5  # exit codes, those of ymplug_jax.core.exits
EVERY = 30.0  # seconds between two lines of progress where there is no terminal

Item = TypeVar("Item")


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, and no flags by their first letters (they would hide misspelt ones)."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=f"python -m data_prep.{program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        """Ends the program."""
        self.exit(MISTAKE, f"error: {message}; --help lists the flags\n")


def local_path(text: str) -> Path:
    """Type of a flag: a place on this machine.

    Raises:
      argparse.ArgumentTypeError: a URL such as gs://bucket, or an empty name.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is no local place; data_prep reads and writes local files, so mount or copy the bucket"
        )
    if not text or "\x00" in text:
        raise argparse.ArgumentTypeError("an empty name; give a path")
    return Path(text)


def run(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; mistakes (ValueError) and places that fail (OSError) cost one line on stderr."""
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {say(error)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def say(error: Exception) -> str:
    """An error in one line; of an OSError the place and what is wrong with it."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n"))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; its folder is made. Raises OSError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def bar(items: Iterable[Item] | None, desc: str, unit: str, **more: object) -> tqdm:
    """tqdm on a terminal; elsewhere a plain line every EVERY seconds, so that logs hold no redrawn bars."""
    shown = sys.stderr.isatty()
    if items is not None and not shown:
        items = _with_lines(items, desc, unit, more.get("total"))
    return tqdm(items, desc=desc, unit=unit, file=sys.stderr, disable=not shown, **more)


def _with_lines(items: Iterable[Item], desc: str, unit: str, total: object) -> Iterator[Item]:
    ticks = Ticks(desc, unit, total)
    for done, item in enumerate(items):
        ticks.tell(done)
        yield item


class Ticks:
    """Plain lines of progress, one every EVERY seconds."""

    def __init__(self, desc: str, unit: str, total: object = None):
        self._desc, self._unit, self._total = desc, unit, total
        self._next = time.monotonic() + EVERY

    def tell(self, done: int) -> None:
        """Print a line, if it is time for one."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        of = f" of {self._total:,}" if isinstance(self._total, int) else ""
        print(f"{self._desc}: {done:,}{of} {self._unit}s", file=sys.stderr, flush=True)
