"""Examples in the report of an evaluation: cards with frames, and a table of all examples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ymplug_jax.tasks.presentation import Cell, Frames, Page, ReadableRow

LISTED = 1000  # rows shown in the table


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of examples under one heading."""

    title: str
    kind: str  # card layout, `Part.form`
    cards: list[dict[str, Any]]
    count: int  # examples in the group, shown or not

    @property
    def told(self) -> str:
        """How many of the examples are shown."""
        return f"{len(self.cards)} of {self.count} shown"


@dataclasses.dataclass(frozen=True)
class Table:
    """Table of all examples, or of the first ones."""

    columns: list[str]
    rows: list[list[Cell]]
    count: int


def sections(page: Page, rows: Sequence[ReadableRow], frames: Frames) -> list[Section]:
    """Groups of examples as cards, errors first.

    Args:
      page: Page of the task.
      rows: Readable rows.
      frames: (position in the split, number of frames) -> data URIs.
    """
    return [
        Section(part.title, part.form, [part.card(row, frames) for row in part.rows], part.count)
        for part in page.parts(rows)
        if part.rows
    ]


def table(page: Page, rows: Sequence[ReadableRow]) -> Table:
    """Table of examples without frames, at most LISTED rows."""
    if not page.columns:
        return Table([], [], 0)
    made: list[list[Cell]] = []
    for row in rows[:LISTED]:
        place, file = row.get("index"), row.get("id", "")
        number = None if place is None else float(place)
        made.append([("" if place is None else str(place), number, ""), *page.line(row), (str(file), None, "")])
    return Table(["place", *page.columns, "file"], made, len(rows))
