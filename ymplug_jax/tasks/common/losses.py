"""Losses as pure functions. Each returns a sum and a weight, which are added over rows, hosts and micro-batches and divided once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ymplug_jax.core.metrics import Mean, Metrics

TOGETHER = 128  # positions per product with the vocabulary; with fewer, reading the embedding table dominates


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each position, computed in float32: f[..., V], int[...] -> f32[...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def target_mask(mask: jax.Array, prompt_lengths: jax.Array | None = None) -> jax.Array:
    """Mask of the target tokens: int or bool[B, L] -> bool[B, L - 1], entry j for token j + 1.

    The end token is a target. Padding and the first `prompt_lengths` (int[B]) tokens after the start token are not.
    """
    targets = mask[:, 1:].astype(bool)
    if prompt_lengths is not None:
        targets &= jnp.arange(targets.shape[1]) >= prompt_lengths[:, None]
    return targets


def next_token(
    logits: jax.Array, ids: jax.Array, mask: jax.Array, prompt_lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Language-model loss. Divided by the weight, it is the mean over the target tokens of the global batch.

    Args:
      logits: f[B, L - 1, V] at the positions of tokens 0..L-2, where position j predicts token j + 1. The visual prefix
        predicts nothing, so its logits are not needed.
      ids: int[B, L], the start token first.
      mask: int or bool[B, L], 1 up to and including the end token; all 0 drops a row.
      prompt_lengths: int[B], number of prompt tokens after the start token, which are not targets; None: no prompt.

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
    """`next_token` from hidden states, a few positions at a time, so that the logits of the whole batch are never materialised.

    Args:
      logits_of: f[..., D] -> f[..., V].
      hidden: f[B, L - 1, D] at the positions of tokens 0..L-2.
      ids: int[B, L], the start token first.
      mask: int or bool[B, L], 1 up to and including the end token.
      prompt_lengths: int[B], number of prompt tokens after the start token, which are not targets; None: no prompt.
      keep_logits: Save the logits for the backward pass instead of rematerialising them.
      positions: Positions of each row per product with the vocabulary. A small batch uses more, up to `TOGETHER` over all rows.

    Returns:
      (sum of the cross-entropies, number of targets, number of correctly predicted targets), float32 scalars.
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
    """Cross-entropy of the tokens at masked positions, a few positions at a time as in `next_token_of`.

    Args:
      logits_of: f[..., D] -> f[..., V].
      hidden: f[B, L, D].
      labels: int[B, L].
      targets: bool[B, L], the positions that count.
      keep_logits: Save the logits for the backward pass instead of rematerialising them.
      positions: Positions of each row per product with the vocabulary.

    Returns:
      (sum of the cross-entropies, number of targets, number of correctly predicted targets), float32 scalars.
    """

    def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
        states, labels, kept = part
        logits = logits_of(states)  # [B, width, V]
        right = (jnp.argmax(logits, axis=-1) == labels) & kept
        loss = jnp.sum(jnp.where(kept, token_losses(logits, labels), 0))
        return (sums[0] + loss, sums[1] + jnp.sum(right, dtype=jnp.float32)), None

    zero = jnp.float32(0)
    step = add if keep_logits else jax.checkpoint(add)
    (loss, right), _ = jax.lax.scan(step, (zero, zero), cut((hidden, labels, targets), positions))
    return loss, jnp.sum(targets, dtype=jnp.float32), right


def cut(arrays: tuple[jax.Array, ...], positions: int) -> tuple[jax.Array, ...]:
    """Cut arrays [B, L, ...] into parts of neighbouring positions, [parts, B, width, ...], padded with zeros at the end.

    Args:
      arrays: arrays of the same B and L.
      positions: Positions of each row in a part. A small batch uses more, up to `TOGETHER` over all rows.
    """
    rows, length = arrays[0].shape[:2]
    parts = -(-length // max(positions, TOGETHER // rows))
    width = -(-length // parts)

    def one(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, parts * width - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], parts, width, *x.shape[2:]), 1, 0)

    return tuple(one(x) for x in arrays)


def similarity(video: jax.Array, text: jax.Array) -> jax.Array:
    """Similarity of videos and texts, the maximum over the queries of a video: f32[B, Q, E], f32[G, E] -> f32[B, G]."""
    return jnp.einsum("bqe,ge->bgq", video, text, precision="highest").max(axis=-1)


def contrastive(
    video: jax.Array, text: jax.Array, temperature: jax.Array, *, smoothing: float = 0.1, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Video-text contrastive loss with label smoothing, both directions, over the global batch.

    Under `jax.jit` with a batch sharded over devices, the negatives of a row are all other rows of the global batch and the
    gradients are exact; no explicit gather is needed. See docs/models/mplug_video.md, "Contrastive loss".

    Args:
      video: f32[B, Q, E], unit vectors; the similarity to a text is the maximum over the Q queries.
      text: f32[B, E], unit vectors; row i belongs to video i.
      temperature: Learned scalar divisor, bounded below by 1e-3.
      smoothing: Share of the target that is spread evenly over the batch.
      valid: bool[B]; padding rows (False) are neither queries nor candidates. None: all rows are valid.

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
      temperature: Learned scalar divisor, bounded below by 1e-3.
      ids: int32[B, I], equal for rows of the same clip; all texts of a clip are positives of all its videos.
      valid: bool[B]; padding rows (False) are neither queries nor candidates. None: all rows are valid.

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
    """Clip the temperature to [low, high]; the gradient passes through unchanged."""
    return temperature + jax.lax.stop_gradient(jnp.clip(temperature, low, high) - temperature)


def classification(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of classes: f[B, C], int32[B], bool[B] -> (sum, number of rows). Rows with label -1 are ignored."""
    valid = valid & (labels >= 0)
    each = token_losses(logits, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(valid, each, 0)), jnp.sum(valid, dtype=jnp.float32)


def ratio(mean: Mean) -> jax.Array:
    """total / weight on the device, 0 if the weight is 0."""
    return mean.total / jnp.maximum(mean.weight, 1.0)


def chosen(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the label alone has the highest logit: f[..., C], int[...] -> bool[...].

    Ties and NaN count against the label, as in `task_metrics.top_k`.
    """
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    label = jnp.max(logits, axis=-1, where=own, initial=-jnp.inf)  # -inf for label -1
    return jnp.all(own | (logits < label[..., None]), axis=-1)


def words_and_head(
    words: tuple[jax.Array, jax.Array], votes: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Sum of the decoder's mean token loss and the classification head's mean loss, with weight 1 each, and the metrics.

    Args:
      words: (sum, number of targets) of `next_token`.
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
