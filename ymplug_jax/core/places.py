"""Files and folders that flags and settings name: local, gs://bucket/path, s3://bucket/path.

One library reads and writes them: `etils.epath`, on a bucket over fsspec (gcsfs, s3fs), never TensorFlow's own gs://
(`ymplug_jax/__init__.py` sets the switches). gcsfs repeats a request after 429, 500 to 504 and cut connections, up to six times within
about a minute. This module adds what the libraries lack: names are checked, copies are verified and have a time limit, and only an
answer "not found" counts as missing. A refusal, a name that does not resolve or a server that stays away raises an OSError here,
and `exits.PlaceFailed` in the methods of a gs:// path (see `core.bucket_store`).
"""

import contextlib
import importlib.util
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from etils import epath

from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.place_requests import EXTRAS, asked
from ymplug_jax.core.place_transfer import crc_of, fetch, verify, whole

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two characters or more: C:/ is a drive
KNOWN = (
    "file",
    "gs",
    "gcs",
    "s3",
    "s3a",
    "http",
    "https",
    "hdfs",
    "az",
    "abfs",
    "hf",
)  # also refused with a single slash
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def place(name: str, what: str) -> epath.Path:
    """Return the file or folder that a flag or setting names.

    Args:
      name: a local path, file:///path, gs://bucket/path or s3://bucket/path. "~" is the home folder.
      what: the flag or setting for messages, e.g. "--out" or "config.data.path"; "" if the caller knows none.

    Raises:
      Mistake: another scheme, a bucket's name that cannot be one, characters that a URL cannot hold, or a missing package.
    """
    name = str(name)
    said = f"{what} {name}".strip()
    if name.startswith("file://"):
        return epath.Path(name.removeprefix("file://")).expanduser()
    found = SCHEME.match(name)
    if not found or ("://" not in name and found[1].lower() not in KNOWN):
        return epath.Path(name).expanduser()
    scheme, double, rest = name.partition("://")
    if not double:
        fix = "gs" if found[1].lower() == "gcs" else found[1].lower()
        slashes = "///" if fix == "file" else "//"
        raise Mistake(f"{said}: not a place; write {fix}:{slashes}{name[found.end() :].lstrip('/')}")
    if scheme not in EXTRAS:
        raise Mistake(
            f"{what} {name}: {scheme}:// is not supported; give a local path, gs://BUCKET/PATH or s3://BUCKET/PATH"
        )
    bucket, _, path = rest.partition("/")
    if not BUCKET.fullmatch(bucket):
        raise Mistake(f"{said}: {bucket!r} is not a bucket's name; write {scheme}://BUCKET/PATH")
    bad = sorted({c for c in path if c in "?#*[]\\" or ord(c) < 32})
    if bad or ".." in path.split("/"):
        raise Mistake(
            f"{said}: a place in a bucket cannot hold {' '.join(map(repr, bad)) or repr('..')}; choose another name"
        )
    package, extra = EXTRAS[scheme]
    if importlib.util.find_spec(package) is None:
        raise Mistake(f"{said}: {scheme}:// needs the package {package}; run pip install 'ymplug_jax[{extra}]'")
    return epath.Path(name.rstrip("/"))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether the place lies in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in EXTRAS))


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file or folder. A folder in a bucket exists if an object lies below it.

    Raises:
      OSError: a bucket does not answer or refuses, or there is no such bucket; one line.
    """
    if not is_remote(path):
        return os.path.lexists(path)
    try:
        asked(path, "looked up", lambda files: files.info(os.fspath(path)))
    except FileNotFoundError:
        check_bucket(path)
        return False
    return True


def check_bucket(path: str | os.PathLike[str]) -> None:
    """Raise an OSError with one line unless the bucket of the place exists and can be listed. Local places pass."""
    if not is_remote(path):
        return
    bucket = "/".join(os.fspath(path).split("/")[:3])
    try:
        asked(path, "listed", lambda files: files.ls(bucket, detail=False))
    except FileNotFoundError:
        raise OSError(f"{path}: there is no bucket {bucket}; create it, or correct the name") from None


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return {name: bytes} of the files directly in a folder, in one listing that no cache answers; {} if there is no folder.

    Raises:
      NotADirectoryError: a file has this name.
      OSError: the listing failed, or there is no such bucket; one line.
    """
    if not is_remote(folder):
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
    url = os.fspath(folder).rstrip("/")
    try:
        found = asked(folder, "listed", lambda files: files.ls(url, detail=True, refresh=True))
    except FileNotFoundError:
        check_bucket(folder)
        return {}
    own = url.partition("://")[2]
    listed = {str(one["name"]): int(one["size"] or 0) for one in found if one["type"] == "file"}
    if own in listed:
        raise NotADirectoryError(f"{folder}: a file, not a folder; correct the name")
    return {name.rpartition("/")[2]: size for name, size in listed.items() if not name.endswith("/")}


