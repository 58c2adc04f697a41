"""Exit codes of the programs, read by the launch scripts, and the errors that cause them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

MISTAKE = 2  # wrong settings, flags, paths or data; the same command fails again, so launch scripts do not retry
DOES_NOT_FIT = 3  # --mode compile: the step needs more memory than a device has
LOST = 4  # another process of the run did not join, or has exited
PLACE = 5  # a disk, folder or bucket failed during a run; launch scripts retry a limited number of times
STOPPED = 130  # Ctrl-C with nothing to save; 128 + SIGINT, as shells report it


class Mistake(ValueError):
    """An error that the user can fix. The message is one line that names the file or setting and the fix; exit code MISTAKE."""


class PlaceFailed(RuntimeError):
    """Storage that worked at the start failed later, e.g. a shard vanished or a disk is full. One-line message; exit code PLACE."""


def chain_of(error: BaseException) -> list[BaseException]:
    """Return the error and what led to it, the newest first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def place_failed(error: BaseException) -> PlaceFailed | None:
    """Return the PlaceFailed that an error of a library hides, as Orbax wraps errors of its threads; None if there is none."""
    return next((one for one in chain_of(error) if isinstance(one, PlaceFailed)), None)


@contextlib.contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Turn operating system errors of the block, which writes the file of a flag such as "--out", into PlaceFailed."""
    try:
        yield
    except OSError as error:
        raise PlaceFailed(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another {flag}, then run the same command again"
        ) from None
