"""The file system behind gs:// paths of etils, Orbax and TFDS: gcsfs, whose failures cannot be taken for missing files.

gcsfs answers `isdir` with False after a refusal or a lost connection, and its errors are of many classes, some of them an OSError that
careful readers of optional files pass over. A run that takes such an answer for "no checkpoint" starts from scratch. Here every
failure that is not "not found" is a PlaceFailed, after the repetitions of gcsfs. `core.place_requests` registers this class with fsspec.
"""

import functools
import logging
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import gcsfs
from fsspec import asyn

from ymplug_jax.core.exits import PlaceFailed

logging.getLogger("gcsfs").setLevel(
    logging.CRITICAL
)  # it logs each open file, and a traceback for an error that it also raises
logging.getLogger("fsspec").setLevel(logging.WARNING)  # it logs each file that is opened
# What fsspec calls of an asynchronous file system; each becomes a method without the underscore.
GUARDED = (
    "_info", "_ls", "_find", "_cat_file", "_pipe_file", "_put_file", "_get_file", "_cp_file", "_rm_file", "_rm", "_mkdir",
)  # fmt: skip


def _failed(path: object, error: BaseException) -> PlaceFailed:
    words = " ".join(str(error).split()) or type(error).__name__
    return PlaceFailed(
        f"{path}: the bucket cannot be used ({words}); check its name, your permissions and the connection, then run the same command again"
    )


def _place_in(url: str, args: tuple[Any, ...]) -> str:
    """Return the place that a request names: in its arguments (bucket, object), or in the address of an upload."""
    if args:
        return "gs://" + "/".join(map(str, args[:2]))
    found = re.search(r"/b/([^/?]+)/o(?:\?name=([^&]+))?", url)
    return "/".join(["gs:/", *(urllib.parse.unquote(part) for part in found.groups() if part)]) if found else url


def _guarded(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(method)
    async def ask(self: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(self, path, *args, **kwargs)
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, NotImplementedError):
            raise
        except PlaceFailed:
            raise
        except Exception as error:
            raise _failed(path if "://" in str(path) else f"gs://{path}", error) from error

    return ask


class Bucket(gcsfs.GCSFileSystem):
    """gcsfs with PlaceFailed for whatever is neither an answer nor "not found"."""

    async def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        """Send a request. Uploads of open files come here without passing a method of `GUARDED`."""
        try:
            return await super()._call(method, path, *args, **kwargs)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            if method == "GET":  # the caller is guarded, and may ask in another way first
                raise
            raise _failed(_place_in(path, args), error) from error

    call = asyn.sync_wrapper(_call)


for _name in GUARDED:
    setattr(Bucket, _name, _guarded(getattr(gcsfs.GCSFileSystem, _name)))
