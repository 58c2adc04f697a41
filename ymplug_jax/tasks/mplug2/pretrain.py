"""Pre-training of mPLUG-2: contrastive, matching, masked words, and a decoder that continues a prefix or follows an instruction.

The losses are summed. With `config.options.momentum`, a teacher gives soft targets, and `config.options.queue` keeps its features.
See docs/models/mplug2.md, "Losses" and "Momentum and queues".
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

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
from ymplug_jax.tasks.common import chance, example_pages, gallery, momentum, pair_losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug2 import inputs, joint
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.presentation import Chance, ReadableRow, Scores
from ymplug_jax.tasks.task import TITLED, Batch, Example, Task

ANSWERS = ("retrieve",)
SCORES = (
    *scores.losses("contrastive_loss", "loss"),
    *scores.shares("masked_accuracy"),
    *scores.losses("masked_loss"),
    *scores.shares("matching_accuracy"),
    *scores.losses("matching_loss"),
    *scores.shares("prefix_accuracy"),
    *scores.losses("prefix_loss"),
    *scores.recalls(""),
)
NEVER = ("pad", "bos")  # tokens that are never masked


@dataclasses.dataclass(frozen=True)
class Options:
    """The teacher and its queue, what is masked, how negatives are drawn, and what the decoder follows."""

    momentum: bool = option(False, predict=False)  # Adds a momentum teacher, which gives soft targets.
    # Rows of the teacher's features that are kept as further negatives, a batch or more; 0 keeps none. Needs `momentum`.
    queue: int = option(0, least=0, predict=False)
    soft_share: float = option(0.4, least=0, most=1, predict=False)  # Share of the teacher in the targets.
    # Number of updates over which that share rises from 0, which is one epoch in the reference; 0 uses the whole share at once.
    soft_ramp: int = option(0, least=0, predict=False)
    # Share of the tokens that are selected for prediction.
    masked_share: float = option(0.15, least=0, most=1, predict=False)
    # Number of rows of the batch that share negatives, which is the batch of one device in the reference; 0 uses the whole batch.
    group: int = option(0, least=0, predict=False)
    # Text that stands for the prefix in half of the examples, whose target is the whole title; "" cuts all titles.
    instruction: str = option("", predict=False)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUG2, with all parts and the heads of the losses."""
    data, options = experiment.data, build(Options, experiment.options)
    model = inputs.model_of(experiment)
    if not (model.contrastive_width and model.matching and model.masked and model.reads and model.generates):
        raise Mistake(
            "config.model: pre-training needs contrastive_width, matching, masked, reads and generates; set all five"
        )
    joint.check_teacher(options.momentum, options.queue, experiment.train)
    tokenizer, length = inputs.tokenizer_of(data, model), data.max_tokens
    group = pair_losses.group_of(experiment.train, options.group)
    losses = _Losses(model, options, group, inputs.specials_of(tokenizer), experiment.train.keep_logits)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known = preprocess.given(tokenizer)
        words = known.encode(clean_text(record.title, data.max_words))
        return {
            "video": preprocess.video_of(record, data, rng),
            **inputs.encode(known, words, length),
            **inputs.continuation(known, words, length, rng, options.instruction),
            "clip": preprocess.clip_id(record),
        }

    def by_chance(found: Scores, rows: Sequence[ReadableRow]) -> Chance:
        tokens = chance.tokens(found, model.text.vocab, "masked_accuracy")
        return chance.both(page.chance(found, rows), tokens)

    page = example_pages.ranking("similarity", "text_similarity", "matching_accuracy")
    names = ("ids", "mask", "prefix", "prefix_mask", "target", "target_mask")
    spec = {"video": preprocess.video_spec(data), "clip": preprocess.row_spec(2)}
    carried = None
    if options.momentum:
        teacher = (*joint.EMBEDS, *joint.READS)
        carried = joint.carried_of(model, losses.taught, queue=options.queue, teacher=teacher)
    return inputs.task_of(
        model,
        kinds=TITLED,
        example=example,
        spec=spec | dict.fromkeys(names, preprocess.row_spec(length)),
        lengths=lambda record: inputs.lengths(tokenizer, data, [record.title], length - 2),
        loss=losses.alone,
        carried=carried,
        predict=partial(joint.vectors, model),
        score=gallery.rank_all,
        scores=SCORES,
        page=dataclasses.replace(page, chance=by_chance),
        embeds=True,
        fresh=("(vision_proj|text_proj|match)/.*", "temperature"),
        bounds={"temperature": mplug2.TEMPERATURE},
    )


@dataclasses.dataclass(frozen=True)
class _Losses(joint.Losses):
    """The losses of the task."""

    specials: dict[str, int]
    keep_logits: bool

    def of(
        self, params: Params, carried: Params | None, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics, Rows]:
        model, options, valid = self.model, self.options, batch["valid"]
        draws = jax.random.split(jax.random.key(0) if key is None else jax.random.fold_in(key, 1))
        masking = pair_losses.draw_masking(draws[0], batch["ids"].shape, model.text.vocab, options.masked_share)
        never = tuple(self.specials[name] for name in NEVER)
        shown, told = pair_losses.mask_words(batch["ids"], masking, never, self.specials["mask"])
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        teacher = seen = None
        share: jax.Array | float = 0.0
        if carried is not None:
            teacher = joint.completed(carried["momentum"], params)
            seen = within(model, teacher, lambda run: joint.taught(run, video, batch, shown))
            share = momentum.ramp(options.soft_share, carried["updates"], options.soft_ramp)

        def read(run: MPLUG2) -> dict[str, Any]:
            calm = key is None
            queue = None if carried is None else carried.get("queue")
            out = joint.forward(
                run, video, batch, seen, queue, share, key=draws[1], group=self.group, same_clip=False, shown=shown,
                deterministic=calm,
            )  # fmt: skip
            return out | {"continued": joint.continued(run, out["tokens"], batch, deterministic=calm)}

        out = within(model, params, read, key)
        pairs, metrics = joint.pair_metrics(out, valid)
        taught_states = None if seen is None else seen["masked"]
        words, of_words = joint.masked_words(
            model, params, teacher, out["masked"], taught_states, batch["ids"], told & valid[:, None], share,
            keep_logits=self.keep_logits,
        )  # fmt: skip
        prefix, of_prefix = joint.prefix_words(model, params, out["continued"], batch, keep_logits=self.keep_logits)
        total, count = pairs + words + prefix, jnp.sum(valid, dtype=jnp.float32)
        metrics |= of_words | of_prefix | {"loss": Mean(total * count, count)}
        return total, metrics, {} if seen is None else joint.rows_of(seen, batch)
