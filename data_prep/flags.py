"""Shared code of the data_prep programs: flags, one-line error messages, file writing and progress."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar, cast

from etils import epath
from tqdm import tqdm

from ymplug_jax.core import places

MISTAKE, PLACE = 2, 5  # exit codes, as in ymplug_jax.core.exits
EVERY = 30.0  # seconds between progress lines without a terminal

Item = TypeVar("Item")


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors and without abbreviated flags, which would hide misspelt ones."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=f"python -m data_prep.{program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit."""
        self.exit(MISTAKE, f"error: {message}; --help lists the flags\n")


def local_path(text: str) -> Path:
    """Parse a flag as a local path.

    Raises:
      argparse.ArgumentTypeError: a URL such as gs://bucket, or an empty path.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is not a local path, and data_prep reads and writes local files only; mount or copy the bucket"
        )
    if not text or "\x00" in text:
        raise argparse.ArgumentTypeError("the path is empty; give a path")
    return Path(text)


def place_of(flag: str) -> Callable[[str], epath.Path]:
    """Return the parser of a flag that names a place: a local path, or a file or folder of a bucket (gs://, s3://).

    It raises argparse.ArgumentTypeError for an empty path and another scheme.
    """

    def parse(text: str) -> epath.Path:
        if not text or "\x00" in text:
            raise argparse.ArgumentTypeError("the path is empty; give a path")
        try:
            return places.place(text, flag)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{flag} ")) from None

    return parse


def run(main: Callable[[], int | None]) -> int:
    """Run `main` and return its exit code. A ValueError or OSError becomes one line on stderr and exit code 2."""
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {say(error)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def say(error: Exception) -> str:
    """Format an error in one line. For an OSError: the path and the reason."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n"))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically and create its folder. Raises OSError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and create its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def bar(
    items: Iterable[Item] | None,
    desc: str,
    unit: str,
    *,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    mininterval: float = 0.1,
) -> "tqdm[Item]":
    """Return tqdm on a terminal; elsewhere print a plain line every EVERY seconds, since redrawn bars would fill a log."""
    shown = sys.stderr.isatty()
    if items is not None and not shown:
        items = _with_lines(items, desc, unit, total)
    return tqdm(
        cast("Iterable[Item]", items),  # the stubs of tqdm(None) lose the type of the items
        desc=desc, unit=unit, total=total, initial=initial, leave=leave, mininterval=mininterval,
        file=sys.stderr, disable=not shown,
    )  # fmt: skip


def _with_lines(items: Iterable[Item], desc: str, unit: str, total: int | None) -> Iterator[Item]:
    ticks = Ticks(desc, unit, total)
    for done, item in enumerate(items):
        ticks.tell(done)
        yield item


class Ticks:
    """Prints plain lines of progress, one every EVERY seconds."""

    def __init__(self, desc: str, unit: str, total: int | None = None):
        self._desc, self._unit, self._total = desc, unit, total
        self._next = time.monotonic() + EVERY

    def tell(self, done: int) -> None:
        """Print a line if EVERY seconds have passed since the last one."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        of = "" if self._total is None else f" of {self._total:,}"
        print(f"{self._desc}: {done:,}{of} {self._unit}s", file=sys.stderr, flush=True)
