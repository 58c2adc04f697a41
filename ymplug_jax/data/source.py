"""Where examples come from: a folder of shards, or a plain text file for language modelling."""

from pathlib import Path

import numpy as np

from ymplug_jax.core import text_files
from ymplug_jax.data.records import Record, Records, Split


class Texts:
    """A UTF-8 text file as records: one title a line, nothing else. Held in memory."""

    kind = "text"  # as `Records.kind`

    def __init__(self, path: str):
        """Read the file.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not UTF-8, a Git LFS pointer, or no text in it.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no such text file; set config.data.path")
        self._lines = [line.strip() for line in text_files.read_lines(file) if line.strip()]
        if not self._lines:
            raise ValueError(f"{path}: no text in it")
        self.path, self.split = path, "text"

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        return Record(f"{self.path}:{i + 1}", [], np.zeros(0, np.int64), self._lines[i], [], "", -1)


def open_split(path: str, split: str) -> Split:
    """The records of a split of a data set; a path that ends in .txt is one text file, whatever the split."""
    return Texts(path) if path.endswith(".txt") else Records(path, split)
