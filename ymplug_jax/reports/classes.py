"""Per-class results: confusion matrices, precision and recall."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MATRIX = 45  # most frequent classes shown in a matrix
TABLE = 500  # classes shown in the table


class Matrix(NamedTuple):
    """Confusion matrix. Rows: true classes, most frequent first. Columns: the same, then classes that were only predicted."""

    title: str
    names: list[str]
    answers: list[str | None]
    cells: list[tuple[str, list[tuple[int, float]]]]  # true class; per column the count and its share of the row
    right: int
    labelled: int
    left_out: int  # true and predicted classes that are not shown


@dataclasses.dataclass(frozen=True)
class Line:
    """Row of the class table. Shares are fractions; None if the denominator is 0."""

    name: str
    count: int
    share: float
    by: list[tuple[int, float | None, float | None]]  # per kind of vote: times predicted, precision, recall


def matrix(rows: Sequence[Mapping[str, Any]], key: str, title: str) -> Matrix | None:
    """Confusion matrix of one kind of vote over the labelled rows; None if there are none.

    Args:
      rows: Readable rows with "label" (None: not labelled) and `key`.
      key: Key of the predicted class in a row.
      title: Title of the matrix.
    """
    pairs = Counter((row["label"], row.get(key)) for row in rows if row.get("label"))
    if not pairs:
        return None
    truths: Counter[str] = Counter()
    answered: Counter[str | None] = Counter()
    for (label, answer), count in pairs.items():
        truths[label] += count
        answered[answer] += count
    every = [name for name, _ in truths.most_common()]
    names = every[:MATRIX]
    others = [name for name, _ in answered.most_common() if name not in truths]
    answers = [*names, *others[:MATRIX]]
    cells = [
        (name, [(pairs[name, answer], pairs[name, answer] / truths[name]) for answer in answers]) for name in names
    ]
    right = sum(count for (label, answer), count in pairs.items() if label == answer)
    left_out = len(every) - len(names) + max(0, len(others) - MATRIX)
    return Matrix(title, names, answers, cells, right, sum(truths.values()), left_out)


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Line]:
    """Precision, recall and count of every class that occurs or was predicted, most frequent first.

    Args:
      rows: Readable rows with "label" (None: not labelled) and the predicted classes under `keys`.
      keys: Kinds of votes.
    """
    known = [row for row in rows if row.get("label")]
    truths = Counter(row["label"] for row in known)
    answers = {key: Counter(row.get(key) for row in known) for key in keys}
    right = {key: Counter(row["label"] for row in known if row["label"] == row.get(key)) for key in keys}
    names = dict.fromkeys([name for name, _ in truths.most_common()])
    for key in keys:
        names |= dict.fromkeys(name for name, _ in answers[key].most_common() if name is not None)
    return [
        Line(
            name,
            truths[name],
            truths[name] / len(known),
            [
                (
                    answers[key][name],
                    _share(right[key][name], answers[key][name]),
                    _share(right[key][name], truths[name]),
                )
                for key in keys
            ],
        )
        for name in names
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
