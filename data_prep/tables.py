"""CSVs and line files as they are written: strict quotes, lines that end at "\\n" only, every mistake named by its line."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

LONGEST_FIELD = 131_072  # characters; a field that is longer has swallowed rows
FILE_NAME = re.compile(r"\S.*\.(?=[0-9]*[A-Za-z])[0-9A-Za-z]{1,5}$")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends ("\\n" or "\\r\\n"); a byte order mark is dropped.

    Raises:
      ValueError: not UTF-8; the message names file and line.
      OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8-sig", newline="\n") as stream:
        try:
            for line in stream:
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise ValueError(_not_utf8(path)) from None


def _not_utf8(path: Path) -> str:
    """Says which line is not UTF-8, and what the file may be instead."""
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
    """(line, fields) of a CSV: the header first, then every row that is not blank. `columns` must be in the header.

    Where a quoted field runs over several lines, nothing of another row may be in it: no continuation line may look like a
    row, that is have a file's name in the place of the column that is one of `file_columns`.

    Raises:
      ValueError: not UTF-8, empty, columns missing or given twice, or quotes that do not close; file and line are named.
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
        raise ValueError(f"{path}: empty; it needs a header{' of ' + ','.join(columns) if columns else ''}")


def check_header(path: Path, header: list[str], columns: Sequence[str]) -> None:
    """Raises ValueError where one of `columns` is missing or given twice."""
    for name in columns:
        if header.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} stands {header.count(name)} times in the header; keep one")
        if name not in header:
            found = ", ".join(header)
            marks = [mark for mark in (";", "\t") if len(header) == 1 and mark in found]
            hint = f"; it is separated by {marks[0]!r}, save it with commas" if marks else ""
            raise ValueError(f"{path}: no column {name!r}; its columns are {found}{hint}")


def _csv_error(path: Path, start: int, end: int, error: str) -> str:
    """What the csv module found, in words that say where to look."""
    fixes = {
        "unexpected end of data": "a quoted field does not end: a quote too many, or one is missing",
        "expected after": "text follows a closing quote: a quote too many, or one inside a field that is not doubled",
        "field larger": f"a field of more than {LONGEST_FIELD:,} characters: a quote is missing or too many",
        "new-line character": "a carriage return inside a line; save the file with line ends \\n or \\r\\n",
    }
    what = next((text for mark, text in fixes.items() if mark in error), error)
    where = f"line {start}" if end <= start else f"lines {start} to {end}"
    return f"{path}, {where}: {what}; correct line {start}"


def _check_nothing_swallowed(path: Path, start: int, lines: list[str], fields: list[str], place: int) -> None:
    """Raises ValueError where a row over several lines may hold another row."""
    if place < 0:
        return
    if place < len(fields) and "\n" in fields[place]:
        raise ValueError(
            f"{path}, lines {start} to {start + len(lines) - 1}: the name of a file runs over several lines; a quote is missing or too many in line {start}"
        )
    for number, line in enumerate(lines[1:], start + 1):
        parts = [part.strip().strip('"') for part in line.split(",")]
        if len(parts) <= max(place, 1 if len(fields) > 1 else 0):
            continue
        # Where files have no suffix, any word may be a file.
        if FILE_NAME.match(parts[place]) or (not FILE_NAME.match(fields[place]) and len(parts[place].split()) == 1):
            raise ValueError(
                f"{path}, line {number}: a quoted field that begins in line {start} takes in what looks like a row of its own ({parts[place][:80]}); correct the quotes of line {start}, or write its title in one line"
            )
