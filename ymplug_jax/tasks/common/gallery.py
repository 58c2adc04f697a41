"""Retrieval over a whole split: rank every text against every clip by their embeddings, in both directions."""

from collections.abc import Sequence

import numpy as np

from ymplug_jax.data.records import Record, Split
from ymplug_jax.tasks.common import ranking, task_metrics
from ymplug_jax.tasks.task import Report, Row


def text_of(record: Record) -> str:
    """The text of a record that retrieval uses, unchanged from the CSV: its first caption, or its title if it has none."""
    return record.captions[0] if record.captions else record.title


def drawn_text(record: Record, rng: np.random.Generator | None) -> str:
    """A random caption of a record in training, the first one in evaluation; the title if the record has no captions."""
    texts = record.captions or [record.title]
    return texts[0 if rng is None else int(rng.integers(len(texts)))]


def clips_of(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(clip number of each row, first row of each clip). Clips are numbered in order of first appearance."""
    numbers: dict[str, int] = {}
    clip = np.array([numbers.setdefault(name, len(numbers)) for name in names], int)
    return clip, np.unique(clip, return_index=True)[1]


def gallery_of(records: Sequence[Record], videos: int) -> dict[str, object]:
    """The size of the gallery, for scores.json."""
    scores: dict[str, object] = {"modalities": "video, text", "videos": videos, "texts": len(records)}
    if more := sum(len(record.captions) > 1 for record in records):
        scores["note"] = (
            f"{more} rows have several captions and only the first is a query; build the shards with one caption per row to "
            "score all of them"
        )
    return scores


def rank_all(rows: list[Row], records: Split) -> Report:
    """Rank every text against every clip and every clip against every text.

    A clip with several rows is in the gallery once, and the texts of all its rows are correct for it. For a text only its own
    clip is correct: another clip that is described by the same words counts as wrong. Ties count against the model
    (`task_metrics.ranks_in`).

    Raises:
      Mistake: An embedding is not finite; the message names the first such example.
    """
    task_metrics.check_rows(rows, records, "video", "text")
    found = [records[int(row["index"])] for row in rows]
    clip, first = clips_of([record.media_id for record in found])
    texts = np.stack([row["text"] for row in rows])
    videos = np.stack([rows[i]["video"] for i in first])
    v2t, best_texts, text_similarity = ranking.rank(videos, texts, np.arange(len(first)), clip)
    t2v, best_videos, similarity = ranking.rank(texts, videos, clip, np.arange(len(first)))
    names = [found[i].media_id for i in first]
    readable = []
    for r, (row, record) in enumerate(zip(rows, found, strict=True)):
        answer = {"index": int(row["index"]), "id": record.media_id, "text": text_of(record), "t2v_rank": int(t2v[r])}
        answer["retrieved"] = [names[c] for c in best_videos[r]]
        answer["retrieved_index"] = [int(rows[first[c]]["index"]) for c in best_videos[r]]
        answer["similarity"] = [round(float(s), 4) for s in similarity[r]]
        answer["v2t_rank"] = int(v2t[clip[r]])
        answer["retrieved_texts"] = [text_of(found[t]) for t in best_texts[clip[r]][:5]]
        answer["retrieved_texts_right"] = [bool(clip[t] == clip[r]) for t in best_texts[clip[r]][:5]]
        answer["text_similarity"] = [round(float(s), 4) for s in text_similarity[clip[r]][:5]]
        readable.append(answer)
    scores = gallery_of(found, len(first)) | task_metrics.recalls(v2t, t2v)
    arrays = {
        "video": videos,
        "video_id": np.array(names),
        "text": texts,
        "text_of": np.array([text_of(record) for record in found]),
        "text_clip": clip,
    }
    return Report(scores, readable, arrays)
