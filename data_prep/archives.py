"""Videos in a .zip or .tar archive, read without unpacking it.

`open_archive` returns an object like those of `videos.open_videos`. A .tar is indexed once, by reading the header of each member, and
members are then read by their offset. A .zip has an index of its own. Archives in a bucket are read by ranges.
Names are those of the members without a leading "./". Members whose names are absolute or hold "..", links, devices and sparse files
are left out: no name in an archive leads to a place outside it.
"""

import contextlib
import errno
import io
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

import numpy as np
from etils import epath

from data_prep.names import Names, keys_of
from data_prep.video_copies import Copies
from ymplug_jax.core import place_requests, places
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_path import refuse_hostile

COMPRESSED = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.lzma",
)  # fmt: skip
OTHERS = (".7z", ".rar")
BLOCK = tarfile.BLOCKSIZE
COPY = 2**20  # bytes copied at a time
AHEAD = 2**16  # bytes that a request to a bucket reads beyond those asked for


class BadArchive(ValueError):
    """An archive that cannot be read as a whole. The message names it and the fix."""


class Member(NamedTuple):
    """A regular file of a tar."""

    name: str
    offset: int  # of its content
    size: int


def is_archive(name: str) -> bool:
    """Whether a path names an archive, by its ending. Archives that cannot be read are archives too, see `check_kind`."""
    return name.lower().endswith((".zip", ".tar", *COMPRESSED, *OTHERS))


def check_kind(name: str) -> None:
    """Raise BadArchive for an archive of a kind from which single files cannot be read."""
    if name.lower().endswith(COMPRESSED):
        raise BadArchive(
            f"{name}: a compressed tar has to be unpacked to the last file for each one; unpack it into a folder, or decompress it to a .tar"
        )
    if name.lower().endswith(OTHERS):
        raise BadArchive(f"{name}: only .zip and .tar archives are read; unpack it into a folder")


