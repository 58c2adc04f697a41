"""The steps of copies from and to buckets: reading in blocks, checksums, files that appear at once."""

import base64
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ymplug_jax.core.place_requests import asked, left

BLOCK = 16 << 20  # bytes read per request of a download


def fetch(path: str | os.PathLike[str], partial: Path, end: float | None) -> None:
    """Read an object into a local file in blocks, until `end` of time.monotonic, and verify length and checksum.

    Raises:
      FileNotFoundError, IsADirectoryError, TimeoutError, OSError: as `places.download`.
    """
    import google_crc32c

    url = os.fspath(path)
    facts = asked(path, "read", lambda files: files.info(url, timeout=left(path, end)), end)
    if facts["type"] == "directory":
        raise IsADirectoryError(f"{path}: a folder, not a file; give a file in it")
    size, crc = int(facts["size"]), 0
    with partial.open("wb") as file:
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            block = asked(
                path,
                "read",
                lambda files, a=start, b=stop: files.cat_file(url, start=a, end=b, timeout=left(path, end)),  # type: ignore[misc]
                end,
            )
            if len(block) != stop - start:
                raise OSError(f"{path}: cannot be read (byte {start + len(block)} of {size} is its end); run it again")
            crc = google_crc32c.extend(crc, block)
            file.write(block)
    if (told := facts.get("crc32c")) and base64.b64decode(told) != crc.to_bytes(4, "big"):
        raise OSError(
            f"{path}: its bytes do not have its checksum; it changed while it was read, or is damaged: run it again"
        )


def verify(path: str | os.PathLike[str], size: int, crc: str | None) -> None:
    """Compare size and checksum (base64, as gs:// states it) of an object with the expected ones."""
    facts = asked(path, "read", lambda files: files.info(os.fspath(path)))
    told = facts.get("crc32c")
    if int(facts["size"]) != size or (crc and told and told != crc):
        raise OSError(
            f"{path}: differs from what was written; another program writes there, or the copy failed: run it again"
        )


def crc_of(local: Path) -> str:
    """Return the CRC-32C of a local file as gs:// states it: base64 of 4 bytes, most significant first."""
    import google_crc32c

    crc = 0
    with local.open("rb") as file:
        while block := file.read(BLOCK):
            crc = google_crc32c.extend(crc, block)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a local file beside its place and rename it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:  # name the file, not its temporary one
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        partial.unlink(missing_ok=True)
