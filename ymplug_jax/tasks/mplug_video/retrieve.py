"""Video-text retrieval with two towers: cls token of the video, end state of the text in the decoder alone (spec 8.4).

The contrastive loss sees the whole global batch; texts of one clip are all right for it. Evaluation ranks the full
gallery in both directions and leaves `index.npz`, which `predict retrieve` and the task "match" read.
"""

from collections.abc import Sequence

import jax
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import losses, preprocess, ranking, task_metrics
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Report, Row, Task, build

# Queries, abstractor and connector stay in the checkpoint; this task neither uses nor updates them.
FROZEN = (*mplug_video.FROZEN, "abstractor/.*", "connector/.*")


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of MPLUGVideo, with contrastive heads."""
    data = experiment.data
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    length = data.max_tokens
    preprocess.check(data, model, length)
    if not model.contrastive_width:
        raise ValueError(
            "config.model.contrastive_width is 0; retrieval needs the contrastive heads, the recipe has 256"
        )
    tokenizer = preprocess.tokenizer_for(data, model.llm.vocab)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        texts = record.captions or [record.title]
        title = clean_text(texts[0 if rng is None else int(rng.integers(len(texts)))], data.max_words)
        row = preprocess.encode(preprocess.given(tokenizer), title, length)
        return {"video": preprocess.video_of(record, data, rng), **row, "clip": preprocess.clip_id(record)}

    def embed(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        run = model.bind({"params": params}, rngs={} if key is None else {"dropout": key})
        video = run.embed_video(preprocess.normalize(batch["video"], model.vision.dtype))
        return video, run.embed_text(run.hidden(None, batch["ids"], deterministic=key is None), batch["mask"])

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        video, text = embed(params, batch, key)
        pair = losses.retrieval(video, text, params["temperature"], batch["clip"], valid=batch["valid"])
        mean = Mean(*pair)
        return losses.ratio(mean), {"contrastive_loss": mean, "loss": mean}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        video, text = embed(params, batch, None)
        return {"video": video, "text": text, "valid": batch["valid"]}

    def score(rows: list[Row], records: Sequence[Record]) -> Report:
        return rank_all(rows, records)

    row = preprocess.row_spec(length)
    return Task(
        kinds=(*CAPTIONED, *TITLED),
        axes=mplug_video.axes_of(model),
        frozen=FROZEN,
        init=lambda key: mplug_video.init(model, key),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        score=score,
        fresh=("(vision_proj|text_proj)/.*", "temperature"),
        resize=mplug_video.RESIZE,
    )


def text_of(record: Record) -> str:
    """The text that retrieval knows a record by, as it stands in the CSV."""
    return record.captions[0] if record.captions else record.title


def clips_of(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(clip number of each row, first row of each clip): clips are numbered by first appearance."""
    numbers: dict[str, int] = {}
    clip = np.array([numbers.setdefault(name, len(numbers)) for name in names], int)
    return clip, np.unique(clip, return_index=True)[1]


def gallery_of(records: Sequence[Record], videos: int) -> dict[str, object]:
    """What the recalls of these records were taken over, for scores.json."""
    scores: dict[str, object] = {"modalities": "video, text", "videos": videos, "texts": len(records)}
    if more := sum(len(record.captions) > 1 for record in records):
        scores["note"] = (
            f"{more} rows have several captions, of which the first is the query; build the shards with one caption a row to "
            "score all of them"
        )
    return scores


def rank_all(rows: list[Row], records: Sequence[Record]) -> Report:
    """Every text against every clip and back; a clip that has several rows stands in the gallery once.

    For a clip the texts of all its rows are right. A text is a query of its own, and only its own clip is right for it: a
    clip that another row describes with the same words is wrong. Ties count against the model (`metrics.ranks_in`).

    Raises:
      Mistake: vectors that are not finite; the message names the first example.
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