def safe_name(name: str) -> str:
    """Return the name of a member as rows give it, relative and without "./"; "" for one that is absolute or holds ".."."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\x00" in name or "\\" in name:
        return ""
    return "" if str(path) == "." else str(path)


class Tar:
    """Files of an uncompressed tar."""

    def __init__(self, path: epath.Path, index: epath.Path | None = None):
        """Index the archive, or load its index.

        Args:
          path: the archive.
          index: file of `save_index`; None: read the headers of all members.

        Raises:
          BadArchive: the archive is damaged or cut off.
          OSError: it cannot be read.
        """
        self._path, self._copies, self.skipped = path, Copies(), list[str]()
        if index is not None:
            table = np.lib.format.read_array(io.BytesIO(places.read_bytes(index)), allow_pickle=False)
        else:
            members = list(self._members(self.skipped))
            table = np.empty((len(members), 4), np.int64)
            table[:, :2] = keys_of(member.name for member in members).view(np.int64)
            table[:, 2:] = np.array([member[1:] for member in members], np.int64).reshape(-1, 2)
        self._table = table
        self._names = Names(np.ascontiguousarray(table[:, :2]).view(np.uint64))

    def save_index(self, path: epath.Path) -> None:
        """Write the index, int64[n, 4]: key (two columns), offset and bytes of each file. Raises OSError."""
        file = io.BytesIO()
        np.save(file, self._table)
        places.write_bytes(path, file.getvalue())

    def names(self) -> Iterator[str]:
        """Yield the names of all files, by reading the headers."""
        return (member.name for member in self._members([]))

    def present(self, name: str) -> bool:
        """Whether the archive holds a file of that name, in either Unicode normal form."""
        return self._names.places([name])[0] >= 0

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Copy a file to a temporary one for the time of a `with` block.

        Raises:
          Reject: missing_file or hostile_path.
          OSError: the archive cannot be read or has become shorter, or the copy cannot be written.
        """
        offset, size = (int(value) for value in self._table[_place(self._names, name, self._path), 2:])
        with self._copies.new(name, f"{self._path}:{name}") as copy:
            with _open(self._path) as archive, copy.open("wb") as target:
                archive.seek(offset)
                left = size
                while left and (data := archive.read(min(left, COPY))):
                    left -= target.write(data)
            if left:
                raise OSError(errno.EIO, "has become shorter during the build", str(self._path))
            yield copy

    def close(self) -> None:
        """Delete temporary files."""
        self._copies.close()

    def _members(self, skipped: list[str]) -> Iterator[Member]:
        """Yield all regular files; names of the others are appended to `skipped`."""
        with _open(self._path) as file:
            end, last = file.seek(0, 2), "its start"
            file.seek(0)
            tar = _reader(file, self._path)
            offset = 0
            while True:
                file.seek(offset)
                block = file.read(BLOCK)
                if len(block) < BLOCK:
                    raise BadArchive(f"{self._path}: cut off after {last}; download or make the archive again")
                if not any(block):
                    return
                file.seek(offset)
                try:
                    info = tarfile.TarInfo.fromtarfile(tar)
                except (tarfile.TarError, ValueError, OverflowError):
                    raise BadArchive(
                        f"{self._path}: damaged at byte {offset}, after {last}; download or make the archive again"
                    ) from None
                if info.issparse():
                    raise BadArchive(
                        f"{self._path}: {info.name} is stored as a sparse file; make the archive without --sparse"
                    )
                has_data = not (info.issym() or info.islnk() or info.isdir() or info.isdev())
                offset = info.offset_data + (-(-info.size // BLOCK) * BLOCK if has_data else 0)
                if offset > end:
                    raise BadArchive(f"{self._path}: cut off inside {info.name}; download or make the archive again")
                last, name = info.name, safe_name(info.name)
                if info.isreg() and name:
                    yield Member(name, info.offset_data, info.size)
                elif not info.isdir():
                    skipped.append(info.name)


class Zip:
    """Files of a zip."""

    def __init__(self, path: epath.Path):
        """Read the index of the archive.

        Raises:
          BadArchive: the archive is damaged, cut off or encrypted.
          OSError: it cannot be read.
        """
        self._path, self._copies, self.skipped = path, Copies(), list[str]()
        self._archive = _zip(path)  # stays open: opening it reads its whole index
        self._infos: list[zipfile.ZipInfo] = []
        for info in self._archive.infolist():
            if info.flag_bits & 1:
                raise BadArchive(f"{path}: {info.filename} is encrypted; unpack the archive into a folder")
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            if info.is_dir():
                continue
            if safe_name(info.filename) and kind in (0, stat.S_IFREG):
                self._infos.append(info)
            else:
                self.skipped.append(info.filename)
        self._names = Names.of(self.names())

    def names(self) -> Iterator[str]:
        """Yield the names of all files."""
        return (safe_name(info.filename) for info in self._infos)

    def present(self, name: str) -> bool:
        """Whether the archive holds a file of that name, in either Unicode normal form."""
        return self._names.places([name])[0] >= 0

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Copy a file to a temporary one for the time of a `with` block. Its checksum is verified.

        Raises:
          Reject: missing_file, hostile_path, or "unreadable" if the archive is damaged there.
          OSError: the archive cannot be read, or the copy not be written.
        """
        info = self._infos[_place(self._names, name, self._path)]
        with self._copies.new(name, f"{self._path}:{name}") as copy:
            try:
                with self._archive.open(info) as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target, COPY)
            except (EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise Reject("unreadable", f"damaged in {self._path} ({error}); download the archive again") from None
            except NotImplementedError as error:
                raise Reject("unreadable", f"{self._path}: {error}; unpack the archive into a folder") from None
            yield copy

    def close(self) -> None:
        """Close the archive and delete temporary files."""
        self._archive.close()
        self._copies.close()


def open_archive(path: epath.Path, index: epath.Path | None = None) -> Tar | Zip:
    """Open an archive; `index` is that of a tar, see `Tar`. Raises BadArchive or OSError."""
    check_kind(str(path))
    return Zip(path) if path.name.lower().endswith(".zip") else Tar(path, index)


def _place(names: Names, name: str, path: epath.Path) -> int:
    refuse_hostile(name)
    place = int(names.places([name])[0])
    if place < 0:
        raise Reject("missing_file", f"no such file in {path}")
    return place


def _open(path: epath.Path) -> IO[bytes]:
    """Open an archive for reading. In a bucket, a read is a ranged request."""
    if not places.is_remote(path):
        return open(path, "rb")
    url = os.fspath(path)
    return cast("IO[bytes]", place_requests.files_of(path).open(url, "rb", block_size=AHEAD, cache_type="readahead"))


def _zip(path: epath.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(_open(path))
    except zipfile.BadZipFile as error:
        raise BadArchive(f"{path}: cut off or damaged ({error}); download or make the archive again") from None


def _reader(file: IO[bytes], path: epath.Path) -> tarfile.TarFile:
    """A TarFile for `TarInfo.fromtarfile`, which neither keeps the members it reads nor looks at the others."""
    try:
        return tarfile.TarFile(fileobj=file, encoding="utf-8")
    except tarfile.TarError as error:
        raise BadArchive(f"{path}: not a tar archive ({error}); download or make the archive again") from None
