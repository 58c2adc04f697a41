"""Losses of models that read text and video together: matching with hard negatives, masked words, entities of a region.

Whatever is random comes in as an argument or from a key, so that a loss is a pure function and does not depend on the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.core.config import Train
from ymplug_jax.tasks.common import losses


class Negatives(NamedTuple):
    """Rows, counted within their group, that are set beside each row as pairs that do not match."""

    videos: jax.Array  # int[B]: entry b is the video that stands beside text b
    texts: jax.Array  # int[B]: entry b is the text that stands beside video b
    found: jax.Array  # bool[B]: whether there was any to choose from


class Masking(NamedTuple):
    """What is done to each token."""

    select: jax.Array  # bool[B, L]: it is to be told, if it may be
    replace: jax.Array  # bool[B, L]: by the mask token
    random: jax.Array  # bool[B, L]: else by a random word
    words: jax.Array  # int[B, L]: the random words


def group_of(train: Train, group: int) -> int:
    """Rows that negatives are drawn from: `group` (`config.options.group`), or with 0 the whole micro-batch.

    Raises:
      ValueError: the batch cannot be cut into such groups, or a group has no room for a negative.
    """
    size = train.batch_size // train.accumulate
    rows = group or size
    if rows < 2 or size % rows:
        raise ValueError(
            f"config.options.group is {group}; it must be 2 or more and divide config.train.batch_size / "
            f"accumulate = {size}"
        )
    return rows


def allowed(valid: jax.Array, clip: jax.Array | None, group: int) -> jax.Array:
    """Which rows may be a negative of which: bool[B] and int[B, I] or None -> bool[B // group, group, group].

    Not itself, no padding, and not another row of the same clip (equal rows of `clip`).
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
    """Rows drawn by similarity: the more a wrong pair resembles, the likelier it is taken. No gradient.

    Args:
      key: randomness; the videos are drawn first, then the texts.
      video: f32[B, E], unit vectors.
      text: f32[B, E], unit vectors.
      temperature: scalar divisor.
      free: bool[G, B // G, B // G] of `allowed`.
    """
    to_video, to_text = negative_logits(video, text, temperature, free)
    for_text, for_video = jax.random.split(key)
    videos, texts = jax.random.categorical(for_text, to_video), jax.random.categorical(for_video, to_text)  # [G, b]
    return Negatives(videos.reshape(-1), texts.reshape(-1), jnp.any(free, axis=-1).reshape(-1))


def negative_logits(
    video: jax.Array, text: jax.Array, temperature: jax.Array, free: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of the draw, f32[G, b, b] each, -inf where not `free`: rows texts (columns videos), rows videos (columns texts)."""
    groups, size, _ = free.shape
    video, text = (jax.lax.stop_gradient(x).reshape(groups, size, -1) for x in (video, text))
    scores = jnp.einsum("gte,gve->gtv", text, video, precision="highest") / jax.lax.stop_gradient(temperature)
    return jnp.where(free, scores, -jnp.inf), jnp.where(free, scores.swapaxes(1, 2), -jnp.inf)


def take(x: jax.Array, index: jax.Array, group: int) -> jax.Array:
    """Rows of the own group, one or more for each: f[B, ...], int[B] or int[B, K] counted within the group -> f[B K, ...]."""
    parts = x.reshape(-1, group, *x.shape[1:])  # [B / group, group, ...]
    return jax.vmap(lambda part, i: part[i])(parts, index.reshape(len(parts), -1)).reshape(-1, *x.shape[1:])


def pairs(
    states: jax.Array, mask: jax.Array, tokens: jax.Array, negatives: Negatives, group: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three pairs a row: its own text and video, its text with a wrong video, a wrong text with its video.

    Args:
      states: f[B, L, C], of the texts.
      mask: int[B, L], 1 at their tokens.
      tokens: f[B, S, C], of the videos.
      negatives: the wrong video of each text, and the wrong text of each video.
      group: rows that the negatives are counted within.

    Returns:
      The same with a second axis: f[B, 3, L, C], int[B, 3, L], f[B, 3, S, C].
    """
    return (
        jnp.stack([states, states, take(states, negatives.texts, group)], axis=1),
        jnp.stack([mask, mask, take(mask, negatives.texts, group)], axis=1),
        jnp.stack([tokens, take(tokens, negatives.videos, group), tokens], axis=1),
    )


def matching(logits: jax.Array, valid: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of "match" for the three pairs of `pairs`: f32[B, 3, 2], bool[B], bool[B] -> (sum, pairs, pairs told right)."""
    labels = jnp.broadcast_to(jnp.array([1, 0, 0]), logits.shape[:2])
    counts = jnp.stack([valid, valid & found, valid & found], axis=1)  # [B, 3]
    right = jnp.sum(losses.chosen(logits, labels) & counts, dtype=jnp.float32)
    each = losses.token_losses(logits, labels)
    return jnp.sum(jnp.where(counts, each, 0)), jnp.sum(counts, dtype=jnp.float32), right


def draw_masking(key: jax.Array, shape: tuple[int, ...], vocab: int, probability: float) -> Masking:
    """Independent draws for each token: told with `probability`, of these 80 % masked, 10 % any word, 10 % left as they are."""
    select, replace, random, words = jax.random.split(key, 4)
    return Masking(
        jax.random.bernoulli(select, probability, shape),
        jax.random.bernoulli(replace, 0.8, shape),
        jax.random.bernoulli(random, 0.5, shape),
        jax.random.randint(words, shape, 0, vocab),
    )


def mask_words(ids: jax.Array, draws: Masking, never: tuple[int, ...], mask_id: int) -> tuple[jax.Array, jax.Array]:
    """(ids as they are shown int[B, L], which are to be told bool[B, L]); tokens of `never` are left alone."""
    told = draws.select & ~jnp.isin(ids, jnp.array(never))
    masked = told & draws.replace
    shown = jnp.where(masked, mask_id, ids)
    return jnp.where(told & draws.random & ~masked, draws.words, shown), told


def inside_of(box: jax.Array, size: int) -> jax.Array:
    """Cells of a grid that boxes cover: int[B, 4] (top, left, height, width, in cells) -> bool[B, size, size]."""
    place = jnp.arange(size)
    top, left, height, width = (box[:, i, None] for i in range(4))
    rows, columns = (place >= top) & (place < top + height), (place >= left) & (place < left + width)  # [B, size] each
    return rows[:, :, None] & columns[:, None]


def entity_targets(video: jax.Array, entities: jax.Array, temperature: jax.Array) -> jax.Array:
    """What the teacher sees: unit vectors f32[B, E], entities f32[K, E] -> probabilities f32[B, K]. No gradient."""
    scores = jnp.einsum("be,ke->bk", video, entities.astype(jnp.float32), precision="highest") / temperature
    return jax.lax.stop_gradient(jax.nn.softmax(scores, axis=-1))


def entity(
    logits: jax.Array, targets: jax.Array, valid: jax.Array, *, reference_rule: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Soft cross-entropy of the entities: f32[B, K], f32[B, K], bool[B] -> (sum, number of rows).

    Rows whose teacher is unsure (no entity above 0.2) are left out. The reference's rule compares the number of the best
    entity with 0.2, so that exactly the rows of entity 0 are left out.
    """
    sure = jnp.argmax(targets, axis=-1) > 0.2 if reference_rule else jnp.max(targets, axis=-1) >= 0.2
    counts = valid & sure
    each = -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return jnp.sum(jnp.where(counts, each, 0)), jnp.sum(counts, dtype=jnp.float32)
