"""Losses as pure functions. Each returns a sum and a weight: add both over rows, hosts and micro-batches, then divide once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ymplug_jax.core.metrics import Mean, Metrics

TOGETHER = 128  # positions over all rows below which a product with the vocabulary is slow: reading the table dominates


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each position in float32: f[..., V], int[...] -> f32[...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def target_mask(mask: jax.Array, prompt_lengths: jax.Array | None = None) -> jax.Array:
    """Which tokens are targets: int or bool[B, L] -> bool[B, L - 1], entry j for token j + 1.

    Padding is no target, nor are the first `prompt_lengths` (int[B]) tokens after the start token. The end token is one.
    """
    targets = mask[:, 1:].astype(bool)
    if prompt_lengths is not None:
        targets &= jnp.arange(targets.shape[1]) >= prompt_lengths[:, None]
    return targets


def next_token(
    logits: jax.Array, ids: jax.Array, mask: jax.Array, prompt_lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Language-model loss. Its mean is over the tokens of the whole global batch (one process: the reference's own mean).

    Args:
      logits: f[B, L - 1, V] at the positions of tokens 0..L-2, where position j predicts token j + 1. A visual prefix predicts
        nothing, so its positions need not be computed.
      ids: int[B, L], the start token first.
      mask: int or bool[B, L], 1 up to and including the end token; all 0 drops a row.
      prompt_lengths: int[B], tokens after the start token that are given, not predicted; None: none are.

    Returns:
      (sum of the cross-entropies, number of targets), float32 scalars.
    """
    targets = target_mask(mask, prompt_lengths)
    losses = token_losses(logits, ids[:, 1:])  # [B, L - 1]
    return jnp.sum(jnp.where(targets, losses, 0)), jnp.sum(targets, dtype=jnp.float32)


