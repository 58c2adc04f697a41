"""Where the videos of a build are: a local folder, or a folder of a bucket whose files are copied to the local disk one by one.

`open_videos` returns an object with three methods, `present`, `names` and `file`; `file` is a context manager, so that a copy is
deleted as soon as it is decoded.
"""

import contextlib
import errno
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from etils import epath

from data_prep.archives import is_archive, open_archive
from data_prep.video_copies import Copies
from ymplug_jax.core import place_requests, places
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_path import refuse_hostile, resolve


class Videos(Protocol):
    """The files below a video root. Names are relative to it, with "/" between folders. One process uses an object."""

    def present(self, name: str) -> bool:
        """Whether `file` would find a file of this name. Raises OSError if the place cannot be read."""
        ...

    def names(self) -> Iterator[str]:
        """Yield the names of all files below the root, in no particular order. Raises OSError if it cannot be read."""
        ...

    def file(self, name: str) -> AbstractContextManager[Path]:
        """Give a local file for the time of a `with` block.

        Raises:
          Reject: "missing_file" or "hostile_path": the name of the row is at fault.
          OSError: the place cannot be read, or the local disk not written: the machine is at fault, not the row.
        """
        ...

    def close(self) -> None:
        """Delete temporary files."""
        ...


def open_videos(
    root: str | epath.Path, allow_links_to: Sequence[str] = (), seconds: float | None = None, index: str = ""
) -> Videos:
    """Open a video root.

    Args:
      root: folder, local or in a bucket (`gs://bucket/folder`), or a .zip or .tar archive.
      allow_links_to: local folders outside the root that symbolic links may point to.
      seconds: time that copying one file from a bucket may take, with all repetitions; None: no limit.
      index: file of `Tar.save_index` for an archive; "": read the archive.

    Raises:
      BadArchive: the archive is damaged or of a kind that cannot be read.
      OSError: it cannot be read.
    """
    path = epath.Path(root)
    if is_archive(path.name) and not path.is_dir():
        return open_archive(path, epath.Path(index) if index else None)
    return BucketVideos(path, seconds) if places.is_remote(path) else LocalVideos(os.fspath(path), allow_links_to)


class RootMissing(FileNotFoundError):
    """The video root itself is missing."""


class LocalVideos:
    """Videos in a local folder. Symbolic links are followed inside the folder and to `allow_links_to` only."""

    def __init__(self, root: str, allow_links_to: Sequence[str] = ()):
        self._root, self._links = root, allow_links_to
        self._real = os.path.realpath(root)
        self._inside: dict[str, bool] = {}  # folder of a name -> whether it lies below the root, links followed

    def present(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self._path(name)
        except Reject:
            return False
        return True

    def names(self) -> Iterator[str]:
        """Yield all files; folders behind symbolic links are left out."""

        def fail(error: OSError) -> None:
            raise error

        for folder, _, files in os.walk(self._root, onerror=fail):
            inside = PurePosixPath(os.path.relpath(folder, self._root))
            yield from (str(inside / file) for file in files)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Give the file itself."""
        yield self._path(name)

    def close(self) -> None:
        """Nothing to delete."""

    def _path(self, name: str) -> Path:
        """Find the file of a name as `resolve` does. A missing file costs one system call: a list may name millions."""
        refuse_hostile(name)
        if name.isascii():  # other names may be spelled in another normalisation
            self._refuse_missing(name)
        try:
            return resolve(self._root, name, self._links)
        except Reject as reject:
            if reject.reason == "missing_file":
                self._check_root()
            raise

    def _check_root(self) -> None:
        """Raise FileNotFoundError if there is no video root: a disk that is no longer mounted, not a missing file."""
        if not os.path.isdir(self._root):
            raise RootMissing(errno.ENOENT, f"the video root {self._root} is missing")

    def _refuse_missing(self, name: str) -> None:
        try:
            os.lstat(f"{self._root}/{name}")
        except FileNotFoundError:
            folder = os.path.dirname(name)
            if folder not in self._inside:
                if len(self._inside) > 10_000:
                    self._inside.clear()
                real = os.path.realpath(os.path.join(self._root, folder))
                self._inside[folder] = os.path.commonpath([real, self._real]) == self._real
            if self._inside[folder]:
                self._check_root()
                raise Reject("missing_file", f"no such file below {self._root}") from None
        except OSError:
            return  # `resolve` says what is wrong


class BucketVideos:
    """Videos in a folder of a bucket. A file is copied to the local disk, with retries, and deleted after use."""

    def __init__(self, root: epath.Path, seconds: float | None = None):
        self._root, self._seconds, self._copies = root, seconds, Copies()
        self._hashes: np.ndarray | None = None  # int64[files], sorted: 8 bytes a file, where the names would need 100

    def present(self, name: str) -> bool:
        """Whether there is such an object. The first call lists the whole folder."""
        try:
            refuse_hostile(name)
            forms = _forms(name)
        except (Reject, UnicodeEncodeError):
            return False
        if self._hashes is None:
            self._hashes = np.sort(np.fromiter((hash(found) for found in self.names()), np.int64))
        for form in forms:
            at = int(np.searchsorted(self._hashes, hash(form)))
            if at < len(self._hashes) and self._hashes[at] == hash(form):
                return True
        return False

    def names(self) -> Iterator[str]:
        """Yield all objects, folder by folder: a listing of one folder is in memory at a time."""
        url = os.fspath(self._root)
        start = len(url.partition("://")[2]) + 1
        try:
            for folder, _, files in place_requests.files_of(self._root).walk(url, on_error="raise"):
                yield from (f"{folder}/{file}"[start:] for file in files if file)
        except FileNotFoundError:
            raise FileNotFoundError(f"{url}: no such folder; give the folder of the videos") from None
        except OSError:
            raise
        except Exception as error:  # fsspec's file systems raise errors of their own classes
            words = " ".join(str(error).split())
            raise OSError(f"{url}: cannot be listed ({words}); check the name and your permissions") from error

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Give a copy of the object. Its name ends as the object's does, since decoders look at the suffix."""
        refuse_hostile(name)
        with self._copies.new(name, f"{self._root}/{name}") as local:
            self._copy(name, local)
            yield local

    def close(self) -> None:
        """Delete the folder of the copies."""
        self._copies.close()

    def _copy(self, name: str, local: Path) -> None:
        try:
            forms = _forms(name)
        except UnicodeEncodeError:
            raise Reject("missing_file", "the name holds half a surrogate pair, which no file name does") from None
        for form in forms:
            try:
                return places.download(self._root / form, local, self._seconds)
            except FileNotFoundError:
                continue
        places.check_bucket(self._root)  # raises if it is the bucket that is missing
        raise Reject("missing_file", f"no such file below {self._root}")


def _forms(name: str) -> list[str]:
    """Return the spellings under which a file may be stored: plain, and in the Unicode normalisations NFC and NFD."""
    plain = str(PurePosixPath(name))
    plain.encode()
    return list(dict.fromkeys([plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)]))
