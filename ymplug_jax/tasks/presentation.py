"""How a task presents its results in reports and in `ymplug_jax.predict`: scores, examples and answers.

A readable row is one JSON object of predictions.jsonl; `Scores` is the content of scores.json.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ymplug_jax.data.records import Record

ReadableRow = Mapping[str, Any]
Scores = Mapping[str, Any]
Cell = tuple[str, float | None, str]  # text, sort key, and "right", "wrong" or ""
Frames = Callable[[int | None, int], list[str]]  # (position in the split, number of frames) -> data URIs
# -> the values that the card's template uses, and "sort", its sort key
Card = Callable[[ReadableRow, Frames], dict[str, Any]]


class Score(NamedTuple):
    """Description of one number in scores.json."""

    name: str
    label: str  # display name
    group: str = ""  # heading of its group in the report
    unit: str = ""
    factor: float = 1  # shown value = factor * stored value
    higher_is_better: bool | None = True  # None: neither, e.g. of a control run


class Chance(NamedTuple):
    """Expected scores of a model that ignores its input."""

    scores: dict[str, float]  # score name -> chance level, in the stored unit
    notes: list[str]  # how the chance levels were computed, one sentence each


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of examples under one heading of the page."""

    title: str
    form: (
        str  # card layout in reports/evaluation_report.html: "classes", "captions", "t2v", "v2t", "titles" or "answers"
    )
    rows: Sequence[ReadableRow]  # examples shown as cards
    count: int  # examples in the group, shown or not
    card: Card  # turns a row into the values of its card


class Breakdown(NamedTuple):
    """A table that splits scores up, e.g. by kind of question."""

    title: str
    note: str  # one sentence below the title
    columns: tuple[str, ...]
    rows: list[list[Cell]]


def _no_chance(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
    return Chance({}, [])


@dataclasses.dataclass(frozen=True)
class Page:
    """How the report page shows a task's readable rows. The defaults show no examples."""

    columns: tuple[str, ...] = ()  # columns of the table of all examples, between "place" and "file"
    line: Callable[[ReadableRow], list[Cell]] = lambda row: []  # cells of one row under `columns`
    parts: Callable[[Sequence[ReadableRow]], list[Part]] = lambda rows: []  # examples shown as cards
    # key of a predicted class in the row -> title of its confusion matrix
    votes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chance: Callable[[Scores, Sequence[ReadableRow]], Chance] = _no_chance
    breakdowns: Callable[[Scores], list[Breakdown]] = lambda scores: []  # tables below the scores
    about: Callable[[Sequence[ReadableRow]], str] = lambda rows: ""  # a phrase about all rows for the head of the page


class Answer(NamedTuple):
    """The answer of `predict` about one clip."""

    json: dict[str, Any]  # "video" is the clip's name
    lines: tuple[str, ...]  # the same as text; the caller escapes characters that a terminal cannot show


# (predictions of a clip, its record, number of answers) -> answer
Describe = Callable[[Mapping[str, np.ndarray], Record, int], Answer]
