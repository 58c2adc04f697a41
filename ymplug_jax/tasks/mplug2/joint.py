"""What pre-training and retrieval of mPLUG-2 compute: contrastive, matching, masked-word and prefix losses, and a momentum teacher.

See docs/models/mplug2.md, "Losses" and "Momentum and queues". Random draws come from a key or from an argument.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ymplug_jax.core.config import Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.models import mplug2
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks.carried import Batch, Carried, Rows
from ymplug_jax.tasks.common import distillation, losses, momentum, pair_losses, preprocess
from ymplug_jax.tasks.common.pair_losses import Negatives
from ymplug_jax.tasks.common.passes import within

COEFFICIENT = 0.995  # of the teacher in its update
SHARE = 0.4  # of the teacher in the targets, after the ramp
# Path regexes of the teacher: what embeds videos and texts and, for masked words, what reads both.
EMBEDS = ("(vision|connector|universal|visual_norm|text|vision_proj|text_proj)/.*",)
READS = ("(fusion|mlm)/.*",)

Loss = Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Metrics, Rows]]


def check_teacher(momentum_teacher: bool, queue: int, train: Train) -> None:
    """Check `config.options.momentum` and `config.options.queue`.

    Raises:
      Mistake: A queue without a teacher, or one that is shorter than a batch.
    """
    if queue and not momentum_teacher:
        raise Mistake("config.options.queue: holds features of a momentum teacher; set config.options.momentum=True")
    if queue:
        momentum.check_queue(queue, train)


@dataclasses.dataclass(frozen=True)
class Losses(abc.ABC):
    """The training loss of a task, with and without a teacher."""

    model: MPLUG2
    options: Any  # Options of the task.
    group: int  # Number of neighbouring rows that share negatives.

    @abc.abstractmethod
    def of(
        self, params: Params, carried: Params | None, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics, Rows]:
        """`Carried.loss`; without a teacher (`carried` None) there are no rows."""

    def alone(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """`Task.loss`: without a teacher, in evaluation (`key` None) without dropout."""
        loss, metrics, _ = self.of(params, None, batch, key)
        return loss, metrics

    def taught(
        self, params: Params, carried: Params, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics, Rows]:
        """`Carried.loss`."""
        return self.of(params, carried, batch, key)


def carried_of(model: MPLUG2, loss: Loss, *, queue: int, teacher: Sequence[str], fixed: Sequence[str] = ()) -> Carried:
    """The state of a task with a momentum teacher and a queue, with its update.

    Args:
      model: The model.
      loss: `Carried.loss`; its rows are video and text f32[B, E] of the teacher, clip int32[B, I] and valid bool[B].
      queue: Number of rows of the queue; 0: none.
      teacher: Path regexes of the parameters that the teacher copies, such as `EMBEDS` and `READS`.
      fixed: Path regexes of copies that do not move; the reference leaves its fusion encoder where it started.
    """
    axes = (
        *((f"momentum/{path}", words) for path, words in mplug2.axes_of(model)),
        *((f"queue/{path}", words) for path, words in momentum.QUEUE_AXES),
        ("updates", ""),
    )

    def init(params: Params, key: jax.Array) -> Params:
        tree = {"momentum": momentum.teacher_of(params, teacher), "updates": jnp.int32(0)}
        return tree | ({"queue": momentum.empty_queue(key, queue, model.contrastive_width)} if queue else {})

    def update(params: Params, carried: Params, rows: Rows) -> Params:
        copies = momentum.moved(carried["momentum"], params, COEFFICIENT, fixed=fixed)
        tree = {"momentum": copies, "updates": carried["updates"] + 1}
        return tree | ({"queue": momentum.enqueue(carried["queue"], **rows)} if queue else {})

    return Carried(axes, init, loss, update)


def completed(teacher: Params, params: Params) -> Params:
    """The teacher as parameters of a whole model: parts that it does not copy, which its passes do not use, are the model's."""
    return jax.lax.stop_gradient(params) | teacher


