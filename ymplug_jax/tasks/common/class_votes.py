"""Classification results: scores, readable rows, and the answer of `predict classify`."""

from collections.abc import Mapping, Sequence

import numpy as np

from ymplug_jax.data.records import Record, Split
from ymplug_jax.tasks.common import candidates, task_metrics
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import Report, Row

MODALITIES = ("both", "video", "title")  # inputs given to the model


def report(rows: list[Row], records: Split, names: Sequence[str], by: Sequence[str]) -> Report:
    """Top-1 and top-5 accuracy of every modality and kind of vote.

    Ties count against the model (`task_metrics.top_k`), in the scores and in "predicted". A label that is not among the names
    counts as missed.

    Args:
      rows: "label" (-1: none) and, for each kind in `by`, votes f32[3, C] in the order of MODALITIES.
      records: Records of the split.
      names: Names of the C classes.
      by: Kinds of votes; "predicted" is the best class of the first kind.

    Raises:
      Mistake: A vote is not finite; the message names the first such example.
    """
    task_metrics.check_rows(rows, records, *by)
    known = [row for row in rows if row["label"] >= 0]
    unlisted = sum(1 for row in rows if row["label"] < 0 and records[int(row["index"])].label_text)
    labelled = len(known) + unlisted
    scores: dict[str, object] = {"modalities": "both (video and title), video, title", "labelled": labelled}
    scores["classes"] = len(names)
    if unlisted:
        scores["unlisted"] = unlisted
    if not labelled:
        scores["note"] = "this split has no labels: predictions are written, nothing is scored"
    for m, modality in enumerate(MODALITIES):
        for kind in by if labelled else ():
            ranks = np.full(labelled, np.inf)  # unlisted labels keep the rank inf and count as missed
            if known:
                votes, labels = np.stack([row[kind][m] for row in known]), np.array([row["label"] for row in known])
                ranks[: len(known)] = task_metrics.class_ranks(votes, labels)
            for k in (1, 5):
                scores[f"{modality}/{kind}_top{k}"] = 100 * float(np.mean(ranks <= k))
    return Report(scores, [readable(row, records, names, by) for row in rows])


def readable(row: Row, records: Split, names: Sequence[str], by: Sequence[str]) -> dict:
    """Readable row of one example: its label and the predicted class names."""
    record = records[int(row["index"])]
    answer = {"index": int(row["index"]), "id": record.media_id, "title": record.title}
    label = int(row["label"])
    answer["label"] = names[label] if label >= 0 else record.label_text or None
    for m, modality in enumerate(MODALITIES):
        answer |= {f"{modality}/{kind}": names[task_metrics.order(row[kind][m], label)[0]] for kind in by}
    shares = np.asarray(candidates.probabilities(row[by[0]][0]))
    best = task_metrics.order(row[by[0]][0], label)[:5]
    return answer | {"predicted": names[best[0]], "top5": {names[c]: float(shares[c]) for c in best}}


def answer(row: Mapping[str, np.ndarray], record: Record, best: int, names: Sequence[str], by: Sequence[str]) -> Answer:
    """The most likely classes of one clip by the first kind of vote, and the class of the head. The title is used if there is one.

    Args:
      row: Votes f32[3, C] of each kind in `by` and of "head".
      record: Record of the clip.
      best: Number of classes to return.
      names: Names of the C classes.
      by: Kinds of votes.
    """
    given = MODALITIES.index("both" if record.title else "video")
    votes, head = row[by[0]][given], row["head"][given]
    shares = np.exp(votes - np.logaddexp.reduce(votes))
    order = np.argsort(-shares, kind="stable")[:best]
    found = {
        "video": record.media_id,
        "class": names[order[0]],
        "head": names[int(head.argmax())],
        "shown": "video and title" if record.title else "video",
        "best": {names[c]: round(float(shares[c]), 4) for c in order},
    }
    percent = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found["best"].items())
    by_whom = f"   by {found['shown']}: {percent}; the head says {found['head']}"
    return Answer(found, (f"{record.media_id}: {found['class']}", by_whom))
