"""Selection of the rows of one part of a data set: those whose files are all among the part's files."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from data_prep.build_flags import BuildError
from data_prep.conversations import Talk
from data_prep.rows import Row
from data_prep.videos import Videos

Line = TypeVar("Line", Row, Talk)


def files_of(row: Row | Talk) -> list[str]:
    """Return the files that a row names, as it names them; none for a conversation of text only."""
    return [row.media_id] if isinstance(row, Row) else [name for _, name in row.media]


class PartRows:
    """The rows of a part. Holds 4 bytes for each selected row, whatever the size of the CSV."""

    def __init__(self, part: str, place: str, videos: Videos, taken: np.ndarray, *, texts: bool = False):
        """Prepare the selection.

        Args:
          part: name of the part, for messages.
          place: folder or archive of its files, for messages.
          videos: the files.
          taken: bool[n], whether another part has row i as a record already; such rows are left to it.
          texts: whether rows that name no file belong to this part.
        """
        self._part, self._place, self._videos, self._texts = part, place, videos, texts
        self._taken = taken
        self._numbers = array("I")
        self._wanted = ""  # an example of a file that a row names
        self.seen = 0  # rows of the CSV
        self.left = 0  # rows whose files are here, but which another part has

    def select(self, rows: Iterable[Line]) -> Iterator[Line]:
        """Yield the rows of the part, in order. A row with several files belongs to it if it has all of them.

        Raises:
          OSError: the place of the files cannot be read.
        """
        present = self._videos.present
        for row in rows:
            self.seen += 1
            files = files_of(row)
            self._wanted = self._wanted or (files[0] if files else "")
            if all(map(present, files)) if files else self._texts:
                if row.number < len(self._taken) and self._taken[row.number]:
                    self.left += 1
                    continue
                self._numbers.append(row.number)
                yield row

    @property
    def numbers(self) -> np.ndarray:
        """Rows of the CSV selected so far, uint32[n], ascending."""
        return np.array(self._numbers, np.uint32)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of the selection, after all rows: rows of the whole CSV, and the SHA-256 of `numbers`.

        Raises:
          BuildError: no row belongs to the part.
        """
        if self.left and not self._numbers:
            raise BuildError(
                f"--part {self._part}: other parts have all {self.left:,} rows with files in {self._place}; leave this part out"
            )
        if not self._numbers:
            found = next(iter(self._videos.names()), "")
            there = f"{self._place} holds {found}" if found else f"{self._place} is empty"
            wanted = f"a row names {self._wanted}" if self._wanted else "no row names a file"
            raise BuildError(
                f"--part {self._part}: none of the {self.seen:,} rows has its file in this part ({wanted}, {there}); give as "
                "--video_root the folder that the paths of the rows start from"
            )
        return {"csv_rows": self.seen, "rows_sha256": hashlib.sha256(self.numbers.tobytes()).hexdigest()}
