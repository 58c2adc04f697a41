"""Requests to the file systems of buckets: which library answers, how long, how often, and what its errors mean."""

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec

from ymplug_jax.core.exits import PlaceFailed

T = TypeVar("T")
EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> its package and the extra that installs it
ATTEMPTS = 4  # of a request without an answer; the library repeats those that fail
QUIET_SECONDS = 120.0  # without an answer, the request is given up and repeated
for _scheme in ("gs", "gcs"):
    fsspec.register_implementation(_scheme, "ymplug_jax.core.bucket_store.Bucket", clobber=True)


def left(path: str | os.PathLike[str], end: float | None) -> float:
    """Return the seconds that a request may take. Raises TimeoutError if none are left."""
    if end is None:
        return QUIET_SECONDS
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError(f"{path}: not read within its time limit; raise the limit, or check the connection")
    return min(QUIET_SECONDS, left)


def asked(
    path: str | os.PathLike[str], done: str, ask: Callable[[fsspec.AbstractFileSystem], T], end: float | None = None
) -> T:
    """Return the answer of a store, asked again after cut connections and silence.

    Raises:
      FileNotFoundError: the store says that there is no such object or bucket.
      TimeoutError: `end` of time.monotonic has passed.
      OSError: anything else; one line, as some libraries raise errors of their own classes.
    """
    files = files_of(path)
    for attempt in range(ATTEMPTS):
        try:
            return ask(files)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:
            silent = isinstance(error, TimeoutError)
            if silent and end is not None:
                left(path, end)
            if silent and attempt < ATTEMPTS - 1:
                continue
            if isinstance(error, PlaceFailed):  # says all of it, with the name of the request
                raise OSError(" ".join(str(error).split())) from error
            words = " ".join(str(error).split()) or "no answer"
            raise OSError(
                f"{path}: cannot be {done} ({words}); check the name, your permissions and the connection"
            ) from error
    raise AssertionError("unreachable")


def files_of(path: str | os.PathLike[str]) -> fsspec.AbstractFileSystem:
    """Return the fsspec file system of a place in a bucket, which etils uses as well. It caches no listings."""
    for scheme, (package, _) in EXTRAS.items():
        # Where fsspec was imported before this package, its settings do not come from the environment.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
        logging.getLogger(package).setLevel(logging.CRITICAL)  # it logs a traceback for an error that it also raises
    return fsspec.filesystem(os.fspath(path).partition("://")[0])
