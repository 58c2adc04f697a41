"""What a task tells the report page and `ymplug_jax.predict` about its results: its scores, its examples, its answers.

Readable rows are the JSON objects of predictions.jsonl, scores those of scores.json.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ymplug_jax.data.records import Record

ReadableRow = Mapping[str, Any]
Scores = Mapping[str, Any]
Cell = tuple[str, float | None, str]  # text, number to sort by, and "right", "wrong" or ""
Frames = Callable[[int | None, int], list[str]]  # (place of a record in the split, how many) -> pictures


Card = Callable[
    [ReadableRow, Frames], dict[str, Any]
]  # values that the card's form names, and "sort", a number to order by


class Score(NamedTuple):
    """A number of scores.json."""

    name: str
    label: str  # in words
    group: str = ""  # heading that it stands under
    unit: str = ""
    factor: float = 1  # from the stored to the shown number
    higher_is_better: bool = True


class Chance(NamedTuple):
    """Scores of a model that sees nothing."""

    scores: dict[str, float]  # name of the score -> its value by chance, in the stored unit
    notes: list[str]  # how they were found, one sentence each


@dataclasses.dataclass(frozen=True)
class Part:
    """Some examples under a heading of the page."""

    title: str
    form: str  # of their cards: "classes", "captions", "t2v", "v2t" or "titles", see reports/evaluation_report.html
    rows: Sequence[ReadableRow]  # that are drawn
    count: int  # examples that belong here; the drawn ones are some of them
    card: Card  # what is drawn of a row


def _no_chance(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
    return Chance({}, [])


@dataclasses.dataclass(frozen=True)
class Page:
    """How the report page shows a task's readable rows. A task without examples keeps the defaults."""

    columns: tuple[str, ...] = ()  # of the table of all examples, between the place and the file
    line: Callable[[ReadableRow], list[Cell]] = lambda row: []  # a row's cells under them
    parts: Callable[[Sequence[ReadableRow]], list[Part]] = lambda rows: []  # examples that are drawn as cards
    votes: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # key of an answered class -> words, for its matrix
    chance: Callable[[Scores, Sequence[ReadableRow]], Chance] = _no_chance
    about: Callable[[Sequence[ReadableRow]], str] = lambda rows: ""  # a phrase about all rows, for the head of the page


class Answer(NamedTuple):
    """What `predict` says about one clip."""

    json: dict[str, Any]  # "video" is its name
    lines: tuple[str, ...]  # the same for a person; whoever prints them escapes what a terminal cannot show


# (predictions of a clip, its record, how many answers are wanted) -> answer
Describe = Callable[[Mapping[str, np.ndarray], Record, int], Answer]
