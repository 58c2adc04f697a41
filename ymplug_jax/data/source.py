"""Sources of examples: a folder of shards, or a text file for language modelling."""

from pathlib import Path

import numpy as np

from ymplug_jax.core import text_files
from ymplug_jax.data.records import Record, Records, Split


class Texts:
    """A UTF-8 text file as a split: one record with a title per line, without frames. Held in memory."""

    kind = "text"  # see `Split.kind`

    def __init__(self, path: str):
        """Read the file.

        Raises:
          FileNotFoundError: the file does not exist.
          ValueError: the file is not UTF-8, is a Git LFS pointer, or holds no text.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no such file; correct config.data.path")
        self._lines = [line.strip() for line in text_files.read_lines(file) if line.strip()]
        if not self._lines:
            raise ValueError(f"{path}: no text in it; write one text per line")
        self.path, self.split = path, "text"

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        return Record(f"{self.path}:{i + 1}", [], np.zeros(0, np.int64), self._lines[i], [], "", -1)


def open_split(path: str, split: str) -> Split:
    """Open a split of a data set. A path that ends in .txt is a text file, which is the same for every split."""
    return Texts(path) if path.endswith(".txt") else Records(path, split)
