"""A lock file that keeps two conversions out of one folder. It names the process and the host that write there."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ymplug_jax.core import exits

FILE = ".convert.lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is created if it is missing.

    The lock is removed at the end, and with it the folders created here that are still empty. A lock of a process that no longer
    runs on this host is taken over.

    Args:
      folder: `--out`, or the folder of the file that `--out` names.

    Raises:
      exits.Mistake: another process holds the lock, or the folder cannot be written.
    """
    file, owner = folder / FILE, _owner(os.getpid())
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        if created:
            folder.mkdir(parents=True, exist_ok=True)
        _take(file, owner)
    except OSError as error:
        _remove_empty(created)
        raise exits.Mistake(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _parsed(file.read_text(encoding="utf-8")) == owner:
                file.unlink()
        _remove_empty(created)


def _owner(process: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": process, "started": _started(process)}


def _started(process: int) -> str:
    """Start time of a process in clock ticks since boot, which tells it from a later one with its number; "" if unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]  # Z: a zombie, ended but not yet collected by its parent


def _take(file: Path, owner: Mapping[str, Any]) -> None:
    """Write `owner` into the lock file, unless a running process holds it."""
    while True:
        with file.open("a+", encoding="utf-8") as stream:
            # Makes reading and writing one step on this host. A file system without flock leaves only the file's content.
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_current(file, stream.fileno()):
                continue  # removed by its holder after it was opened here
            stream.seek(0)
            other = _parsed(stream.read())
            if other and _running(other):
                raise exits.Mistake(
                    f"--out {file.parent}: process {other['process']} on {other['host']} is converting into this folder; wait for "
                    f"it, or remove {file} if that process is gone"
                )
            stream.truncate(0)
            stream.write(json.dumps(owner) + "\n")
            return


def _is_current(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _parsed(text: str) -> dict[str, Any] | None:
    """The owner that a lock file names; None for a line that a kill cut short."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner.keys() == {"host", "process", "started"} else None


def _running(owner: Mapping[str, Any]) -> bool:
    """Whether the process is there. One on another host cannot be asked and counts as running."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs under another user
        pass
    return bool(owner == _owner(owner["process"]))


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
