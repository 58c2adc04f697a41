"""Selection of the rows of one part of a data set: those whose files are all among the part's files."""

import hashlib
import io
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from data_prep.build_flags import BuildError
from data_prep.conversations import Talk
from data_prep.rows import Row
from data_prep.videos import Videos
from ymplug_jax.core import places

FILE = "part-rows.npy"  # in the work folder; published as `parts.rows_name`


def files_of(row: Row | Talk) -> list[str]:
    """Return the files that a row names, as it names them; none for a conversation of text only."""
    return [row.media_id] if isinstance(row, Row) else [name for _, name in row.media]


def _present(videos: Videos, name: str) -> bool:
    try:
        return videos.present(name)
    except UnicodeEncodeError:  # half a surrogate pair, which no file name holds
        return False


class PartRows:
    """The rows of a part, found by a first pass over the CSV. Holds 4 bytes for each of them, whatever the size of the CSV."""

    def __init__(self, rows: Iterable[Row | Talk], videos: Videos, taken: np.ndarray, *, texts: bool = False):
        """Read all rows and find those of the part. A row with several files belongs to it if it has all of them.

        Args:
          rows: of the whole CSV.
          videos: the files of the part.
          taken: bool[n], whether another part has row i as a record already; such rows are left to it.
          texts: whether rows that name no file belong to this part.

        Raises:
          OSError: the place of the files cannot be read.
        """
        self._videos = videos
        self._numbers = array("I")
        self._wanted = ""  # an example of a file that a row names
        self._seen = self._left = 0
        for row in rows:
            self._seen += 1
            files = files_of(row)
            self._wanted = self._wanted or (files[0] if files else "")
            if not (all(_present(videos, name) for name in files) if files else texts):
                continue
            if row.number < len(taken) and taken[row.number]:
                self._left += 1
            else:
                self._numbers.append(row.number)

    def __len__(self) -> int:
        return len(self._numbers)

    def check(self, part: str, place: str) -> None:
        """Check that there are rows, and say how many are left to other parts.

        Args:
          part: name of the part.
          place: folder or archive of its files.

        Raises:
          BuildError: there are none.
        """
        if self._left and not self._numbers:
            raise BuildError(
                f"--part {part}: other parts have all {self._left:,} rows with files in {place}; leave this part out"
            )
        if not self._numbers:
            found = next(iter(self._videos.names()), "")
            there = f"{place} holds {found}" if found else f"{place} is empty"
            wanted = f"a row names {self._wanted}" if self._wanted else "no row names a file"
            raise BuildError(
                f"--part {part}: none of the {self._seen:,} rows has its file in this part ({wanted}, {there}); give as "
                "--video_root the folder that the paths of the rows start from"
            )
        left = f"; {self._left:,} more are in other parts already" if self._left else ""
        print(f"part {part}: {len(self):,} of {self._seen:,} rows have their files in {place}{left}", file=sys.stderr)

    def select(self, rows: Iterable[Row | Talk]) -> Iterator[Row | Talk]:
        """Yield the rows of the part, from all rows in the same order as before."""
        numbers = iter(self._numbers)
        wanted = next(numbers, -1)
        for row in rows:
            if row.number == wanted:
                yield row
                wanted = next(numbers, -1)

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says of the selection: rows of the whole CSV, and the SHA-256 of the rows of the part."""
        return {"csv_rows": self._seen, "rows_sha256": hashlib.sha256(self._array().tobytes()).hexdigest()}

    def save(self, work: epath.Path) -> None:
        """Write the rows of the part into the work folder, uint32[n], ascending. Raises OSError."""
        file = io.BytesIO()
        np.save(file, self._array())
        places.write_bytes(work / FILE, file.getvalue())

    def _array(self) -> np.ndarray:
        return np.array(self._numbers, np.uint32)
