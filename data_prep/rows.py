"""The release's CSV files as rows: which file, which text, which label. Standard library only."""

import ast
import csv
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ymplug_jax.data import schema


class Row(NamedTuple):
    """One row of a CSV. `problem` is why its text cannot be used, or empty."""

    number: int  # 0-based, header not counted
    media_id: str
    title: str
    captions: tuple[str, ...]
    label_text: str
    label_index: int
    problem: str


def read_rows(csv_file: Path, kind: str) -> list[Row]:
    """All rows of a CSV of one of the kinds in schema.COLUMNS, UTF-8 with or without byte order mark.

    Raises:
      ValueError: not UTF-8, no rows, or columns that do not fit the kind; the message names file and columns.
    """
    file_column, text_columns = schema.COLUMNS[kind]
    try:
        with open(csv_file, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            if missing := [name for name in (file_column, *text_columns) if name not in header]:
                raise ValueError(
                    f"{csv_file}: no column {missing[0]!r}, which --config {kind} needs; its columns are {', '.join(header) or 'none'}"
                )
            rows = [_row(i, fields, kind, file_column) for i, fields in enumerate(reader)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{csv_file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not rows:
        raise ValueError(f"{csv_file}: a header and no rows")
    return rows


def _row(number: int, fields: dict, kind: str, file_column: str) -> Row:
    def text(column: str) -> str:
        return (fields.get(column) or "").strip()

    title, captions, label, index, problem = text("title"), (), "", -1, ""
    if None in fields or None in fields.values():
        problem = "the row has another number of fields than the header; is a comma or a quote missing?"
    if kind == "retrieval":
        captions = (text("caption"),) if text("caption") else ()
    elif kind == "captioning":
        captions, problem = _captions(text("golden_caption"), problem)
    elif kind == "question":
        title, label = text("question"), text("answer")
    elif kind == "classification":
        label = text("label")
        if label in schema.CLASS_NAMES:
            index = schema.CLASS_NAMES.index(label)
        elif label:  # an empty label is a withheld one
            problem = f"label {label!r} is none of the {len(schema.CLASS_NAMES)} class names"
    return Row(number, text(file_column), title, captions, label, index, problem)


def _captions(value: str, problem: str) -> tuple[tuple[str, ...], str]:
    """Plain text, or a Python list of references as in the validation split."""
    if not value.startswith("["):
        return ((value,) if value else ()), problem
    try:
        items = ast.literal_eval(value)
        return tuple(str(item) for item in items if str(item).strip()), problem
    except (ValueError, SyntaxError):
        return (), "golden_caption begins like a list but cannot be read as one"


def duplicates(rows: list[Row]) -> dict[str, int]:
    """FILE -> how often, for those that occur more than once (several captions of one clip, or a mistake)."""
    return {name: count for name, count in Counter(row.media_id for row in rows).items() if count > 1}


def sha256(file: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def split_of(csv_file: Path) -> str:
    """Split by the end of the file name: *_val -> validation, *_test -> test, anything else train."""
    endings = {"_val": "validation", "_validation": "validation", "_test": "test"}
    return next((split for ending, split in endings.items() if csv_file.stem.endswith(ending)), "train")
