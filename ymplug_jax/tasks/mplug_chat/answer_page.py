"""How the report shows answers: true media, black frames and another clip side by side, and a table by kind of question."""

from collections.abc import Mapping, Sequence
from typing import Any

from ymplug_jax.tasks.common.chance import both
from ymplug_jax.tasks.mplug_chat.answer_scores import MAJORITY, MEDIA, UNIFORM
from ymplug_jax.tasks.mplug_chat.questions import CONTROLS, OTHER
from ymplug_jax.tasks.presentation import Breakdown, Cell, Chance, Frames, Page, Part, ReadableRow, Scores

SHOWN = 12  # cards per part
RUNS = {"": "true media", **{f"/{name}": words for name, words in CONTROLS.items()}}
COLUMNS = {MEDIA: "with media", **CONTROLS, MAJORITY: "most frequent answer", UNIFORM: "uniform guess"}
# The score of each column that is not NAME/COLUMN: containment is compared with the share of the most frequent answer too.
SAME = {("contains", MAJORITY): f"exact/{MAJORITY}"}


def page() -> Page:
    """Page for the readable rows of `answering.report`."""
    return Page(
        columns=("kind", "question", "right answer", *RUNS.values(), "chosen option"),
        line=_line,
        parts=_parts,
        chance=chance,
        breakdowns=breakdowns,
        about=_about,
    )


def _about(rows: Sequence[ReadableRow]) -> str:
    without = sum(not row["media"] for row in rows)
    return f"{len(rows)} questions, {without} of them without media" if without else f"{len(rows)} questions"


def breakdowns(scores: Scores) -> list[Breakdown]:
    """One table for each of exact match, containment and choice: a row for all questions and one for each kind."""
    note = (
        "Answers to the questions with images or clips. A model that answers as well from black frames or from another clip "
        "does not use its input."
    )
    tables = []
    for name, title in (
        ("exact", "Exact answers"),
        ("contains", "Answers that contain the right one"),
        ("choice", "Options"),
    ):
        ends = [end for end in COLUMNS if SAME.get((name, end), f"{name}/{end}") in scores]
        if name not in scores or not ends:
            continue
        rows = [_row("all", scores, name, ends)]
        rows += [_row(kind, own, name, ends) for kind, own in scores.get("kinds", {}).items() if name in own]
        columns = ("kind", "questions", "all", *(COLUMNS[end] for end in ends))
        tables.append(Breakdown(f"{title} by kind of question", note, columns, rows))
    return tables


def _row(kind: str, scores: Mapping[str, Any], name: str, ends: Sequence[str]) -> list[Cell]:
    count = scores["questions"]
    values = [scores.get(name), *(scores.get(SAME.get((name, end), f"{name}/{end}")) for end in ends)]
    return [(kind, None, ""), (str(count), float(count), ""), *map(_percent, values)]


def _percent(value: float | None) -> Cell:
    return ("–", None, "") if value is None else (f"{100 * value:.1f} %", float(value), "")


def chance(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
    """Chance levels of the questions with media: the most frequent answer of each kind, and a uniform guess among the options."""
    exact, guess = scores.get(f"exact/{MAJORITY}"), scores.get(f"choice/{UNIFORM}")
    ends = [MEDIA, *CONTROLS]
    frequent = Chance({}, [])
    if exact is not None:
        note = "Chance level of exact answers: always the most frequent answer of the kind of question."
        frequent = Chance({f"exact/{end}": exact for end in ends}, [note])
    if guess is None:
        return frequent
    note = "Chance level of the choice: a uniform guess among the options of each question."
    names = ("choice", "choice_total")
    return both(frequent, Chance({f"{name}/{end}": guess for name in names for end in ends}, [note]))


def _parts(rows: Sequence[ReadableRow]) -> list[Part]:
    blind = [row for row in rows if row["exact"] and any(row.get(f"exact/{end}") for end in CONTROLS)]
    seen = [row for row in rows if row["exact"] and not any(row.get(f"exact/{end}") for end in CONTROLS)]
    wrong = [row for row in rows if not row["exact"]]
    named = (
        ("Not exact", wrong),
        ("Right, and right with black frames or another clip as well", blind),
        ("Right with the true media only", seen),
    )
    return [Part(title, "answers", some[:SHOWN], len(some), _card) for title, some in named]


def _card(row: ReadableRow, frames: Frames) -> dict[str, Any]:
    pictures = {"": frames(row["index"], 1), f"/{OTHER}": frames(row["other"], 1) if "other" in row else []}
    runs = [
        (
            words if row["media"] else "no media",
            row[f"answer{end}"],
            _verdict(row.get(f"exact{end}")),
            row.get(f"chosen{end}"),
            _verdict(row.get(f"choice{end}")),
            pictures.get(end, []),
        )
        for end, words in RUNS.items()
        if f"answer{end}" in row
    ]
    shown = frames(row["index"], 4) if row["media"] else []
    return {**row, "sort": None, "frames": shown, "runs": runs, "pictured": bool(shown), "good": row["exact"]}


def _verdict(right: bool | None) -> str:
    return "" if right is None else "right" if right else "wrong"


def _line(row: ReadableRow) -> list[Cell]:
    answers = [(row.get(f"answer{end}", "–"), None, _verdict(row.get(f"exact{end}"))) for end in RUNS]
    chosen = (row.get("chosen", "–"), None, _verdict(row.get("choice")))
    return [
        (row["kind"], None, ""),
        (row["question"], None, ""),
        (" / ".join(row["references"]), None, ""),
        *answers,
        chosen,
    ]
