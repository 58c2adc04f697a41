"""Retrieval with mPLUG-2: contrastive and matching loss in training; in evaluation, rank by similarity and re-rank with the matching head.

All texts of a clip are positives and never negatives of it. With `config.options.momentum`, a teacher gives soft targets, and
`config.options.queue` keeps its features. See docs/models/mplug2.md, "Retrieval".
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import mplug2
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks.carried import Rows
from ymplug_jax.tasks.common import example_pages, gallery, matching, momentum, pair_losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.mplug2 import inputs, joint
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
    """The teacher and its queue, how negatives are drawn, and which pairs the matching head scores in evaluation, and how."""

    momentum: bool = option(False, predict=False)  # Adds a momentum teacher, which gives soft targets.
    # Rows of the teacher's features that are kept as further keys, a batch or more; 0 keeps none. Needs `momentum`.
    queue: int = option(0, least=0, predict=False)
    soft_share: float = option(0.4, least=0, most=1, predict=False)  # Share of the teacher in the targets.
    # Number of updates over which that share rises from 0, which is one epoch in the reference; 0 uses the whole share at once.
    soft_ramp: int = option(0, least=0, predict=False)
    # Number of rows of the batch that share negatives, which is the batch of one device in the reference; 0 uses the whole batch.
    group: int = option(0, least=0, predict=False)
    # Number of candidates of each video and each text that the matching head scores in evaluation; 0 scores all pairs.
    best: int = option(128, least=0, predict=False)
    # Re-rank by the logit of a match plus the similarity, as the evaluation of mPLUG does, instead of by the log-odds of a match.
    add_similarity: bool = option(False, predict=False)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUG2, with contrastive and matching heads."""
    data, options = experiment.data, build(Options, experiment.options)
    model = inputs.model_of(experiment)
    if not (model.reads and model.contrastive_width and model.matching):
        raise Mistake("config.model: retrieval needs reads, contrastive_width and matching; set all three")
    joint.check_teacher(options.momentum, options.queue, experiment.train)
    tokenizer, length = inputs.tokenizer_of(data, model), data.max_tokens
    losses = _Losses(model, options, pair_losses.group_of(experiment.train, options.group))

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known = preprocess.given(tokenizer)
        words = known.encode(clean_text(gallery.drawn_text(record, rng), data.max_words))
        row = inputs.encode(known, words, length)
        return {"video": preprocess.video_of(record, data, rng), **row, "clip": preprocess.clip_id(record)}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        out = within(model, params, lambda run: joint.embedded(run, video, batch["ids"], batch["mask"]))
        return out | {name: batch[name] for name in ("mask", "clip", "valid")}

    def rescore(params: Params, rows: list[Row], kept: KeptRows) -> list[Row]:
        by_head = partial(logits_of, model)
        return matching.score_pairs(by_head, params, rows, kept, options.best, summed=options.add_similarity)

    row, carried = preprocess.row_spec(length), None
    if options.momentum:
        carried = joint.carried_of(model, losses.taught, queue=options.queue, teacher=joint.EMBEDS)
    return inputs.task_of(
        model,
        kinds=(*CAPTIONED, *TITLED),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)},
        lengths=lambda record: inputs.lengths(tokenizer, data, (record.captions or [record.title])[:1], length - 2),
        loss=losses.alone,
        carried=carried,
        predict=predict,
        rescore=rescore,
        kept=("tokens", "states"),
        score=matching.report,
        scores=SCORES,
        page=example_pages.ranking("match_score", "text_match_score", "matching_accuracy"),
        embeds=True,
        fresh=("(vision_proj|text_proj|match)/.*", "temperature"),
        bounds={"temperature": mplug2.TEMPERATURE},
    )


def logits_of(model: MPLUG2, params: Params, tokens: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
    """`matching.Logits` of the model, whose tokens are those of `encode_video` and states those of `encode_text`."""
    return within(model, params, lambda run: run.match_logits(run.fuse(states, mask, tokens)[1]))


@dataclasses.dataclass(frozen=True)
class _Losses(joint.Losses):
    """The losses of the task."""

    def of(
        self, params: Params, carried: Params | None, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics, Rows]:
        model, options, valid = self.model, self.options, batch["valid"]
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        seen = queue = None
        share: jax.Array | float = 0.0
        if carried is not None:
            teacher, queue = joint.completed(carried["momentum"], params), carried.get("queue")
            seen = within(model, teacher, lambda run: joint.taught(run, video, batch))
            share = momentum.ramp(options.soft_share, carried["updates"], options.soft_ramp)
        out = within(
            model,
            params,
            lambda run: joint.forward(
                run, video, batch, seen, queue, share, key=draw, group=self.group, deterministic=key is None
            ),
            key,
        )
        total, metrics = joint.pair_metrics(out, valid)
        count = jnp.sum(valid, dtype=jnp.float32)
        metrics |= {"loss": Mean(total * count, count)}
        return total, metrics, {} if seen is None else joint.rows_of(seen, batch)