def below(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return {path below the folder: bytes} of all files of a folder in a bucket, sorted; {"": bytes} for a file, {} for nothing.

    Raises:
      OSError: the listing failed, or there is no such bucket; one line.
    """
    url = os.fspath(folder).rstrip("/")
    try:
        found = asked(folder, "listed", lambda files: files.find(url, detail=True))
    except FileNotFoundError:
        found = {}
    if not found:
        check_bucket(folder)
    start = len(url.partition("://")[2]) + 1
    return {name[start:]: int(facts["size"] or 0) for name, facts in sorted(found.items()) if not name.endswith("/")}


def stamp(path: str | os.PathLike[str]) -> list[int]:
    """Return [size, modification time or generation] of a file, which differ after a change; [] if it does not exist.

    Raises:
      OSError: a bucket does not answer or refuses; one line.
    """
    try:
        if not is_remote(path):
            found = os.stat(path)
            return [found.st_size, found.st_mtime_ns]
        facts = asked(path, "looked up", lambda files: files.info(os.fspath(path)))
    except FileNotFoundError:
        return []
    changed = facts.get("generation") or facts.get("LastModified") or facts.get("mtime") or 0
    changed = changed.timestamp() * 1e9 if hasattr(changed, "timestamp") else changed
    return [int(facts["size"]), int(changed)]


def download(path: str | os.PathLike[str], local: Path, seconds: float | None = None) -> None:
    """Copy a file to a local one, replaced at once when all of it is there. Verifies length and, on gs://, the checksum.

    Args:
      path: the file, local or in a bucket.
      local: the copy; its folder exists.
      seconds: time limit of the whole copy; None: none, but a request without an answer is repeated after two minutes.

    Raises:
      FileNotFoundError: the file is missing.
      TimeoutError: the time limit has passed.
      OSError: the file cannot be read, or changed meanwhile; one line.
    """
    partial = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.partial")
    end = None if seconds is None else time.monotonic() + seconds
    try:
        if is_remote(path):
            fetch(path, partial, end)
        else:
            shutil.copyfile(path, partial)
        os.replace(partial, local)
    finally:
        partial.unlink(missing_ok=True)


def upload(local: Path, path: str | os.PathLike[str]) -> None:
    """Copy a local file to a file that appears at once and whole, and compare its size and, on gs://, its checksum.

    Raises:
      FileNotFoundError: the local file, or the bucket, is missing.
      OSError: the file cannot be written, or differs afterwards; one line.
    """
    if not is_remote(path):
        whole(Path(path), lambda partial: shutil.copyfile(local, partial))
        return
    url = os.fspath(path)
    size, crc = local.stat().st_size, crc_of(local)
    asked(path, "written", lambda files: files.put_file(str(local), url))
    verify(path, size, crc)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that appears at once and whole: a local file is renamed, an object is put in one upload.

    Raises:
      OSError: the file cannot be written; one line.
    """
    if not is_remote(path):
        whole(Path(path), lambda partial: partial.write_bytes(data))
        return
    url = os.fspath(path)
    asked(path, "written", lambda files: files.pipe_file(url, data))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, as `write_bytes` does. Line ends are kept."""
    write_bytes(path, text.encode("utf-8"))


def read_bytes(path: str | os.PathLike[str], start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes of a file, or those from `start` to before `end`. Fewer if the file is shorter.

    Raises:
      FileNotFoundError: the file is missing.
      OSError: the file cannot be read; one line.
    """
    if is_remote(path):
        url = os.fspath(path)
        if end is not None and end <= start:
            return b""
        data: bytes = asked(path, "read", lambda files: files.cat_file(url, start=start or None, end=end))
        return data
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else max(end - start, 0))


def delete(path: str | os.PathLike[str]) -> None:
    """Delete a file. A missing one is no error. Raises OSError with one line."""
    try:
        if is_remote(path):
            asked(path, "deleted", lambda files: files.rm_file(os.fspath(path)))
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def delete_folder(path: str | os.PathLike[str]) -> None:
    """Delete a folder with everything in it. A missing one is no error. Raises OSError with one line."""
    try:
        if is_remote(path):
            asked(path, "deleted", lambda files: files.rm(os.fspath(path), recursive=True))
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        pass


def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Move a file, replacing one at the target. Repeatable: a missing source with an existing target was moved before.

    In a bucket the service copies the object, then the source is deleted.

    Raises:
      FileNotFoundError: neither source nor target exists.
      OSError: a step failed, or the places lie in different stores; one line.
    """
    if is_remote(source) != is_remote(target):
        raise OSError(f"{source}: cannot be moved to {target}, which is another store; copy it instead")
    if not is_remote(source):
        try:
            os.replace(source, target)
        except FileNotFoundError:
            if not os.path.exists(target) or os.path.lexists(source):
                raise
        return
    old, new = os.fspath(source), os.fspath(target)
    try:
        facts = asked(source, "moved", lambda files: files.info(old))
    except FileNotFoundError:
        if not exists(target):
            raise FileNotFoundError(f"{source}: missing, and {target} too; write it again") from None
        return
    if facts["type"] == "directory":
        raise IsADirectoryError(f"{source}: a folder in a bucket cannot be moved; move its files")
    asked(source, "copied", lambda files: files.cp_file(old, new))
    verify(target, int(facts["size"]), facts.get("crc32c"))
    with contextlib.suppress(FileNotFoundError):  # a repeated request: the first one deleted it
        asked(source, "deleted", lambda files: files.rm_file(old))
