"""What a model that sees nothing would score on the very same split."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Chance(NamedTuple):
    """Scores by chance."""

    scores: dict[str, float]  # name of the score -> its value by chance, in the stored unit
    notes: list[str]  # how they were found, one sentence each


def of(scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], vocabulary: int | None = None) -> Chance:
    """Chance levels of recalls and accuracies, from the readable rows of the split and the size of the vocabulary.

    Classification: a uniform guess among the class names, and beside it the answer that the commonest classes get. Retrieval:
    a random order of the gallery, where a query with several right entries is found by the first of them. Titles: the
    commonest title, always. Tokens: a uniform guess among the vocabulary.
    """
    found = _rows(scores, rows)
    tokens = [key for key in scores if key in ("token_accuracy", "masked_accuracy")]
    if vocabulary and tokens:
        note = f"Accuracy of tokens by chance: a uniform guess among {vocabulary}."
        return Chance(found.scores | dict.fromkeys(tokens, 1 / vocabulary), [*found.notes, note])
    return found


def _rows(scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Chance:
    first = rows[0] if rows else {}
    if "predicted" in first:
        return _classes(scores, rows)
    if "t2v_rank" in first:
        return _retrieval(scores, rows)
    if "generated" in first and "title" in first:
        count = Counter(row["title"] for row in rows).most_common(1)[0][1]
        note = f"Chance of an exact title: the commonest title of the split ({count} of {len(rows)}), always."
        return Chance({"exact_share": count / len(rows)}, [note])
    return Chance({}, [])


def _classes(scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Chance:
    counts = Counter(row["label"] for row in rows if row.get("label"))
    labelled, among = sum(counts.values()), scores.get("classes")
    if not labelled or not among:
        return Chance({}, [])
    known = (labelled - scores.get("unlisted", 0)) / labelled  # an unlisted label is never found
    found = {}
    for key in scores:
        if top := re.search(r"top(\d+)$", key):
            found[key] = 100 * known * min(1.0, int(top[1]) / among)
        elif key.endswith("accuracy"):  # over the rows with a listed label
            found[key] = 1 / among
    name, most = counts.most_common(1)[0]
    share, five = most / labelled, sum(n for _, n in counts.most_common(5)) / labelled
    return Chance(
        found,
        [
            f"Chance: a uniform guess among {among} class names (1/{among} for top-1).",
            f"Always answering the commonest class of this split, {name}, gives top-1 {100 * share:.3g} % "
            f"({most} of {labelled}); always its five commonest classes, top-5 {100 * five:.3g} %.",
        ],
    )


def _retrieval(scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Chance:
    texts_of = Counter(row["id"] for row in rows)  # texts of each clip
    videos, texts = len(texts_of), len(rows)
    found = {}
    for key in scores:
        group, _, name = key.rpartition("/")
        if recall := re.fullmatch(r"(v2t|t2v)_r(\d+)", name):
            found[key] = 100 * _recall(recall[1], int(recall[2]), videos, texts_of)
        elif name == "t2v_mean_rank":
            found[key] = (videos + 1) / 2
        elif name == "v2t_mean_rank":  # expected place of the first of n among so many
            found[key] = sum((texts + 1) / (n + 1) for n in texts_of.values()) / videos
        elif name in ("head_accuracy", "matching_accuracy"):
            found[key] = 2 / 3
        elif mean := re.fullmatch(r"((v2t|t2v)_)?r_mean", name):
            sides = [mean[2]] if mean[2] else ["v2t", "t2v"]
            found[key] = sum(100 * _recall(side, k, videos, texts_of) for side in sides for k in (1, 5, 10)) / (
                3 * len(sides)
            )
    several = "" if videos == texts else "; a clip with several texts is found by any of them"
    notes = [f"Chance: a random order of {videos} videos, of {texts} texts{several}."]
    if any(key.endswith("_accuracy") for key in found):
        notes.append("Accuracy of matching by chance: always no; two of three pairs of a batch do not match.")
    return Chance(found, notes)


def _recall(side: str, k: int, videos: int, texts_of: Mapping[str, int]) -> float:
    """Probability that a right entry is among the first k of a random order, the mean over the queries."""
    if side == "t2v":
        return min(1.0, k / videos)
    texts = sum(texts_of.values())
    if k >= texts:
        return 1.0
    each = Counter(texts_of.values())  # texts of a clip -> clips with so many
    return sum(clips * (1 - math.comb(texts - n, k) / math.comb(texts, k)) for n, clips in each.items()) / videos
