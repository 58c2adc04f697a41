"""Losses of models that fuse text and video: matching with hard negatives, masked language modelling, entities of a region.

Random draws come from a key or from an argument, so the losses are pure functions that do not depend on the mesh.
See docs/models/alpro.md, "Matching loss", "Masked words" and "Entity prompts".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.core.config import Train
from ymplug_jax.tasks.common import losses


class Negatives(NamedTuple):
    """Negatives of each row, as row numbers within its group."""

    videos: jax.Array  # int[B]: the negative video of text b
    texts: jax.Array  # int[B]: the negative text of video b
    found: jax.Array  # bool[B]: False if the group has no negative for the row


class Masking(NamedTuple):
    """Random draws for masked language modelling, one per token."""

    select: jax.Array  # bool[B, L]: selected for prediction
    replace: jax.Array  # bool[B, L]: if selected, replace the token by the mask token
    random: jax.Array  # bool[B, L]: if selected but not masked, replace the token by a random one
    words: jax.Array  # int[B, L]: the random tokens


def group_of(train: Train, group: int) -> int:
    """Number of rows that share negatives: `group` (`config.options.group`), or the whole micro-batch if it is 0.

    Raises:
      ValueError: The group has fewer than 2 rows or does not divide the micro-batch.
    """
    size = train.batch_size // train.accumulate
    rows = group or size
    if rows < 2 or size % rows:
        raise ValueError(
            f"config.options.group: {group} does not fit a micro-batch of {size} rows; give a divisor of config.train.batch_size / "
            "accumulate that is 2 or more"
        )
    return rows


def allowed(valid: jax.Array, clip: jax.Array | None, group: int) -> jax.Array:
    """Mask of the allowed negatives of each row: bool[B] and int[B, I] or None -> bool[B // group, group, group].

    The row itself, padding, and rows of the same clip (equal rows of `clip`) are excluded.
    """
    valid = valid.reshape(-1, group)
    free = valid[:, :, None] & valid[:, None] & ~jnp.eye(group, dtype=bool)
    if clip is not None:
        clip = clip.reshape(-1, group, clip.shape[-1])
        free &= ~jnp.all(clip[:, :, None] == clip[:, None], axis=-1)
    return free


def choose_negatives(
    key: jax.Array, video: jax.Array, text: jax.Array, temperature: jax.Array, free: jax.Array
) -> Negatives:
    """Draw hard negatives with probability softmax(similarity / temperature) over the allowed rows. No gradient.

    Args:
      key: PRNG key, split into one for the videos and one for the texts.
      video: f32[B, E], unit vectors.
      text: f32[B, E], unit vectors.
      temperature: Scalar divisor.
      free: bool[G, B // G, B // G], the result of `allowed`.
    """
    return _drawn(key, *negative_logits(video, text, temperature, free), free)


def choose_among(key: jax.Array, to_video: jax.Array, to_text: jax.Array, free: jax.Array) -> Negatives:
    """Draw hard negatives with probability softmax(logits) over the allowed rows. No gradient.

    Args:
      key: PRNG key, split into one for the videos and one for the texts.
      to_video: f32[B, B], similarities of texts to videos of the batch, divided by the temperature.
      to_text: f32[B, B], of videos to texts.
      free: bool[G, B // G, B // G], the result of `allowed`.
    """
    groups, size, _ = free.shape

    def own(logits: jax.Array) -> jax.Array:  # [B, B] -> [G, b, b]
        parts = jax.lax.stop_gradient(logits).reshape(groups, size, groups, size)
        return jnp.where(free, jnp.einsum("gagb->gab", parts), -jnp.inf)

    return _drawn(key, own(to_video), own(to_text), free)


def _drawn(key: jax.Array, to_video: jax.Array, to_text: jax.Array, free: jax.Array) -> Negatives:
    for_text, for_video = jax.random.split(key)
    videos, texts = jax.random.categorical(for_text, to_video), jax.random.categorical(for_video, to_text)  # [G, b]
    return Negatives(videos.reshape(-1), texts.reshape(-1), jnp.any(free, axis=-1).reshape(-1))


def negative_logits(
    video: jax.Array, text: jax.Array, temperature: jax.Array, free: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of the draw, f32[G, b, b] each and -inf where not `free`: (text rows by video columns, video rows by text columns)."""
    groups, size, _ = free.shape
    video, text = (jax.lax.stop_gradient(x).reshape(groups, size, -1) for x in (video, text))
    scores = jnp.einsum("gte,gve->gtv", text, video, precision="highest") / jax.lax.stop_gradient(temperature)
    return jnp.where(free, scores, -jnp.inf), jnp.where(free, scores.swapaxes(1, 2), -jnp.inf)


def take(x: jax.Array, index: jax.Array, group: int) -> jax.Array:
    """Take rows of each row's own group: f[B, ...], int[B] or int[B, K] as numbers within the group -> f[B K, ...]."""
    parts = x.reshape(-1, group, *x.shape[1:])  # [B / group, group, ...]
    return jax.vmap(lambda part, i: part[i])(parts, index.reshape(len(parts), -1)).reshape(-1, *x.shape[1:])


def pairs(
    states: jax.Array, mask: jax.Array, tokens: jax.Array, negatives: Negatives, group: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three pairs per row: its own text and video, its text with a negative video, a negative text with its video.

    Args:
      states: f[B, L, C], encoded texts.
      mask: int[B, L].
      tokens: f[B, S, C], encoded videos.
      negatives: Negatives of each row.
      group: Rows per group.

    Returns:
      `states`, `mask` and `tokens` of the pairs: f[B, 3, L, C], int[B, 3, L], f[B, 3, S, C].
    """
    return (
        jnp.stack([states, states, take(states, negatives.texts, group)], axis=1),
        jnp.stack([mask, mask, take(mask, negatives.texts, group)], axis=1),
        jnp.stack([tokens, take(tokens, negatives.videos, group), tokens], axis=1),
    )


def matching(logits: jax.Array, valid: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matching loss of the three pairs of `pairs`: f32[B, 3, 2], bool[B], bool[B] -> (sum, number of pairs, number correct)."""
    labels = jnp.broadcast_to(jnp.array([1, 0, 0]), logits.shape[:2])
    counts = jnp.stack([valid, valid & found, valid & found], axis=1)  # [B, 3]
    right = jnp.sum(losses.chosen(logits, labels) & counts, dtype=jnp.float32)
    each = losses.token_losses(logits, labels)
    return jnp.sum(jnp.where(counts, each, 0)), jnp.sum(counts, dtype=jnp.float32), right


def draw_masking(key: jax.Array, shape: tuple[int, ...], vocab: int, probability: float) -> Masking:
    """Draw the masking of BERT: select with `probability`; of the selected, 80 % become [MASK], 10 % a random token, 10 % stay."""
    select, replace, random, words = jax.random.split(key, 4)
    return Masking(
        jax.random.bernoulli(select, probability, shape),
        jax.random.bernoulli(replace, 0.8, shape),
        jax.random.bernoulli(random, 0.5, shape),
        jax.random.randint(words, shape, 0, vocab),
    )


def mask_words(ids: jax.Array, draws: Masking, never: tuple[int, ...], mask_id: int) -> tuple[jax.Array, jax.Array]:
    """Apply the masking: (input ids int[B, L], positions to predict bool[B, L]). Tokens in `never` are neither masked nor predicted."""
    told = draws.select & ~jnp.isin(ids, jnp.array(never))
    masked = told & draws.replace
    shown = jnp.where(masked, mask_id, ids)
    return jnp.where(told & draws.random & ~masked, draws.words, shown), told


def inside_of(box: jax.Array, size: int) -> jax.Array:
    """Grid cells that boxes cover: int[B, 4] (top, left, height, width in cells) -> bool[B, size, size]."""
    place = jnp.arange(size)
    top, left, height, width = (box[:, i, None] for i in range(4))
    rows, columns = (place >= top) & (place < top + height), (place >= left) & (place < left + width)  # [B, size] each
    return rows[:, :, None] & columns[:, None]


def entity_targets(video: jax.Array, entities: jax.Array, temperature: jax.Array) -> jax.Array:
    """Soft entity labels of the teacher: unit vectors f32[B, E], entities f32[K, E] -> probabilities f32[B, K]. No gradient."""
    scores = jnp.einsum("be,ke->bk", video, entities.astype(jnp.float32), precision="highest") / temperature
    return jax.lax.stop_gradient(jax.nn.softmax(scores, axis=-1))


def entity(
    logits: jax.Array, targets: jax.Array, valid: jax.Array, *, reference_rule: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Soft cross-entropy of the entities: f32[B, K], f32[B, K], bool[B] -> (sum, number of rows).

    Rows whose highest target is below 0.2 are excluded. The reference compares the index of the best entity with 0.2 instead of
    its probability, so it excludes exactly the rows of entity 0; `reference_rule` reproduces this.
    """
    sure = jnp.argmax(targets, axis=-1) > 0.2 if reference_rule else jnp.max(targets, axis=-1) >= 0.2
    counts = valid & sure
    each = -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return jnp.sum(jnp.where(counts, each, 0)), jnp.sum(counts, dtype=jnp.float32)
