"""Sources of examples: folders of shards, or text files for language modelling, one or several joined."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ymplug_jax.core import places, text_files
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Record, Records, Split


class Joined:
    """The same split of several folders, one after the other."""

    def __init__(self, path: str, parts: Sequence[Split]):
        """Join the splits; `path` is `config.data.path`."""
        self.path, self.split, self.parts = path, parts[0].split, tuple(parts)
        kinds = {part.kind for part in parts}
        self.kind = kinds.pop() if len(kinds) == 1 else ""
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        """Read record i of the whole, 0 <= i < len.

        Raises:
          IndexError: i is out of range.
          CorruptRecord: the checksum or the content is wrong.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: record {i} is out of range; split {self.split!r} has {len(self)} records")
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[part][i - (int(self._ends[part - 1]) if part else 0)]


class Texts:
    """A UTF-8 text file as a split: one record with a title per line, without frames. Held in memory."""

    kind = "text"  # see `Split.kind`

    def __init__(self, path: str):
        """Read the file.

        Raises:
          FileNotFoundError: the file does not exist.
          ValueError: the file is not UTF-8, is a Git LFS pointer, or holds no text.
        """
        file = places.place(path, "config.data.path")
        if not file.exists():
            raise FileNotFoundError(f"{path}: no such file; correct config.data.path")
        self._lines = [line.strip() for line in text_files.read_lines(file) if line.strip()]
        if not self._lines:
            raise ValueError(f"{path}: no text in it; write one text per line")
        self.path, self.split = path, "text"

    def __len__(self) -> int:
        return len(self._lines)

    def text(self) -> bytes:
        """Return the texts, one per line, in UTF-8."""
        return "\n".join(self._lines).encode()

    def __getitem__(self, i: int) -> Record:
        return Record(f"{self.path}:{i + 1}", [], np.zeros(0, np.int64), self._lines[i], [], "", -1)


def folders_of(path: str) -> tuple[str, ...]:
    """Return the folders (or text files) that `config.data.path` names, separated by commas. Spaces around them are ignored.

    Raises:
      Mistake: a name between commas is empty or no place, or a folder is named twice.
    """
    names = tuple(name.strip() for name in path.split(",")) if "," in path else (path,)
    if len(names) > 1 and not all(names):
        raise Mistake(f"config.data.path: {path!r} has an empty name between commas; write DIR1,DIR2")
    keys = [name.rstrip("/") for name in names]
    if twice := next((name for name in keys if keys.count(name) > 1), None):
        raise Mistake(
            f"config.data.path: names {twice} twice; name it once, with a larger weight in config.data.weights"
        )
    for name in names:
        if name:
            places.place(name, "config.data.path")
    return names


def parts_of(records: Split) -> tuple[Split, ...]:
    """Return the splits of the single folders."""
    return records.parts if isinstance(records, Joined) else (records,)


def fingerprint(records: Split) -> str:
    """Return a hash of the split of one folder: of its index and the entry in its manifest, or of the text file's lines."""
    if isinstance(records, Records):
        return hashlib.sha256(records.facts()).hexdigest()
    if isinstance(records, Texts):
        return hashlib.sha256(records.text()).hexdigest()
    raise TypeError(f"{type(records).__name__} has no fingerprint")


def open_split(path: str, split: str) -> Split:
    """Open a split of one or several data sets. A path that ends in .txt is a text file, which is the same for every split.

    Raises:
      FileNotFoundError, ValueError: a folder or its split is missing or damaged; the message names it.
    """
    parts = [Texts(name) if name.endswith(".txt") else Records(name, split) for name in folders_of(path)]
    return parts[0] if len(parts) == 1 else Joined(path, parts)
