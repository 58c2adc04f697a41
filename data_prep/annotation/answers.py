"""Answers as annotators send them: sheets in CSV, checked against the key."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.annotation.items import KINDS, Item, Key, check_answer
from data_prep.tables import read_table

ADJUDICATOR = "adjudicator"  # in the column `annotator` of an adjudication sheet


class Answer(NamedTuple):
    """One answer of one annotator."""

    annotator: str
    item: str
    answer: str  # class name, yes or no, or a caption
    correction: str = ""  # kind pairs: a text that describes the video


def columns(kind: str) -> list[str]:
    """Columns of a sheet."""
    shown = KINDS[kind].shown
    return [
        "annotator",
        "item",
        "file",
        *([shown] if shown else []),
        "answer",
        *(["correction"] if kind == "pairs" else []),
    ]


def sheet_csv(key: Key, annotator: str, items: Sequence[Item], more: Sequence[dict[str, str]] | None = None) -> str:
    """A sheet without answers.

    Args:
      key: of the sheets.
      annotator: who gets it.
      items: in order.
      more: further columns of each item, the same for all.
    """
    extra = list(more[0]) if more else []
    out = io.StringIO()
    writer = csv.DictWriter(out, [*columns(key.kind), *extra], lineterminator="\n")
    writer.writeheader()
    shown = KINDS[key.kind].shown
    for place, item in enumerate(items):
        row = {"annotator": annotator, "item": item.name, "file": item.file, "answer": ""}
        row |= ({shown: item.text} if shown else {}) | ({"correction": ""} if key.kind == "pairs" else {})
        writer.writerow(row | (more[place] if more else {}))
    return out.getvalue()


def read(files: Sequence[Path], key: Key) -> list[Answer]:
    """Read the sheets of all annotators. Cells without an answer are left out.

    Raises:
      ValueError: an error of `read_table`, an annotator in two files or none, an item that was not given to the annotator, an item
        twice, or an answer that is none; names the file and line.
    """
    found: list[Answer] = []
    seen: dict[str, Path] = {}
    for file in files:
        own = _rows(file, key)
        names = {answer.annotator for answer, _ in own}
        if len(names) != 1:
            raise ValueError(f"{file}: {len(names)} annotators in one file; give one file for each")
        (name,) = names
        if name not in key.given:
            raise ValueError(f"{file}: no sheet was made for annotator {name!r}; give the key of these sheets")
        if name in seen:
            raise ValueError(f"{file}: annotator {name!r} is also that of {seen[name]}; give one file for each")
        seen[name] = file
        given = set(key.given[name])
        for answer, line in own:
            if answer.item not in given:
                raise ValueError(
                    f"{file}, line {line}: item {answer.item} was not given to {name}; give the key of these sheets"
                )
        found += [answer for answer, _ in own if answer.answer]
    return found


def read_adjudicated(file: Path, key: Key) -> list[Answer]:
    """Read an adjudication sheet. Raises as `read`."""
    own = _rows(file, key, twice=key.kind == "captions")
    for answer, line in own:
        if answer.item not in key.items or key.items[answer.item].gold:
            raise ValueError(f"{file}, line {line}: item {answer.item} is none of these sheets; give their key")
    return [answer for answer, _ in own if answer.answer]


def _rows(file: Path, key: Key, twice: bool = False) -> list[tuple[Answer, int]]:
    table = read_table(file, ["annotator", "item", "answer", *(["correction"] if key.kind == "pairs" else [])])
    _, header = next(table)
    found: dict[tuple[str, str], tuple[Answer, int]] = {}
    for line, fields in table:
        if len(fields) != len(header):
            raise ValueError(f"{file}, line {line}: {len(fields)} fields, but the header has {len(header)}; correct it")
        row = dict(zip(header, (" ".join(field.split()) for field in fields), strict=True))
        answer = row["answer"].casefold() if key.kind == "pairs" else row["answer"]
        if answer:
            check_answer(answer, key.kind, key.classes, f"{file}, line {line}")
        place = (row["item"], answer if twice else "")
        if place in found:
            raise ValueError(
                f"{file}, line {line}: item {row['item']} for the second time; keep one line for each item"
            )
        found[place] = (Answer(row["annotator"], row["item"], answer, row.get("correction", "")), line)
    return list(found.values())
