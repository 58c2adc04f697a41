"""Ranks and recalls from the scores of video-text pairs."""

from collections.abc import Sequence

import numpy as np

from ymplug_jax.data.records import Split
from ymplug_jax.tasks.common import gallery, task_metrics
from ymplug_jax.tasks.task import Report, Row


def score(rows: list[Row], records: Split, names: Sequence[str]) -> Report:
    """Recalls of every score in both directions. The readable rows are ranked by the last score.

    Args:
      rows: The scores f32[texts] by name, "scored" bool[texts], and "fallback" f32[texts], which orders the unscored pairs.
      records: Records of the split.
      names: Names of the scores.

    Raises:
      Mistake: A score is not finite; the message names the first such video and its text.
    """
    found = [records[int(row["index"])] for row in rows]
    clip, first = gallery.clips_of([record.media_id for record in found])
    right = np.arange(len(first))[:, None] == clip  # [videos, texts]
    scored, fallback = (np.stack([rows[i][key] for i in first]) for key in ("scored", "fallback"))
    scores = gallery.gallery_of(found, len(first))
    orders, ranks = {}, {}
    for name in names:
        matrix = np.stack([rows[i][name] for i in first])
        for values in (np.where(scored, matrix, 0), fallback):
            _check(values, name, [rows[i] for i in first], rows, records)
        orders[name] = in_one_order(matrix, scored, fallback)
        ranks[name] = task_metrics.ranks_in(orders[name], right), task_metrics.ranks_in(orders[name].T, right.T)
        scores |= {f"{name}/{key}": value for key, value in task_metrics.recalls(*ranks[name]).items()}
    v2t, t2v = ranks[names[-1]]
    readable = []
    for r, (row, record) in enumerate(zip(rows, found, strict=True)):
        column, line = orders[names[-1]][:, r], orders[names[-1]][clip[r]]
        best = task_metrics.order(column)[:10]
        answer = {"index": int(row["index"]), "id": record.media_id, "text": gallery.text_of(record)}
        answer |= {"t2v_rank": int(t2v[r]), "v2t_rank": int(v2t[clip[r]])}
        answer["retrieved"] = [found[first[v]].media_id for v in best]
        answer["retrieved_index"] = [int(rows[first[v]]["index"]) for v in best]
        answer["match_score"] = [round(float(column[v]), 4) if scored[v, r] else None for v in best]
        texts = task_metrics.order(line)[:5]
        answer["retrieved_texts"] = [gallery.text_of(found[t]) for t in texts]
        answer["retrieved_texts_right"] = [bool(clip[t] == clip[r]) for t in texts]
        answer["text_match_score"] = [round(float(line[t]), 4) if scored[clip[r], t] else None for t in texts]
        readable.append(answer)
    return Report(scores, readable)


def in_one_order(scores: np.ndarray, scored: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Order scored pairs by their score, followed by the unscored pairs in the order of `fallback`.

    Args:
      scores: f32[V, G]; values of unscored pairs are ignored.
      scored: bool[V, G].
      fallback: f32[V, G].

    Returns:
      f64[V, G], finite. In float32, shifting the similarities below the scores would merge close values.
    """
    lowest = float(scores[scored].min()) if scored.any() else 0.0
    others = lowest - 1.0 - (fallback.max() - fallback.astype(np.float64))
    return np.where(scored, scores.astype(np.float64), others)


def _check(values: np.ndarray, name: str, videos: list[Row], texts: list[Row], records: Split) -> None:
    """Raise a Mistake that names the first pair with a non-finite score in f32[V, G]."""

    def pair(v: int) -> str:
        text = texts[int(np.argmax(~np.isfinite(values[v])))]
        return f"{task_metrics.example_name(videos[v], records)} with the text of {task_metrics.example_name(text, records)}"

    task_metrics.check_finite(values, f"the model's {name!r}", pair)
