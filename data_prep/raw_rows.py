"""The listing of raw uploads that a curation starts from: a CSV or Parquet table with `video_id:FILE`, `title` and optionally `source`."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from data_prep.tables import check_header, read_lines, read_table

FILE, TITLE, SOURCE = "video_id:FILE", "title", "source"
BATCH = 4096  # rows of a Parquet file that are in memory at a time


class RawRow(NamedTuple):
    """One upload. A row with a `problem` is dropped for `bad_row`."""

    number: int  # 0-based, without the header
    media_id: str
    title: str
    source: str  # "" if the listing does not tell
    problem: str


def is_parquet(listing: Path) -> bool:
    """Whether the name says that the listing is a Parquet file."""
    return listing.suffix.lower() == ".parquet"


def iter_raw(listing: Path) -> Iterator[RawRow]:
    """Yield the rows of a listing, one after the other.

    Raises:
      ValueError: the file has no rows, lacks a column, or has an error that `tables.read_table` reports.
    """
    number = -1
    for number, (_, header, fields) in enumerate(_fields(listing)):
        by_name = dict(zip(header, fields, strict=False))
        problem = ""
        if len(fields) != len(header):
            problem = f"{len(fields)} fields, but the header has {len(header)}; check the commas and quotes"
        elif any("\x00" in field for field in fields):
            problem = "the row contains a NUL character"
        file, title, source = (by_name.get(name, "").strip() for name in (FILE, TITLE, SOURCE))
        yield RawRow(number, file, title, source, problem)
    if number < 0:
        raise ValueError(f"{listing}: no rows after the header; give a listing with at least one row")


def has_source(listing: Path) -> bool:
    """Whether the listing has a column `source`. Raises as `iter_raw`."""
    return any(SOURCE in header for _, header, _ in _first(listing))


def _first(listing: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    for found in _fields(listing):
        yield found
        return


def _fields(listing: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield (line, header, fields) of each row; the line of a Parquet row is its number."""
    if is_parquet(listing):
        yield from _parquet(listing)
        return
    table = read_table(listing, (FILE, TITLE), (FILE,))
    _, header = next(table)
    if header.count(SOURCE) > 1:
        raise ValueError(f"{listing}: column {SOURCE!r} occurs {header.count(SOURCE)} times in the header; keep one")
    for line, fields in table:
        yield line, header, fields


def _parquet(listing: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(listing) as file:
            header = list(file.schema_arrow.names)
            check_header(listing, header, (FILE, TITLE))
            line = 0
            for batch in file.iter_batches(BATCH):
                columns = [batch.column(i).to_pylist() for i in range(len(header))]
                for fields in zip(*columns, strict=True):
                    yield line, header, ["" if field is None else str(field) for field in fields]
                    line += 1
    except pa.ArrowException as error:
        raise ValueError(f"{listing}: no Parquet file that can be read ({error}); give a CSV or Parquet file") from None


def write_kept(listing: Path, kept: Iterator[bool], stream: TextIO) -> None:
    """Write the header and the kept rows of a listing as CSV: the lines of a CSV as they stand (blank ones too), a Parquet file's with minimal quotes.

    Args:
      listing: as read by `iter_raw`.
      kept: of each row.
      stream: text file with newline="".
    """
    if is_parquet(listing):
        writer = csv.writer(stream, lineterminator="\n")
        for number, ((_, header, fields), keep) in enumerate(zip(_fields(listing), kept, strict=True)):
            if number == 0:
                writer.writerow(header)
            if keep:
                writer.writerow(fields)
        return
    starts = (line for line, _, _ in _fields(listing))
    following = next(starts, 0)
    write = True  # the header
    for number, line in enumerate(read_lines(listing), 1):
        if number == following:
            write, following = next(kept), next(starts, 0)
        if write:
            stream.write(f"{line}\n")
