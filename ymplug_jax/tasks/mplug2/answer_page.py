"""How the report shows answers to questions: the wrong ones, the right ones, and the most frequent answer as chance level."""

from collections.abc import Sequence
from typing import Any

from ymplug_jax.tasks.common import chance, open_answers
from ymplug_jax.tasks.presentation import Cell, Chance, Frames, Page, Part, ReadableRow, Scores

SHOWN = 12  # cards per part


def page(vocabulary: int) -> Page:
    """Page for the readable rows of `answer.report_of`; `vocabulary` is the number of words of the decoder."""

    def by_chance(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
        return chance.both(_majority(rows), chance.tokens(scores, vocabulary, "token_accuracy"))

    return Page(columns=("question", "right answer", "answer"), line=_line, parts=_parts, chance=by_chance)


def _majority(rows: Sequence[ReadableRow]) -> Chance:
    told = [row["references"] for row in rows if row.get("references")]
    if not told:
        return Chance({}, [])
    text, share = open_answers.majority(told)
    note = f"Chance level of exact answers: always the most frequent answer of the split, {text}."
    return Chance({"exact": share}, [note])


def _parts(rows: Sequence[ReadableRow]) -> list[Part]:
    named = (
        ("Wrong", [row for row in rows if row.get("exact") is False]),
        ("Right", [row for row in rows if row.get("exact")]),
        ("Without an answer in the data", [row for row in rows if "exact" not in row]),
    )
    return [Part(title, "answers", some[:SHOWN], len(some), _card) for title, some in named]


def _card(row: ReadableRow, frames: Frames) -> dict[str, Any]:
    runs: list[tuple[Any, ...]] = [("answer", row["answer"], _verdict(row), None, "", [])]
    shown = frames(row.get("index"), 4)
    return {**row, "sort": None, "frames": shown, "runs": runs, "pictured": False, "good": bool(row.get("exact"))}


def _verdict(row: ReadableRow) -> str:
    return "" if "exact" not in row else "right" if row["exact"] else "wrong"


def _line(row: ReadableRow) -> list[Cell]:
    right = " / ".join(row["references"]) or "–"
    return [(row["question"], None, ""), (right, None, ""), (row["answer"], None, _verdict(row))]
