"""Strict parsing of CSV and line files: strict quotes, lines end at "\\n" only, errors name the line."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

LONGEST_FIELD = 131_072  # characters; a longer field probably contains other rows
FILE_NAME = re.compile(r"\S.*\.(?=[0-9]*[A-Za-z])[0-9A-Za-z]{1,5}$")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without "\\n" or "\\r\\n". A byte order mark is dropped.

    Raises:
      ValueError: the file is not UTF-8; the message names the file and line.
      OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8-sig", newline="\n") as stream:
        try:
            for line in stream:
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise ValueError(not_utf8(path)) from None


def not_utf8(path: Path) -> str:
    """Return the error for a file that is not UTF-8: the line and the likely encoding."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return f"{path}: not UTF-8 but UTF-16; save it as UTF-8"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                guess = " (it may be GBK, as Excel saves)" if _decodes(line, "gb18030") else ""
                return f"{path}, line {number}: not UTF-8 at byte {error.start} of the line{guess}; save it as UTF-8"
    return f"{path}: not UTF-8; save it as UTF-8"


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def read_table(path: Path, columns: Sequence[str], file_columns: Sequence[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of a CSV: the header, then every row that is not blank.

    A quoted field may span several lines, but none of its continuation lines may look like a row, i.e. have a file name in the
    position of the file column; otherwise a missing quote would silently merge rows.

    Args:
      path: path of the CSV.
      columns: columns that the header must have.
      file_columns: possible names of the column of video files.

    Raises:
      ValueError: the file is not UTF-8 or empty, a column is missing or repeated, or a quote is unbalanced. The message names the
        file and line.
    """
    lines: list[str] = []  # of the row being read

    def numbered() -> Iterator[str]:
        for line in read_lines(path):
            lines.append(line)
            yield line + "\n"

    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(numbered(), strict=True)
    place, header = -1, None
    while True:
        start = reader.line_num + 1
        lines.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(_csv_error(path, start, reader.line_num, str(error))) from None
        if fields is None:
            break
        if not fields:
            continue
        if header is None:
            header = fields
            check_header(path, header, columns)
            place = next((i for i, name in enumerate(header) if name in file_columns), -1)
        elif len(lines) > 1:
            _check_nothing_swallowed(path, start, lines, fields, place)
        yield start, fields
    if header is None:
        raise ValueError(f"{path}: empty; write a header{' of ' + ','.join(columns) if columns else ''} and rows")


def check_header(path: Path, header: list[str], columns: Sequence[str]) -> None:
    """Raise ValueError if one of `columns` is missing or repeated in the header."""
    for name in columns:
        if header.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} occurs {header.count(name)} times in the header; keep one")
        if name not in header:
            found = ", ".join(header)
            marks = [mark for mark in (";", "\t") if len(header) == 1 and mark in found]
            hint = f"; its separator is {marks[0]!r}, so save it with commas" if marks else "; rename or add the column"
            raise ValueError(f"{path}: no column {name!r} among {found}{hint}")


def _csv_error(path: Path, start: int, end: int, error: str) -> str:
    """Translate an error of the csv module into a message that says where to look."""
    fixes = {
        "unexpected end of data": "a quoted field does not end, because of a missing or an extra quote",
        "expected after": "text follows a closing quote, because of an extra quote, or a quote in a field that is not doubled",
        "field larger": f"a field has more than {LONGEST_FIELD:,} characters, because of a missing or an extra quote",
        "new-line character": "a carriage return inside a line; use \\n or \\r\\n as line ends",
    }
    what = next((text for mark, text in fixes.items() if mark in error), error)
    where = f"line {start}" if end <= start else f"lines {start} to {end}"
    return f"{path}, {where}: {what}; correct line {start}"


def _check_nothing_swallowed(path: Path, start: int, lines: list[str], fields: list[str], place: int) -> None:
    """Raise ValueError if a row that spans several lines may contain another row."""
    if place < 0:
        return
    if place < len(fields) and "\n" in fields[place]:
        raise ValueError(
            f"{path}, lines {start} to {start + len(lines) - 1}: the file name spans several lines; correct the quotes of line {start}"
        )
    for number, line in enumerate(lines[1:], start + 1):
        parts = [part.strip().strip('"') for part in line.split(",")]
        if len(parts) <= max(place, 1 if len(fields) > 1 else 0):
            continue
        # If files have no suffix, any single word may be a file name.
        if FILE_NAME.match(parts[place]) or (not FILE_NAME.match(fields[place]) and len(parts[place].split()) == 1):
            raise ValueError(
                f"{path}, line {number}: this line looks like a row ({parts[place][:80]}), but is inside a quoted field that begins in line {start}; correct the quotes of line {start}, or write its title in one line"
            )
