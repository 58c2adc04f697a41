"""Chance levels: the scores of a model that ignores its input, on the same split."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ymplug_jax.tasks.presentation import Chance, ReadableRow, Scores


def both(*found: Chance) -> Chance:
    """Merge several chance levels into one."""
    return Chance(
        {name: value for one in found for name, value in one.scores.items()},
        [note for one in found for note in one.notes],
    )


def tokens(scores: Scores, vocabulary: int, name: str) -> Chance:
    """Chance level of the token accuracy `name`: a uniform guess among the vocabulary."""
    if name not in scores:
        return Chance({}, [])
    return Chance(
        {name: 1 / vocabulary}, [f"Chance level of token accuracy: a uniform guess among {vocabulary} tokens."]
    )


def titles(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
    """Chance level of exact titles: always answer the most frequent title."""
    if not rows:
        return Chance({}, [])
    count = Counter(row.get("title") for row in rows).most_common(1)[0][1]
    note = f"Chance level of exact titles: always the most frequent title of the split ({count} of {len(rows)})."
    return Chance({"exact_share": count / len(rows)}, [note])


def classes(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
    """Chance level of classification: a uniform guess among the class names. The notes add the scores of the most frequent classes."""
    counts = Counter(row["label"] for row in rows if row.get("label"))
    labelled, among = sum(counts.values()), scores.get("classes")
    if not labelled or not among:
        return Chance({}, [])
    known = (labelled - scores.get("unlisted", 0)) / labelled  # an unlisted label is always missed
    found = {}
    for key in scores:
        if top := re.search(r"top(\d+)$", key):
            found[key] = 100 * known * min(1.0, int(top[1]) / among)
        elif key.endswith("accuracy"):  # over rows with a listed label only
            found[key] = 1 / among
    name, most = counts.most_common(1)[0]
    share, five = most / labelled, sum(n for _, n in counts.most_common(5)) / labelled
    return Chance(
        found,
        [
            f"Chance level: a uniform guess among {among} class names (1/{among} for top-1).",
            f"Always answering the most frequent class of this split, {name}, scores top-1 {100 * share:.3g} % "
            f"({most} of {labelled}); its five most frequent classes score top-5 {100 * five:.3g} %.",
        ],
    )


def retrieval(scores: Scores, rows: Sequence[ReadableRow], pairs: str = "") -> Chance:
    """Chance level of retrieval: a random order of the gallery. The rank of a query is that of its first correct entry.

    Args:
      scores: Scores of the evaluation.
      rows: Readable rows.
      pairs: Name of the accuracy score of the matching head, "" if there is none.
    """
    if not rows:
        return Chance({}, [])
    texts_of = Counter(str(row.get("id")) for row in rows)  # texts of each clip
    videos, texts = len(texts_of), len(rows)
    found = {}
    for key in scores:
        name = key.rpartition("/")[2]
        if recall := re.fullmatch(r"(v2t|t2v)_r(\d+)", name):
            found[key] = 100 * _recall(recall[1], int(recall[2]), videos, texts_of)
        elif name == "t2v_mean_rank":
            found[key] = (videos + 1) / 2
        elif name == "v2t_mean_rank":  # expected rank of the first of n entries in a random order
            found[key] = sum((texts + 1) / (n + 1) for n in texts_of.values()) / videos
        elif pairs and key == pairs:
            found[key] = 2 / 3
        elif mean := re.fullmatch(r"((v2t|t2v)_)?r_mean", name):
            sides = [mean[2]] if mean[2] else ["v2t", "t2v"]
            found[key] = sum(100 * _recall(side, k, videos, texts_of) for side in sides for k in (1, 5, 10)) / (
                3 * len(sides)
            )
    several = "" if videos == texts else "; any text of a clip counts as correct"
    notes = [f"Chance level: a random order of {videos} videos and of {texts} texts{several}."]
    if pairs in found:
        notes.append(
            "Chance level of matching accuracy: always answering no; two of three pairs of a batch do not match."
        )
    return Chance(found, notes)


def _recall(side: str, k: int, videos: int, texts_of: Mapping[str, int]) -> float:
    """Probability that a correct entry is among the first k of a random order, averaged over the queries."""
    if side == "t2v":
        return min(1.0, k / videos)
    texts = sum(texts_of.values())
    if k >= texts:
        return 1.0
    each = Counter(texts_of.values())  # number of texts -> number of clips
    return sum(clips * (1 - math.comb(texts - n, k) / math.comb(texts, k)) for n, clips in each.items()) / videos
