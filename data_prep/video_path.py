"""Which file a row of a CSV means: below the video root, whatever links and spellings of Unicode are in the way."""

import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ymplug_jax.data.video_container import Reject


def resolve(video_root: str, name: str, allow_links_to: Sequence[str] = ()) -> Path:
    """The file of a row, certainly inside the video root or, by a symbolic link, inside a folder of `allow_links_to`.

    A name is taken as it stands where there is such a file; else the file of the same name in another Unicode
    normalization is (archives made on macOS hold decomposed names).

    Raises:
      Reject: hostile_path, missing_file.
    """
    if not name or "\x00" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise Reject("hostile_path", "the FILE column must be a path below the video root, without '..'")
    root = Path(video_root).resolve()
    try:
        path = _spelled(root, name).resolve()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a circle of links
        raise Reject("missing_file", f"no such file below {video_root}: {getattr(error, 'strerror', error)}") from None
    if not any(path.is_relative_to(place) for place in (root, *(Path(to).resolve() for to in allow_links_to))):
        raise Reject("hostile_path", "a link leads outside the video root; --allow_links_to DIR allows links below DIR")
    if not found:
        raise Reject("missing_file", f"no such file below {video_root}")
    return path


def _spelled(root: Path, name: str) -> Path:
    """`root / name`, each part spelled as on the disk."""
    path = root
    for part in Path(name).parts:
        if not part.isascii() and not os.path.lexists(path / part):
            part = _names(str(path)).get(unicodedata.normalize("NFC", part), part)
        path /= part
    return path


@functools.lru_cache(maxsize=16)
def _names(folder: str) -> dict[str, str]:
    """Composed name -> name on the disk, of everything in a folder whose name is not ASCII."""
    try:
        names = sorted((name for name in os.listdir(folder) if not name.isascii()), reverse=True)
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names}
