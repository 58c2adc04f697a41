"""Video-text retrieval with two towers: the CLS token of the video and the decoder's state at the end of the text.

The negatives of the contrastive loss are all rows of the global batch except those of the same clip, which are positives. Evaluation
ranks the full gallery in both directions and writes `index.npz`, which `predict retrieve` and the task "match" read.
See docs/models/mplug_video.md, "Retrieval head".
"""

import jax
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import example_pages, gallery, losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug_video import passes
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Task

ANSWERS = ("retrieve",)
SCORES = (*scores.losses("contrastive_loss", "loss"), *scores.recalls(""))
# Retrieval neither uses nor updates abstractor and connector; they stay in the checkpoint.
FROZEN = (*mplug_video.FROZEN, "abstractor/.*", "connector/.*")


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGVideo, with contrastive heads."""
    data = experiment.data
    model, tokenizer = passes.model_of(experiment)
    length = data.max_tokens
    passes.check_room(model, length)
    if not model.contrastive_width:
        raise ValueError(
            "config.model.contrastive_width: 0, but retrieval needs contrastive heads; set it to 256, as the published recipe does"
        )

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(gallery.drawn_text(record, rng), data.max_words)
        row = preprocess.encode(preprocess.given(tokenizer), title, length)
        return {"video": preprocess.video_of(record, data, rng), **row, "clip": preprocess.clip_id(record)}

    def embed(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        def read(run: MPLUGVideo) -> tuple[jax.Array, jax.Array]:
            video = run.embed_video(preprocess.normalize(batch["video"], model.vision.dtype))
            return video, run.embed_text(run.hidden(None, batch["ids"], deterministic=key is None), batch["mask"])

        return within(model, params, read, key)

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        video, text = embed(params, batch, key)
        pair = losses.retrieval(video, text, params["temperature"], batch["clip"], valid=batch["valid"])
        mean = Mean(*pair)
        return losses.ratio(mean), {"contrastive_loss": mean, "loss": mean}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        video, text = embed(params, batch, None)
        return {"video": video, "text": text, "valid": batch["valid"]}

    row = preprocess.row_spec(length)
    return passes.task_of(
        model,
        FROZEN,
        kinds=(*CAPTIONED, *TITLED),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        score=gallery.rank_all,
        scores=SCORES,
        page=example_pages.ranking("similarity", "text_similarity"),
        embeds=True,
        fresh=("(vision_proj|text_proj)/.*", "temperature"),
    )
