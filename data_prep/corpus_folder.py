"""Whether a folder already holds a corpus that `draw_shapes` would draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def holds(out: Path, note: str, settings: Mapping[str, int], files: Sequence[str], *, how: str = "drawn") -> bool:
    """Return whether `out` holds a corpus with these settings and files; False if it is empty or missing.

    Args:
      out: the folder.
      note: name of the JSON file in it whose entry `settings` tells what was drawn.
      settings: settings of the corpus.
      files: names of its files, relative to `out`.
      how: "drawn" or "planted", for messages.

    Raises:
      FileExistsError: `out` holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / note).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out} exists and is not a corpus of draw_shapes; choose another --out") from None
    if found != settings:
        raise FileExistsError(
            f"{out} holds a corpus {how} with {found}, not {settings}; remove it or choose another --out"
        )
    missing = [name for name in files if not (out / name).is_file()]
    if missing:
        raise FileExistsError(
            f"{out} lacks {len(missing)} of its files, such as {missing[0]}; remove it and draw again"
        )
    return True