def next_token_of(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    prompt_lengths: jax.Array | None = None,
    *,
    keep_logits: bool = False,
    positions: int = 16,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`next_token` from hidden states, a few positions at a time: logits of the whole batch never exist, in either direction.

    Args:
      logits_of: f[..., D] -> f[..., V].
      hidden: f[B, L - 1, D] at the positions of tokens 0..L-2.
      ids: int[B, L], the start token first.
      mask: int or bool[B, L], 1 up to and including the end token.
      prompt_lengths: int[B], tokens after the start token that are given, not predicted; None: none are.
      keep_logits: keep them for the backward pass; otherwise they are computed once more there.
      positions: of each row that meet the vocabulary at once, at most; a small batch takes more, up to `TOGETHER` over all rows.

    Returns:
      (sum of the cross-entropies, number of targets, number of targets that are the likeliest token), float32 scalars.
    """
    targets = target_mask(mask, prompt_lengths)
    return words_of(logits_of, hidden, ids[:, 1:], targets, keep_logits=keep_logits, positions=positions)


def words_of(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    targets: jax.Array,
    *,
    keep_logits: bool = False,
    positions: int = 16,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of the words at some positions, a few positions at a time, as in `next_token_of`.

    Args:
      logits_of: f[..., D] -> f[..., V].
      hidden: f[B, L, D].
      labels: int[B, L].
      targets: bool[B, L], the positions that count.
      keep_logits: keep them for the backward pass.
      positions: of each row that meet the vocabulary at once, at most.

    Returns:
      (sum of the cross-entropies, number of targets, number of targets that are the likeliest token), float32 scalars.
    """
    length = hidden.shape[1]
    parts = -(-length // max(positions, TOGETHER // hidden.shape[0]))
    width = -(-length // parts)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, parts * width - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], parts, width, *x.shape[2:]), 1, 0)  # [parts, B, width, ...]

    def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
        states, labels, kept = part
        logits = logits_of(states)  # [B, width, V]
        right = (jnp.argmax(logits, axis=-1) == labels) & kept
        loss = jnp.sum(jnp.where(kept, token_losses(logits, labels), 0))
        return (sums[0] + loss, sums[1] + jnp.sum(right, dtype=jnp.float32)), None

    zero = jnp.float32(0)
    step = add if keep_logits else jax.checkpoint(add)
    (loss, right), _ = jax.lax.scan(step, (zero, zero), (cut(hidden), cut(labels), cut(targets)))
    return loss, jnp.sum(targets, dtype=jnp.float32), right


def similarity(video: jax.Array, text: jax.Array) -> jax.Array:
    """Best match among the queries of a video: f32[B, Q, E], f32[G, E] -> f32[B, G]."""
    return jnp.einsum("bqe,ge->bgq", video, text, precision="highest").max(axis=-1)


def contrastive(
    video: jax.Array, text: jax.Array, temperature: jax.Array, *, smoothing: float = 0.1, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Video-text contrastive loss with label smoothing, both directions, over the global batch.

    Plain array code: under `jax.jit` with the batch cut over devices every row meets every other row, with exact gradients.

    Args:
      video: f32[B, Q, E], unit vectors; a video's similarity to a text is that of its best query.
      text: f32[B, E], unit vectors; row i belongs to video i.
      temperature: scalar divisor, learned; bounded below by 1e-3 as a guard.
      smoothing: share of the target that is spread evenly over the batch.
      valid: bool[B]; rows that are padding are neither queries nor candidates. None: all are valid.

    Returns:
      (sum over rows of the mean of both directions, number of rows), float32 scalars.
    """
    valid = jnp.ones(video.shape[0], bool) if valid is None else valid
    count = jnp.sum(valid, dtype=jnp.float32)
    scores = similarity(video, text) / bounded(temperature)  # [B, B], video by text

    def direction(scores: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(jnp.where(valid, scores, jnp.finfo(jnp.float32).min), axis=-1)
        spread = jnp.sum(jnp.where(valid, logs, 0), axis=-1) / jnp.maximum(count, 1)
        return -(1 - smoothing) * jnp.diagonal(logs) - smoothing * spread  # [B]

    rows = 0.5 * (direction(scores) + direction(scores.T))
    return jnp.sum(jnp.where(valid, rows, 0)), count


def retrieval(
    video: jax.Array, text: jax.Array, temperature: jax.Array, ids: jax.Array, *, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Video-text contrastive loss with several positives, both directions, over the global batch.

    Args:
      video: f32[B, E], unit vectors.
      text: f32[B, E], unit vectors; row i belongs to video i.
      temperature: scalar divisor, learned; bounded below by 1e-3 as a guard.
      ids: int32[B, I], rows that are equal are one clip: all their texts are right for all their videos.
      valid: bool[B]; rows that are padding are neither queries nor candidates. None: all are valid.

    Returns:
      (sum over rows of the mean of both directions, number of rows), float32 scalars.
    """
    valid = jnp.ones(video.shape[0], bool) if valid is None else valid
    scores = jnp.einsum("be,ge->bg", video, text, precision="highest") / bounded(temperature)  # [B, B], video by text
    same = jnp.all(ids[:, None] == ids[None], axis=-1) & valid & valid[:, None]
    targets = same / jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1)

    def direction(scores: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(jnp.where(valid, scores, jnp.finfo(jnp.float32).min), axis=-1)
        return -jnp.sum(jnp.where(same, targets * logs, 0), axis=-1)  # [B]

    rows = 0.5 * (direction(scores) + direction(scores.T))
    return jnp.sum(jnp.where(valid, rows, 0)), jnp.sum(valid, dtype=jnp.float32)


def bounded(temperature: jax.Array, low: float = 1e-3, high: float = float("inf")) -> jax.Array:
    """The temperature within limits; its gradient passes unchanged."""
    return temperature + jax.lax.stop_gradient(jnp.clip(temperature, low, high) - temperature)


def classification(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of classes: f[B, C], int32[B], bool[B] -> (sum, number of rows); rows with label -1 count for nothing."""
    valid = valid & (labels >= 0)
    each = token_losses(logits, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(valid, each, 0)), jnp.sum(valid, dtype=jnp.float32)


def ratio(mean: Mean) -> jax.Array:
    """total / weight on the device, 0 where nothing was counted."""
    return mean.total / jnp.maximum(mean.weight, 1.0)


def chosen(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the label has the highest logit: f[..., C], int[...] -> bool[...]. Ties count against the label, as in
    `task_metrics.top_k`, and so do logits that are not numbers."""
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    label = jnp.max(logits, axis=-1, where=own, initial=-jnp.inf)  # -inf: no such class
    return jnp.all(own | (logits < label[..., None]), axis=-1)


def words_and_head(
    words: tuple[jax.Array, jax.Array], votes: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Metrics]:
    """What the decoder says plus what a head votes, each a mean of its own, weight 1 each.

    Args:
      words: of `next_token`.
      votes: f[B, C], logits of the head.
      labels: int32[B].
      valid: bool[B], rows that count.
    """
    generation, head = Mean(*words), Mean(*classification(votes, labels, valid))
    right = jnp.sum(chosen(votes, labels) & valid, dtype=jnp.float32)
    total = ratio(generation) + ratio(head)
    return total, {
        "generation_loss": generation,
        "head_loss": head,
        "head_accuracy": Mean(right, head.weight),
        "loss": Mean(total * head.weight, head.weight),
    }
