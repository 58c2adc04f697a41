"""Copies of places in buckets on the local disk, for libraries and programs that read and write local files only."""

import argparse
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from ymplug_jax.core import places
from ymplug_jax.core.exits import Mistake, PlaceFailed


def local_only(name: str) -> Path:
    """Parse a flag that takes local files only, as the `type` of argparse.

    Raises:
      argparse.ArgumentTypeError: it names another place, which pathlib would take for a local folder.
    """
    if places.SCHEME.match(name) and "://" in name:
        raise argparse.ArgumentTypeError(
            f"{name} is not a local file or folder; give one, and copy it there or from there"
        )
    return Path(name)


def any_place(name: str) -> Path | epath.Path:
    """Parse a flag that takes a local place or one in a bucket, as the `type` of argparse.

    Raises:
      argparse.ArgumentTypeError: it is no place, see `places.place`.
    """
    try:
        found = places.place(name, "")
    except Mistake as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None
    return found if places.is_remote(found) else Path(found)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str], what: str = "", seconds: float | None = None) -> Iterator[Path]:
    """Yield a local file with the content of a file.

    A file in a bucket is copied to a temporary folder, under its own name, and removed at the end. A local file is yielded as it is,
    whether it exists or not.

    Args:
      path: the file.
      what: the flag or setting that names it, see `places.place`.
      seconds: time limit of the copy.

    Raises:
      FileNotFoundError, TimeoutError, OSError: as `places.download`.
      Mistake: as `places.place`.
    """
    file = places.place(os.fspath(path), what)
    if not places.is_remote(file):
        yield Path(file)
        return
    with tempfile.TemporaryDirectory(prefix="ymplug_jax_") as folder:
        copy = Path(folder) / file.name
        places.download(file, copy, seconds)
        yield copy


@contextlib.contextmanager
def local_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a local file to write, which is then copied to a place in a bucket; a local place is yielded itself.

    Raises:
      PlaceFailed: the copy failed.
    """
    if not places.is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="ymplug_jax_") as folder:
        written = Path(folder) / os.fspath(path).rpartition("/")[2]
        yield written
        if written.exists():
            with failing():
                places.upload(written, path)


@contextlib.contextmanager
def local_folder(path: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """Yield a local file or folder with the content of a place; in a bucket, all files below it are copied, and removed at the end.

    Raises:
      PlaceFailed: a file cannot be read.
    """
    source = places.place(os.fspath(path), what)
    if not places.is_remote(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="ymplug_jax_") as folder:
        copy = Path(folder) / source.name
        with failing():
            for name in places.below(source):
                file = copy / name if name else copy
                file.parent.mkdir(parents=True, exist_ok=True)
                places.download(source / name if name else source, file)
        yield copy


def upload_folder(local: Path, path: str | os.PathLike[str], last: Sequence[str] = ()) -> None:
    """Copy all files below a local folder into a bucket.

    Args:
      local: the folder.
      path: the folder in the bucket.
      last: names of files that are copied at the end, in this order; what reads the folder needs them, so that an interrupted copy is
        not taken for a whole one.

    Raises:
      PlaceFailed: a file cannot be written.
    """
    files = sorted(file for file in local.rglob("*") if file.is_file())
    files.sort(key=lambda file: last.index(file.name) + 1 if file.name in last else 0)
    with failing():
        for file in files:
            places.upload(file, f"{os.fspath(path)}/{file.relative_to(local).as_posix()}")


@contextlib.contextmanager
def working_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a local folder for work whose result goes to a place in a bucket: the same one for a repeated command, which continues.

    The folder lies in the folder for temporary files (TMPDIR). It is removed when the block succeeds.
    """
    key = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ymplug_jax_{os.getuid()}_{key}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Turn errors of a place in the block into PlaceFailed, except those of a missing file or a time limit; messages are one line."""
    try:
        yield
    except (FileNotFoundError, TimeoutError):
        raise
    except OSError as error:
        raise PlaceFailed(" ".join(str(error).split())) from error
