"""Folder for temporary files of one process, deleted even if the process was killed: by the next process that makes one."""

import contextlib
import fcntl
import shutil
import tempfile
from pathlib import Path

PREFIX = "ymplug_jax-build-"
LOCK = "lock"


class Scratch:
    """A folder on the local disk (below TMPDIR) that belongs to this process while a file in it is locked.

    The operating system drops the lock when the process ends in whatever way, so a folder without a lock is left over.
    """

    def __init__(self) -> None:
        """Make the folder, and delete those that killed processes left. Raises OSError if the disk cannot be written."""
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.path / "new").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (self.path / "new").rename(self.path / LOCK)  # only now others see a lock, which is taken

    def close(self) -> None:
        """Delete the folder with all files in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep() -> None:
    """Delete the folders of processes that no longer run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("r") as lock:  # being made, of another user, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