def embedded(run: MPLUG2, video: jax.Array, ids: jax.Array, mask: jax.Array, **how: bool) -> dict[str, jax.Array]:
    """Encode videos and texts, inside `passes.within`.

    Args:
      run: Bound model with contrastive heads.
      video: Normalised video, f[B, T, S, S, 3].
      ids: int32[B, L].
      mask: int32[B, L].
      how: `deterministic` of the model's methods.

    Returns:
      tokens f[B, M, C], states f[B, L, C], and the unit vectors video and text f32[B, E].
    """
    tokens, states = run.encode_video(video, **how), run.encode_text(ids, mask, **how)
    return {"tokens": tokens, "states": states, "video": run.embed_video(tokens), "text": run.embed_text(states)}


def taught(run: MPLUG2, video: jax.Array, batch: Batch, shown: jax.Array | None = None) -> dict[str, jax.Array]:
    """What the teacher sees in a batch, inside `passes.within`; it has no dropout.

    Args:
      run: Bound teacher.
      video: Normalised video, f[B, T, S, S, 3].
      batch: ids and mask int32[B, L].
      shown: int32[B, L], the text with masked tokens. None: no masked words.

    Returns:
      The result of `embedded` and, with `shown`, masked f[B, L, C]: the masked text after it read the video.
    """
    out = embedded(run, video, batch["ids"], batch["mask"])
    if shown is not None:
        out["masked"] = run.fuse(run.encode_text(shown, batch["mask"]), batch["mask"], out["tokens"])[1]
    return out


def rows_of(seen: dict[str, jax.Array], batch: Batch) -> Rows:
    """The rows of `carried_of`: the teacher's unit vectors, from the result of `taught`."""
    return {"video": seen["video"], "text": seen["text"], "clip": batch["clip"], "valid": batch["valid"]}


