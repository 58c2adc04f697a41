"""Retrieval with ALPRO: contrastive and matching loss in training; in evaluation, rank by similarity and re-rank with the matching head.

All texts of a clip are positives and never negatives of it; `config.options.reference_negatives` allows them as negatives.
See docs/models/alpro.md, "Retrieval head".
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import example_pages, gallery, matching, pair_losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Row, Task

ANSWERS = ("retrieve",)
SCORES = (
    *scores.losses("contrastive_loss", "loss"),
    *scores.shares("matching_accuracy"),
    *scores.losses("matching_loss"),
    *scores.recalls("match", ""),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How negatives are drawn, and which pairs the matching head scores in evaluation."""

    # Allow other rows of the same clip as negatives, as the reference does.
    reference_negatives: bool = option(False, predict=False)
    # Number of candidates of each video and each text that the matching head scores in evaluation; 0 scores all pairs.
    best: int = option(32, least=0, predict=False)
    # Number of rows of the batch that share negatives, which is the batch of one device in the reference; 0 uses the whole batch.
    group: int = option(0, least=0, predict=False)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of ALPRO, with contrastive and matching heads."""
    data, options = experiment.data, build(Options, experiment.options)
    model = encode_pairs.model_of(experiment)
    if not (model.contrastive_width and model.matching):
        raise ValueError("config.model: retrieval needs contrastive_width and matching; set both")
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens
    group = pair_losses.group_of(experiment.train, options.group)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(gallery.drawn_text(record, rng), data.max_words)
        row = encode_pairs.encode(tokenizer, title, length, model)
        return {"video": preprocess.video_of(record, data, rng), **row, "clip": preprocess.clip_id(record)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        clip = None if options.reference_negatives else batch["clip"]

        def read(run: ALPRO) -> dict[str, Any]:
            video = preprocess.normalize(batch["video"], model.vision.dtype)
            return encode_pairs.forward(run, video, batch, key=draw, group=group, clip=clip, deterministic=key is None)

        out = within(model, params, read, key)
        total, metrics = encode_pairs.pair_metrics(out, batch["valid"], batch["clip"])
        return encode_pairs.with_loss(total, metrics, batch["valid"])

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        out = within(model, params, lambda run: encode_pairs.contrast(run, *encode_pairs.seen(run, batch)))
        row = {name: batch[name] for name in ("mask", "clip", "valid")}
        return row | {name: out[name] for name in ("tokens", "states", "video", "text")}

    def rescore(params: Params, rows: list[Row], kept: KeptRows) -> list[Row]:
        return matching.score_pairs(partial(logits_of, model), params, rows, kept, options.best)

    row = preprocess.row_spec(length)
    return encode_pairs.task_of(
        model,
        kinds=(*CAPTIONED, *TITLED),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        rescore=rescore,
        kept=("tokens", "states"),
        score=matching.report,
        scores=SCORES,
        page=example_pages.ranking("match_score", "text_match_score", "matching_accuracy"),
        embeds=True,
        fresh=(*alpro.TEMPORAL, "(vision_proj|text_proj|match|connector)/.*", "temperature"),
        bounds={"temperature": alpro.TEMPERATURE},
    )


def logits_of(model: ALPRO, params: Params, tokens: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
    """`matching.Logits` of the model, whose tokens are those of `encode_video` and states those of `encode_text`."""
    return within(model, params, lambda run: run.match_logits(run.fuse(states, mask, tokens)))
