"""Which examples stand on the page of an evaluation, and as what: cards with pictures, and one table of all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SHOWN = 12  # cards of a section
LISTED = 1000  # rows of the table
REFERENCES = 5  # of a card; more are folded
KINDS = (("classes", "predicted"), ("captions", "caption"), ("grid", "retrieved_index"), ("titles", "generated"))

Row = Mapping[str, Any]


class Section(NamedTuple):
    """Some examples under a heading."""

    title: str
    kind: str  # which form of card
    cards: list[dict]
    count: int  # examples that belong here; the cards are the first of them

    @property
    def told(self) -> str:
        return f"{len(self.cards)} of {self.count} shown"


class Table(NamedTuple):
    """All examples, or the first of them. A cell is (text, number to sort by or None, "right", "wrong" or "")."""

    columns: list[str]
    rows: list[list[tuple[str, float | None, str]]]
    count: int


def kind_of(rows: Sequence[Row]) -> str:
    """By what a row holds: classes, captions, grid (retrieval), titles, or plain."""
    first = rows[0] if rows else {}
    return next((kind for kind, key in KINDS if key in first), "plain")


def sections(rows: Sequence[Row], frames: Callable[[int | None, int], list[str]]) -> list[Section]:
    """The examples that are worth looking at, those with mistakes first.

    Args:
      rows: readable predictions of one task.
      frames: (place of a record, how many) -> pictures.
    """
    kind = kind_of(rows)
    parts = {"classes": _classes, "captions": _captions, "grid": _grid, "titles": _titles}.get(kind, lambda _: [])(rows)
    made = []
    for title, form, chosen, count in parts:
        cards = [_card(row, form, frames) for row in chosen]
        if cards:
            made.append(Section(title, form, cards, count))
    return made


Part = tuple[str, str, Sequence[Row], int]  # heading, form, examples to draw, how many belong here


def _part(title: str, form: str, rows: Sequence[Row]) -> Part:
    return title, form, rows[:SHOWN], len(rows)


def _classes(rows: Sequence[Row]) -> list[Part]:
    known = [row for row in rows if row.get("label")]
    wrong = [row for row in known if row["label"] != row["predicted"]]
    right = [row for row in known if row["label"] == row["predicted"]]
    unknown = [row for row in rows if not row.get("label")]
    return [_part("Wrong", "classes", wrong), _part("Right", "classes", right), _part("Without a label", "classes", unknown)]  # fmt: skip


def _captions(rows: Sequence[Row]) -> list[Part]:
    told = sorted((row for row in rows if _number(row.get("cider")) is not None), key=lambda row: row["cider"])
    rest = [row for row in rows if _number(row.get("cider")) is None]
    each = min(SHOWN, -(-len(told) // 3))  # of few captions, each third
    worst, best = told[:each], told[max(each, len(told) - each) :][::-1]
    middle = told[each : len(told) - len(best)]
    drawn = np.random.default_rng(0).permutation(len(middle))[:SHOWN]  # the same ones for every reader
    some = [middle[i] for i in sorted(drawn)]
    count = len(told)
    return [
        ("Worst by CIDEr", "captions", worst, count),
        ("Drawn at random from the rest", "captions", some, len(middle)),
        ("Best by CIDEr", "captions", best, count),
        _part("Without references", "captions", rest),
    ]


def _grid(rows: Sequence[Row]) -> list[Part]:
    missed = sorted((row for row in rows if row["t2v_rank"] > 1), key=lambda row: -row["t2v_rank"])
    found = [row for row in rows if row["t2v_rank"] == 1]
    parts = [_part("Text to video, not first", "t2v", missed), _part("Text to video, first", "t2v", found)]
    clips = list({row["id"]: row for row in rows if "retrieved_texts" in row}.values())  # a clip once
    missed = sorted((row for row in clips if row["v2t_rank"] > 1), key=lambda row: -row["v2t_rank"])
    found = [row for row in clips if row["v2t_rank"] == 1]
    return [*parts, _part("Video to text, not first", "v2t", missed), _part("Video to text, first", "v2t", found)]


def _titles(rows: Sequence[Row]) -> list[Part]:
    wrong = [row for row in rows if row["title"] != row["generated"]]
    right = [row for row in rows if row["title"] == row["generated"]]
    return [_part("Other than the true title", "titles", wrong), _part("Right to the last character", "titles", right)]


def _card(row: Row, form: str, frames: Callable[[int | None, int], list[str]]) -> dict:
    """A row with its pictures, and `sort`, the number by which a reader may order the cards."""
    card = dict(row) | {"sort": _sort(row, form)}
    if form == "t2v":
        card["clips"] = _clips(row, frames)
        card["right_frames"] = frames(row.get("index"), 1)
    elif form == "v2t":
        scores = row.get("text_match_score") or row.get("text_similarity") or []
        card["texts"] = _beside(row["retrieved_texts"], scores, row.get("retrieved_texts_right") or [])
    if form != "t2v":
        card["frames"] = frames(row.get("index"), 4)
    if form == "classes":
        card["others"] = [(key, row[key]) for key in row if "/" in key and key != "both/likelihood"]
    if form == "captions":
        references = list(row.get("references") or [])
        card["first"], card["more"] = references[:REFERENCES], references[REFERENCES:]
        named = (("cider", "CIDEr"), ("meteor", "METEOR"), ("rouge_l", "ROUGE-L"))
        card["own_scores"] = [(word, float(row[key])) for key, word in named if _number(row.get(key)) is not None]
    return card


def _clips(row: Row, frames: Callable[[int | None, int], list[str]]) -> list[dict]:
    scores = row.get("match_score") or row.get("similarity") or []
    named = _beside(row["retrieved"][:5], scores, [name == row.get("id") for name in row["retrieved"]])
    return [clip | {"frames": frames(index, 1)} for clip, index in zip(named, row["retrieved_index"], strict=False)]


def _beside(texts: Sequence[str], scores: Sequence[float], right: Sequence[bool]) -> list[dict]:
    """Texts with what stands under them; scores and marks may be missing, None is a pair that the match head did not see."""
    made = []
    for i, text in enumerate(texts):
        score = _number(scores[i]) if i < len(scores) else None
        words = f"{score:+.3f}" if score is not None else ("not scored" if i < len(scores) else "")
        made.append({"text": text, "score": words, "right": bool(right[i]) if i < len(right) else False})
    return made


def _sort(row: Row, form: str) -> float | None:
    if form == "classes":
        return max(row.get("top5", {}).values(), default=None)
    key = {"captions": "cider", "t2v": "t2v_rank", "v2t": "v2t_rank"}.get(form)
    return _number(row.get(key))


def table(rows: Sequence[Row]) -> Table:
    """Every example in a line, without pictures, at most LISTED of them."""
    columns, line = {
        "classes": (["title", "true", "answered", "share", "by the head"], _class_line),
        "captions": (["caption", "first reference", "references", "CIDEr", "METEOR", "ROUGE-L"], _caption_line),
        "grid": (["text", "rank of the video", "first video", "rank of the text"], _grid_line),
        "titles": (["title", "generated"], _title_line),
    }.get(kind_of(rows), ([], lambda row: []))
    if not columns:
        return Table([], [], 0)
    made = [
        [(str(row.get("index", "")), _number(row.get("index")), ""), *line(row), (str(row.get("id", "")), None, "")]
        for row in rows[:LISTED]
    ]
    return Table(["place", *columns, "file"], made, len(rows))


def _class_line(row: Row) -> list:
    verdict = "" if not row.get("label") else ("right" if row["label"] == row["predicted"] else "wrong")
    head = row.get("both/head")
    by_head = "" if not (row.get("label") and head) else ("right" if row["label"] == head else "wrong")
    share = max(row.get("top5", {}).values(), default=None)
    return [
        (row.get("title") or "", None, ""),
        (row.get("label") or "–", None, ""),
        (row["predicted"], None, verdict),
        _percent(share),
        (head or "–", None, by_head),
    ]


def _caption_line(row: Row) -> list:
    references = row.get("references") or []
    first = references[0] if len(references) else "–"
    scores = [(row.get(key), digits) for key, digits in (("cider", 2), ("meteor", 3), ("rouge_l", 3))]
    cells = [_plain(scores[0][0], 2), *(_percent(value) for value, _ in scores[1:])]
    return [(row["caption"], None, ""), (first, None, ""), (str(len(references)), float(len(references)), ""), *cells]


def _grid_line(row: Row) -> list:
    first = row["retrieved"][0] if row.get("retrieved") else "–"
    return [
        (row.get("text", ""), None, ""),
        (str(row["t2v_rank"]), float(row["t2v_rank"]), "right" if row["t2v_rank"] == 1 else "wrong"),
        (first, None, ""),
        _plain(row.get("v2t_rank"), 0),
    ]


def _title_line(row: Row) -> list:
    verdict = "right" if row["title"] == row["generated"] else "wrong"
    return [(row["title"], None, ""), (row["generated"], None, verdict)]


def _plain(value: Any, digits: int) -> tuple[str, float | None, str]:
    number = _number(value)
    return ("–" if number is None else f"{number:.{digits}f}", number, "")


def _percent(value: Any) -> tuple[str, float | None, str]:
    number = _number(value)
    return ("–" if number is None else f"{100 * number:.1f} %", number, "")


def _number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        return None
    return float(value)
