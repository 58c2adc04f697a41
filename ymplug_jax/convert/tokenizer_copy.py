"""A copy of the tokenizer that lies beside the weights, for models that are used without a run."""

from collections.abc import Sequence
from pathlib import Path

NAME = "tokenizer.json"
FOLDER = "tokenizer"  # as in the folder of a run


def keep(files: Sequence[Path], out: Path) -> str:
    """Copy the tokenizer of a source into a conversion, whole or not at all; an older copy is replaced.

    Args:
      files: of the source.
      out: folder of the conversion.

    Returns:
      What was done, in one line.
    """
    found = next((file.parent / NAME for file in files if (file.parent / NAME).is_file()), None)
    if found is None:
        return f"{files[0].parent}: no {NAME}; give predict chat the source model's with --tokenizer"
    copy = out / FOLDER / NAME
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f".{NAME}.part")
    try:
        partial.write_bytes(found.read_bytes())
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
    return f"tokenizer: {copy}"
