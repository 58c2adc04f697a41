"""Which examples stand on the page of an evaluation, and as what: cards with pictures, and one table of all."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ymplug_jax.tasks.presentation import Cell, Frames, Page, ReadableRow

LISTED = 1000  # rows of the table


@dataclasses.dataclass(frozen=True)
class Section:
    """Some examples under a heading."""

    title: str
    kind: str  # which form of card
    cards: list[dict[str, Any]]
    count: int  # examples that belong here; the cards are the first of them

    @property
    def told(self) -> str:
        """How many are shown, in words."""
        return f"{len(self.cards)} of {self.count} shown"


@dataclasses.dataclass(frozen=True)
class Table:
    """All examples, or the first of them."""

    columns: list[str]
    rows: list[list[Cell]]
    count: int


def sections(page: Page, rows: Sequence[ReadableRow], frames: Frames) -> list[Section]:
    """The examples that are worth looking at, those with mistakes first.

    Args:
      page: of their task.
      rows: readable predictions.
      frames: (place of a record, how many) -> pictures.
    """
    return [
        Section(part.title, part.form, cards, part.count)
        for part in page.parts(rows)
        if (cards := [part.card(row, frames) for row in part.rows])
    ]


def table(page: Page, rows: Sequence[ReadableRow]) -> Table:
    """Every example in a line, without pictures, at most LISTED of them."""
    if not page.columns:
        return Table([], [], 0)
    made: list[list[Cell]] = []
    for row in rows[:LISTED]:
        place, file = row.get("index"), row.get("id", "")
        number = None if place is None else float(place)
        made.append([("" if place is None else str(place), number, ""), *page.line(row), (str(file), None, "")])
    return Table(["place", *page.columns, "file"], made, len(rows))
