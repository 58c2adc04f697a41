"""Resolution of the file names of rows to files below the video root, with symbolic links and Unicode normalisation."""

import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ymplug_jax.data.video_container import Reject


def refuse_hostile(name: str) -> None:
    """Raise Reject("hostile_path") unless a name of a row is a path below the video root, without "..", so that it cannot leave it."""
    if not name or "\x00" in name or os.path.isabs(name) or ".." in name.split("/"):
        raise Reject("hostile_path", "must be a path below the video root, without '..'")


def resolve(video_root: str, name: str, allow_links_to: Sequence[str] = ()) -> Path:
    """Return the file of a row. It lies inside the video root or, through a symbolic link, inside a folder of `allow_links_to`.

    If no file has the exact name, a file with the same name in another Unicode normalisation is used (archives made on macOS
    contain decomposed names).

    Args:
      video_root: folder of the videos.
      name: path relative to it, from the row.
      allow_links_to: further folders that symbolic links may point to.

    Raises:
      Reject: hostile_path or missing_file.
    """
    refuse_hostile(name)
    root = Path(video_root).resolve()
    try:
        path = _spelled(root, name).resolve()
        found = path.is_file()
    except UnicodeEncodeError:
        raise Reject("missing_file", "the name holds half a surrogate pair, which no file name does") from None
    except (OSError, RuntimeError) as error:  # the name is too long, or links form a cycle
        raise Reject("missing_file", f"no such file below {video_root}: {getattr(error, 'strerror', error)}") from None
    if not any(path.is_relative_to(place) for place in (root, *(Path(to).resolve() for to in allow_links_to))):
        raise Reject(
            "hostile_path",
            "a symbolic link leads outside the video root; give --allow_links_to DIR to allow links below DIR",
        )
    if not found:
        raise Reject("missing_file", f"no such file below {video_root}")
    return path


def _spelled(root: Path, name: str) -> Path:
    """Return `root / name` with each part in the Unicode normalisation used on disk."""
    path = root
    for part in Path(name).parts:
        if not part.isascii() and not os.path.lexists(path / part):
            part = _names(str(path)).get(unicodedata.normalize("NFC", part), part)
        path /= part
    return path


@functools.lru_cache(maxsize=16)
def _names(folder: str) -> dict[str, str]:
    """Return {NFC name: name on disk} of the entries of a folder with names that are not ASCII."""
    try:
        names = sorted((name for name in os.listdir(folder) if not name.isascii()), reverse=True)
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names}
