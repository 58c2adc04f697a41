"""Parser of Youku-mPLUG CSV files into rows of video file, texts and label. Standard library only."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from data_prep.captions import MISSING, captions_of
from data_prep.tables import read_table
from ymplug_jax.data import schema


class Row(NamedTuple):
    """One row of a CSV. A row with a `problem` is rejected with `reason`, a key of video_container.REASONS."""

    number: int  # 0-based, without the header
    media_id: str
    title: str
    captions: tuple[str, ...]
    label_text: str
    label_index: int
    problem: str
    reason: str = "bad_row"


def iter_rows(csv_file: Path, kind: str, classes: Sequence[str] = schema.CLASS_NAMES) -> Iterator[Row]:
    """Yield the rows of a CSV, UTF-8 with or without byte order mark, one after the other.

    Args:
      csv_file: path of the CSV.
      kind: one of schema.COLUMNS.
      classes: class names, for kind "classification".

    Raises:
      ValueError: the file has no rows, or an error that `tables.read_table` reports; names the file and line or columns.
    """
    file_column, text_columns = schema.COLUMNS[kind]
    table = read_table(csv_file, (file_column, *text_columns), (file_column,))
    _, header = next(table)
    indices = {name: i for i, name in enumerate(classes)}
    number = -1
    for number, (_, fields) in enumerate(table):
        yield _row(number, header, fields, kind, indices)
    if number < 0:
        raise ValueError(f"{csv_file}: no rows after the header; give a CSV with at least one row")


def read_rows(csv_file: Path, kind: str, classes: Sequence[str] = schema.CLASS_NAMES) -> list[Row]:
    """Return all rows of a CSV as `iter_rows` yields them."""
    return list(iter_rows(csv_file, kind, classes))


def _row(number: int, header: list[str], fields: list[str], kind: str, classes: dict[str, int]) -> Row:
    by_name = dict(zip(header, fields, strict=False))

    def text(column: str) -> str:
        return by_name.get(column, "").strip()

    captions: tuple[str, ...] = ()
    title, label, index, problem, reason = text("title"), "", -1, "", "bad_row"
    if kind == "retrieval":
        captions = (text("caption"),) if text("caption") else ()
        if text("caption") in MISSING:
            captions, problem = (
                (),
                f"caption is {text('caption')}, which is a missing value, not a caption; leave the cell empty",
            )
    elif kind == "captioning":
        captions, problem = captions_of(text("golden_caption"))
    elif kind == "question":
        title, label = text("question"), text("answer")
    elif kind == "classification":
        label = text("label")
        index = classes.get(label, -1)
        if label and index < 0:  # an empty label is a withheld label
            problem, reason = f"label {label!r} is not among the {len(classes)} class names", "unknown_label"
    if len(fields) != len(header):
        problem, reason = (
            f"{len(fields)} fields, but the header has {len(header)}; check the commas and quotes",
            "bad_row",
        )
    elif any("\x00" in field for field in fields):
        problem, reason = "the row contains a NUL character", "bad_row"
    return Row(number, text(schema.COLUMNS[kind][0]), title, captions, label, index, problem, reason)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def split_of(csv_file: PurePath) -> str:
    """Return the split by the end of the file name: *_val is validation, *_test is test, anything else is train."""
    endings = {"_val": "validation", "_validation": "validation", "_test": "test"}
    return next((split for ending, split in endings.items() if csv_file.stem.endswith(ending)), "train")
