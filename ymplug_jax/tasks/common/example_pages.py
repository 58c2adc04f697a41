"""Example pages by kind of task: classes, captions, rankings, titles. See `presentation.Page`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ymplug_jax.tasks.common import chance
from ymplug_jax.tasks.presentation import Card, Cell, Frames, Page, Part, ReadableRow

SHOWN = 12  # cards per part
REFERENCES = 5  # references shown on a card; the others are collapsed
WORDS = {"likelihood": "by likelihood of the class name", "head": "by the head"}


def classes(modalities: Sequence[str], by: Sequence[str]) -> Page:
    """Page for class predictions, the rows of `class_votes.readable`; the arguments are the same."""
    others = [key for modality in modalities for kind in by if (key := f"{modality}/{kind}") != "both/likelihood"]
    return Page(
        columns=("title", "true", "answered", "share", "by the head"),
        line=_class_line,
        parts=partial(_class_parts, others=others),
        votes={f"both/{kind}": WORDS[kind] for kind in by},
        chance=chance.classes,
    )


def captions() -> Page:
    """Page for captions with their references and scores."""
    columns = ("caption", "first reference", "references", "CIDEr", "METEOR", "ROUGE-L")
    return Page(columns=columns, line=_caption_line, parts=_caption_parts, about=_references)


def ranking(videos: str, texts: str, pairs: str = "") -> Page:
    """Page for retrieval: the retrieved videos of each text and the retrieved texts of each video.

    Args:
      videos: Row key of the scores of the retrieved videos.
      texts: Row key of the scores of the retrieved texts.
      pairs: Name of the accuracy score of the matching head, "" if there is none.
    """
    return Page(
        columns=("text", "rank of the video", "first video", "rank of the text"),
        line=_ranking_line,
        parts=partial(_ranking_parts, videos=videos, texts=texts),
        chance=partial(chance.retrieval, pairs=pairs),
    )


def titles() -> Page:
    """Page for generated titles."""
    return Page(columns=("title", "generated"), line=_title_line, parts=_title_parts, chance=chance.titles)


def _part(title: str, form: str, rows: Sequence[ReadableRow], card: Card) -> Part:
    return Part(title, form, rows[:SHOWN], len(rows), card)


def _class_parts(rows: Sequence[ReadableRow], others: Sequence[str]) -> list[Part]:
    known = [row for row in rows if row.get("label")]
    wrong = [row for row in known if row["label"] != row["predicted"]]
    right = [row for row in known if row["label"] == row["predicted"]]
    unknown = [row for row in rows if not row.get("label")]

    def card(row: ReadableRow, frames: Frames) -> dict[str, Any]:
        return {
            **row,
            "sort": max(row.get("top5", {}).values(), default=None),
            "frames": frames(row.get("index"), 4),
            "others": [(key, row[key]) for key in others if key in row],
        }

    named = (("Wrong", wrong), ("Right", right), ("Without a label", unknown))
    return [_part(title, "classes", some, card) for title, some in named]


def _caption_parts(rows: Sequence[ReadableRow]) -> list[Part]:
    told = sorted((row for row in rows if _number(row.get("cider")) is not None), key=lambda row: float(row["cider"]))
    rest = [row for row in rows if _number(row.get("cider")) is None]
    each = min(SHOWN, -(-len(told) // 3))  # with few captions, each part gets a third
    worst, best = told[:each], told[max(each, len(told) - each) :][::-1]
    middle = told[each : len(told) - len(best)]
    drawn = np.random.default_rng(0).permutation(len(middle))[:SHOWN]  # fixed seed: the page is the same every time
    some = [middle[i] for i in sorted(drawn)]
    count = len(told)
    return [
        Part("Worst by CIDEr", "captions", worst, count, _caption_card),
        Part("Random sample of the rest", "captions", some, len(middle), _caption_card),
        Part("Best by CIDEr", "captions", best, count, _caption_card),
        _part("Without references", "captions", rest, _caption_card),
    ]


def _caption_card(row: ReadableRow, frames: Frames) -> dict[str, Any]:
    references = list(row.get("references") or [])
    named = (("cider", "CIDEr"), ("meteor", "METEOR"), ("rouge_l", "ROUGE-L"))
    return {
        **row,
        "sort": _number(row.get("cider")),
        "frames": frames(row.get("index"), 4),
        "first": references[:REFERENCES],
        "more": references[REFERENCES:],
        "own_scores": [(word, number) for key, word in named if (number := _number(row.get(key))) is not None],
    }


def _references(rows: Sequence[ReadableRow]) -> str:
    """A phrase about the number of references."""
    counts = [len(row["references"]) for row in rows if row.get("references")]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{sum(counts)} references for {len(counts)} clips, {each} per clip"


def _ranking_parts(rows: Sequence[ReadableRow], videos: str, texts: str) -> list[Part]:
    def of_text(row: ReadableRow, frames: Frames) -> dict[str, Any]:
        right = [name == row.get("id") for name in row["retrieved"]]
        named = _beside(row["retrieved"][:5], row.get(videos) or [], right)
        clips = [
            clip | {"frames": frames(index, 1)} for clip, index in zip(named, row["retrieved_index"], strict=False)
        ]
        more = {"clips": clips, "right_frames": frames(row.get("index"), 1)}
        return {**row, "sort": _number(row.get("t2v_rank")), **more}

    def of_video(row: ReadableRow, frames: Frames) -> dict[str, Any]:
        named = _beside(row["retrieved_texts"], row.get(texts) or [], row.get("retrieved_texts_right") or [])
        return {**row, "sort": _number(row.get("v2t_rank")), "texts": named, "frames": frames(row.get("index"), 4)}

    clips = list({row["id"]: row for row in rows if "retrieved_texts" in row}.values())  # each clip once
    made = []
    for words, form, some, rank, card in (
        ("Text to video", "t2v", rows, "t2v_rank", of_text),
        ("Video to text", "v2t", clips, "v2t_rank", of_video),
    ):
        missed = sorted((row for row in some if row[rank] > 1), key=lambda row, rank=rank: -int(row[rank]))  # type: ignore[misc]
        found = [row for row in some if row[rank] == 1]
        made += [_part(f"{words}, not first", form, missed, card), _part(f"{words}, first", form, found, card)]
    return made


def _title_parts(rows: Sequence[ReadableRow]) -> list[Part]:
    def card(row: ReadableRow, frames: Frames) -> dict[str, Any]:
        return {**row, "sort": None, "frames": frames(row.get("index"), 4)}

    wrong = [row for row in rows if row["title"] != row["generated"]]
    right = [row for row in rows if row["title"] == row["generated"]]
    named = (("Different from the true title", wrong), ("Exactly right", right))
    return [_part(title, "titles", some, card) for title, some in named]


def _beside(texts: Sequence[str], scores: Sequence[float | None], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Captions of retrieved entries. Scores and marks may be missing; a score of None means that the matching head did not score the pair."""
    made = []
    for i, text in enumerate(texts):
        score = _number(scores[i]) if i < len(scores) else None
        words = f"{score:+.3f}" if score is not None else ("not scored" if i < len(scores) else "")
        made.append({"text": text, "score": words, "right": bool(right[i]) if i < len(right) else False})
    return made