def vectors(model: MPLUG2, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Predictions of a task that `embeds`: unit vectors video and text, f32[B, E], and valid."""
    video = preprocess.normalize(batch["video"], model.vision.dtype)
    out = within(model, params, lambda run: embedded(run, video, batch["ids"], batch["mask"]))
    return {"video": out["video"], "text": out["text"], "valid": batch["valid"]}


def forward(
    run: MPLUG2,
    video: jax.Array,
    batch: Batch,
    teacher: dict[str, jax.Array] | None,
    queue: Params | None,
    share: jax.Array | float,
    *,
    key: jax.Array | None,
    group: int,
    negatives: Negatives | None = None,
    same_clip: bool = True,
    shown: jax.Array | None = None,
    deterministic: bool = True,
) -> dict[str, Any]:
    """Encode videos and texts, compare them with the teacher's, draw negatives and fuse all pairs in one pass.

    Args:
      run: Bound model inside `passes.within`, with contrastive and matching heads.
      video: Normalised video, f[B, T, S, S, 3].
      batch: ids and mask int32[B, L], clip int32[B, I], valid bool[B].
      teacher: The result of `taught`. None: the model itself takes its place, without soft targets, as in evaluation.
      queue: The queue at the start of the step. None: the keys are the batch alone.
      share: Share of the teacher in the targets.
      key: PRNG key for drawing the negatives; None if `negatives` are given.
      group: Number of neighbouring rows that share negatives.
      negatives: Negatives to use instead of drawing them.
      same_clip: Rows of the same clip are positives of each other; False: a row has itself only. Neither is ever a negative.
      shown: int32[B, L], the text with masked tokens, fused with its own video as a fourth pair.
      deterministic: False applies dropout.

    Returns:
      The result of `embedded`, temperature, contrast (`momentum.Contrast`), negatives, match f32[B, 3, 2] in the order of
      `pair_losses.pairs` and, with `shown`, masked f[B, L, C].
    """
    mask, valid = batch["mask"], batch["valid"]
    out: dict[str, Any] = embedded(run, video, batch["ids"], mask, deterministic=deterministic)
    if teacher is None:
        teacher, share = out, 0.0
    temperature = losses.bounded(run.temperature.astype(jnp.float32), *mplug2.TEMPERATURE)
    clip = batch["clip"] if same_clip else None
    contrast = momentum.contrastive(
        out["video"], out["text"], teacher["video"], teacher["text"], queue, temperature, share, clip=clip, valid=valid
    )
    if negatives is None:
        assert key is not None
        free = pair_losses.allowed(valid, batch["clip"], group)
        negatives = pair_losses.choose_among(key, contrast.to_video, contrast.to_text, free)
    texts, masks, videos = pair_losses.pairs(out["states"], mask, out["tokens"], negatives, group)  # [B, 3, ...] each
    if shown is not None:
        states = run.encode_text(shown, mask, deterministic=deterministic)
        texts, masks, videos = (
            jnp.concatenate([three, one[:, None]], axis=1)
            for three, one in ((texts, states), (masks, mask), (videos, out["tokens"]))
        )
    # Grouped by row, so that pairs stay on their row's device.
    flat = (x.reshape(-1, *x.shape[2:]) for x in (texts, masks, videos))
    fused = run.fuse(*flat, deterministic=deterministic)[1]
    fused = fused.reshape(*texts.shape[:2], *fused.shape[1:])  # [B, 3 or 4, L, C]
    out |= {"temperature": temperature, "contrast": contrast, "negatives": negatives}
    out["match"] = run.match_logits(fused[:, :3])
    return out if shown is None else out | {"masked": fused[:, 3]}


def pair_metrics(out: dict[str, Any], valid: jax.Array) -> tuple[jax.Array, Metrics]:
    """Sum of the mean contrastive and the mean matching loss of `forward`, and the metrics."""
    contrastive = Mean(out["contrast"].total, out["contrast"].weight)
    total, count, right = pair_losses.matching(out["match"], valid, out["negatives"].found)
    matching = Mean(total, count)
    metrics = {"contrastive_loss": contrastive, "matching_loss": matching, "matching_accuracy": Mean(right, count)}
    return losses.ratio(contrastive) + losses.ratio(matching), metrics


def masked_words(
    model: MPLUG2,
    params: Params,
    teacher: Params | None,
    states: jax.Array,
    taught_states: jax.Array | None,
    labels: jax.Array,
    targets: jax.Array,
    share: jax.Array | float,
    *,
    keep_logits: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Mean loss of masked words and its metrics.

    Args:
      model: The model.
      params: Its parameters.
      teacher: Those of the teacher; None: no soft targets.
      states: f[B, L, C], masked of `forward`.
      taught_states: f[B, L, C], masked of `taught`, or None.
      labels: int32[B, L].
      targets: bool[B, L], the positions that count.
      share: Share of the teacher in the targets.
      keep_logits: `config.train.keep_logits`.
    """

    def words_of(owner: Params) -> Callable[[jax.Array], jax.Array]:
        return lambda states: within(model, owner, lambda run: run.words(states))

    if teacher is None or taught_states is None:
        found = losses.words_of(words_of(params), states, labels, targets, keep_logits=keep_logits)
    else:
        found = distillation.words_of(
            words_of(params), words_of(teacher), states, taught_states, labels, targets, share, keep_logits=keep_logits
        )
    total, count, right = found
    metrics = {"masked_loss": Mean(total, count), "masked_accuracy": Mean(right, count)}
    return losses.ratio(metrics["masked_loss"]), metrics


def continued(run: MPLUG2, tokens: jax.Array, batch: Batch, **how: bool) -> jax.Array:
    """States of the decoder that continues a prefix, inside `passes.within`.

    Args:
      run: Bound model.
      tokens: f[B, M, C] of `encode_video`.
      batch: prefix and prefix_mask int32[B, K], target and target_mask int32[B, L].
      how: `deterministic` of the model's methods.

    Returns:
      f[B, L, C], of which position i predicts token i + 1 of the target.
    """
    mask = batch["prefix_mask"]
    seen, fused = run.fuse(run.encode_text(batch["prefix"], mask, **how), mask, tokens, **how)
    return run.decode(batch["target"], batch["target_mask"], mplug2.memory_of(seen, fused, mask), **how)


def prefix_words(
    model: MPLUG2, params: Params, states: jax.Array, batch: Batch, *, keep_logits: bool = False
) -> tuple[jax.Array, Metrics]:
    """Mean loss of the target's tokens, from `continued`, and its metrics; rows that are not valid do not count."""

    def logits_of(states: jax.Array) -> jax.Array:
        return within(model, params, lambda run: run.logits(states))

    mask = batch["target_mask"] * batch["valid"][:, None]
    total, count, right = losses.next_token_of(
        logits_of, states[:, :-1], batch["target"], mask, keep_logits=keep_logits
    )
    metrics = {"prefix_loss": Mean(total, count), "prefix_accuracy": Mean(right, count)}
    return losses.ratio(metrics["prefix_loss"]), metrics
