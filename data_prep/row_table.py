"""The table of all rows of a build: written once by the driver, read in slices by the workers.

`rows.jsonl` holds a row per line as a JSON array, in the order of the CSV, and `rows.npy` the byte offset at which each partition begins,
and the end: int64[partitions + 1]. A worker reads its partition with one ranged read, so nothing but the number of a partition passes
through Beam, and neither the driver nor Beam's graph grows with the rows.
"""

import errno
import io
import json
from array import array
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_prep.conversations import Talk
from data_prep.raw_rows import RawRow
from data_prep.rows import Row
from ymplug_jax.core import places
from ymplug_jax.data import schema

TABLE, OFFSETS = "rows.jsonl", "rows.npy"
RAW = "raw"  # kind of the rows of a curation, beside schema.KINDS
AnyRow = Row | Talk | RawRow
BUFFER = 1 << 20  # bytes
EXAMPLES = 3  # repeated files that the summary names


class Table(NamedTuple):
    """Facts of a table."""

    rows: int
    repeated: int  # files, or whole conversations, in more than one row
    examples: list[tuple[str, int]]  # (file, rows with it) of the first few of them


class DamagedTable(OSError):
    """The table does not hold what the driver wrote."""


def write_table(rows: Iterable[AnyRow], folder: Path) -> tuple[Table, np.ndarray]:
    """Write `rows.jsonl` into a local folder.

    Memory: 8 bytes a row for its offset, and 16 to count what is repeated, by 64-bit hashes. Two of 10 M rows share a hash by chance with a
    probability of 3 in a million, which would make a count wrong by one, and no record.

    Returns:
      (facts, offsets): int64[rows + 1], the byte at which each row begins, and the end.

    Raises:
      OSError: the folder cannot be written. Errors of `rows` pass through.
    """
    ends, hashes = array("q", [0]), array("q")
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    end = 0
    with (folder / TABLE).open("wb", BUFFER) as file:
        for number, row in enumerate(rows):
            # Names that no file has may hold half a surrogate pair; it must reach the worker, which rejects the row.
            end += file.write(f"{encode(row)}\n".encode("utf-8", "surrogatepass"))
            ends.append(end)
            hashes.append(hash(_identity(row, number)))
    offsets = np.frombuffer(ends, np.int64)
    count, first = _repeated(np.frombuffer(hashes, np.int64))
    with (folder / TABLE).open("rb") as file:
        named = []
        for number, times in first:
            file.seek(int(offsets[number]))
            named.append((str(json.loads(file.readline().decode("utf-8", "surrogatepass"))[1]), times))
    return Table(len(offsets) - 1, count, named), offsets


def _identity(row: AnyRow, number: int) -> object:
    """Return what makes a row a repetition of another one: its file, or its whole conversation unless it is rejected anyway."""
    if not isinstance(row, Talk):
        return row.media_id
    return (None, number) if row.problem else (row.text, row.media)


def _repeated(hashes: np.ndarray) -> tuple[int, list[tuple[int, int]]]:
    """Return how many values occur more than once, and (first position, count) of the first EXAMPLES of them."""
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    found: dict[int, tuple[int, int]] = {}
    for start in range(0, len(hashes) if len(again) else 0, BUFFER):
        piece = hashes[start : start + BUFFER]
        nearest = again[np.minimum(np.searchsorted(again, piece), len(again) - 1)]
        for at in np.flatnonzero(nearest == piece).tolist():
            value = int(piece[at])
            if value not in found:
                low, high = (int(np.searchsorted(ordered, value, side)) for side in ("left", "right"))
                found[value] = start + at, high - low
                if len(found) == min(EXAMPLES, len(again)):
                    return len(again), list(found.values())
    return len(again), list(found.values())


def write_offsets(offsets: np.ndarray, size: int, file: Path) -> int:
    """Write `rows.npy` for partitions of `size` rows and return their number. Raises OSError."""
    starts = offsets[: len(offsets) - 1 : size]
    np.save(file, np.append(starts, offsets[-1]))
    return len(starts)


def read_offsets(work: epath.Path) -> np.ndarray:
    """Return int64[partitions + 1]. Raises OSError."""
    try:
        found: np.ndarray = np.lib.format.read_array(io.BytesIO(places.read_bytes(work / OFFSETS)), allow_pickle=False)
    except ValueError as error:
        raise DamagedTable(errno.EIO, f"damaged ({error}); delete the folder and build again", str(work)) from None
    return found


def read_slice(work: epath.Path, kind: str, start: int, end: int, count: int) -> list[Any]:
    """Read the rows of a partition.

    Args:
      work: folder of the table.
      kind: one of schema.KINDS, or RAW.
      start: byte at which the partition begins.
      end: byte behind it.
      count: rows that it must have.

    Raises:
      DamagedTable: the bytes are not such rows.
      OSError: the table cannot be read.
    """
    lines = places.read_bytes(work / TABLE, start, end).decode("utf-8", "surrogatepass").split("\n")
    kinds: dict[str, Any] = {schema.INSTRUCT: Talk, RAW: RawRow}
    make = kinds.get(kind, Row)._make
    try:
        rows: list[Any] = [make(json.loads(line)) for line in lines[:-1]]
    except (ValueError, TypeError) as error:
        raise DamagedTable(errno.EIO, f"damaged ({error}); delete the folder and build again", str(work)) from None
    if lines[-1] or len(rows) != count or any(a.number >= b.number for a, b in pairwise(rows)):
        raise DamagedTable(errno.EIO, f"{TABLE} does not fit {OFFSETS}; delete the folder and build again", str(work))
    return rows