def _class_line(row: ReadableRow) -> list[Cell]:
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


def _caption_line(row: ReadableRow) -> list[Cell]:
    references = row.get("references") or []
    first = references[0] if len(references) else "–"
    scores = [(row.get(key), digits) for key, digits in (("cider", 2), ("meteor", 3), ("rouge_l", 3))]
    cells = [_plain(scores[0][0], 2), *(_percent(value) for value, _ in scores[1:])]
    return [(row["caption"], None, ""), (first, None, ""), (str(len(references)), float(len(references)), ""), *cells]


def _ranking_line(row: ReadableRow) -> list[Cell]:
    first = row["retrieved"][0] if row.get("retrieved") else "–"
    return [
        (row.get("text", ""), None, ""),
        (str(row["t2v_rank"]), float(row["t2v_rank"]), "right" if row["t2v_rank"] == 1 else "wrong"),
        (first, None, ""),
        _plain(row.get("v2t_rank"), 0),
    ]


def _title_line(row: ReadableRow) -> list[Cell]:
    verdict = "right" if row["title"] == row["generated"] else "wrong"
    return [(row["title"], None, ""), (row["generated"], None, verdict)]


def _plain(value: Any, digits: int) -> Cell:
    number = _number(value)
    return ("–" if number is None else f"{number:.{digits}f}", number, "")


def _percent(value: Any) -> Cell:
    number = _number(value)
    return ("–" if number is None else f"{100 * number:.1f} %", number, "")


def _number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        return None
    return float(value)
