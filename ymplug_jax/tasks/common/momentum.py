"""A momentum teacher and queues of its features, as state that a task carries (`tasks.carried`), and the losses that use them.

He et al., "Momentum contrast for unsupervised visual representation learning", 2020, for queues; Li et al., "Align before fuse",
2021, for soft targets of a teacher. The rules are those of docs/models/mplug2.md, "Momentum and queues". All functions are pure.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import Params
from ymplug_jax.models import layers

QUEUE_AXES = (
    ("(video|text)", "queue proj"),
    ("clip", "queue clip"),
    ("next", ""),
)
NOBODY = -100  # clip of a slot of the queue that no row has filled


def teacher_of(params: Params, patterns: Sequence[str]) -> Params:
    """Float32 copies of the parameters whose whole path matches a pattern: the teacher at step 0.

    Raises:
      Mistake: A pattern matches no parameter.
    """
    flat = state_lib.flatten(params)
    chosen = state_lib.matching(flat, patterns, "momentum teacher")
    return state_lib.unflatten({path: flat[path].astype(jnp.float32) for path in flat if path in chosen})


def moved(teacher: Params, params: Params, coefficient: float, *, fixed: Sequence[str] = ()) -> Params:
    """Move every parameter of a teacher towards its namesake: coefficient * teacher + (1 - coefficient) * parameter.

    Args:
      teacher: Its parameters.
      params: All parameters of the model.
      coefficient: Share of the teacher.
      fixed: Path regexes of parameters that stay as they are.
    """
    flat = state_lib.flatten(params)

    def move(path: str, leaf: jax.Array) -> jax.Array:
        if any(re.fullmatch(pattern, path) for pattern in fixed):
            return leaf
        return leaf * coefficient + flat[path].astype(jnp.float32) * (1 - coefficient)

    return state_lib.unflatten({path: move(path, leaf) for path, leaf in state_lib.flatten(teacher).items()})


def check_queue(size: int, train: Train) -> None:
    """Check that a queue (`config.options.queue`) holds a whole batch.

    Raises:
      Mistake: It holds fewer rows.
    """
    if size < train.batch_size:
        raise Mistake(
            f"config.options.queue: {size} rows are fewer than a batch; give config.train.batch_size = {train.batch_size} or more"
        )


def empty_queue(key: jax.Array, size: int, width: int, clip: int = 2) -> Params:
    """A queue of random unit vectors, which belong to no clip.

    Args:
      key: PRNG key.
      size: Number of rows Q.
      width: Width of the features E.
      clip: Numbers that identify a clip I.

    Returns:
      {video f32[Q, E], text f32[Q, E], clip int32[Q, I], next int32[]}; `next` is the row that is written next.
    """
    video, text = (layers.unit(jax.random.normal(k, (size, width))) for k in jax.random.split(key))
    return {"video": video, "text": text, "clip": jnp.full((size, clip), NOBODY, jnp.int32), "next": jnp.int32(0)}


def enqueue(queue: Params, video: jax.Array, text: jax.Array, clip: jax.Array, valid: jax.Array) -> Params:
    """Overwrite the oldest rows of a queue with a batch; slots of padding keep what they hold.

    Args:
      queue: The result of `empty_queue` or of this function.
      video: f32[B, E], the teacher's unit vectors of the whole batch.
      text: f32[B, E].
      clip: int32[B, I], equal for rows of the same clip.
      valid: bool[B].
    """
    size = len(queue["video"])
    slots = (queue["next"] + jnp.arange(len(video))) % size  # [B]

    def put(name: str, rows: jax.Array) -> jax.Array:
        kept = jnp.where(valid[:, None], rows.astype(queue[name].dtype), queue[name][slots])
        return queue[name].at[slots].set(kept)

    following = (queue["next"] + len(video)) % size
    return {
        "video": put("video", video),
        "text": put("text", text),
        "clip": put("clip", clip),
        "next": following.astype(jnp.int32),
    }


def ramp(share: float, updates: jax.Array, steps: int) -> jax.Array:
    """A share that rises linearly from 0 during the first `steps` updates and stays, or is there at once: int32[] -> f32[]."""
    return share * jnp.minimum(updates.astype(jnp.float32) / steps, 1.0) if steps else jnp.float32(share)


class Contrast(NamedTuple):
    """The contrastive loss and the similarities that negatives are drawn from."""

    total: jax.Array  # f32[], sum over rows of the mean of both directions
    weight: jax.Array  # f32[], number of rows
    to_text: (
        jax.Array
    )  # f32[B, B], similarity of videos to the teacher's texts of the batch, divided by the temperature
    to_video: jax.Array  # f32[B, B], of texts to the teacher's videos


def contrastive(
    video: jax.Array,
    text: jax.Array,
    teacher_video: jax.Array,
    teacher_text: jax.Array,
    queue: Params | None,
    temperature: jax.Array,
    share: jax.Array | float,
    *,
    clip: jax.Array | None,
    valid: jax.Array,
) -> Contrast:
    """Contrastive loss of online features against the teacher's features of the batch and the queue, with soft targets.

    The target of a row is (1 - share) times its positives, evenly, plus share times the teacher's softmax over the same keys.

    Args:
      video: f32[B, E], unit vectors.
      text: f32[B, E], unit vectors; row i belongs to video i.
      teacher_video: f32[B, E], the teacher's unit vectors; no gradient.
      teacher_text: f32[B, E].
      queue: The queue at the start of the step; None: the keys are the batch alone.
      temperature: Scalar divisor within its bounds.
      share: Share of the teacher in the targets, 0 to 1.
      clip: int32[B, I], equal for rows of the same clip, whose rows in batch and queue are positives of each other. None: the row
        itself is its only positive.
      valid: bool[B]; padding rows are neither queries nor keys of the batch.
    """
    teacher_video, teacher_text = jax.lax.stop_gradient(teacher_video), jax.lax.stop_gradient(teacher_text)
    rows = len(video)
    known, positive = valid, jnp.eye(rows, dtype=bool)
    videos, texts = teacher_video, teacher_text
    if clip is not None:
        positive = jnp.all(clip[:, None] == clip[None], axis=-1)
    if queue is not None:
        size = len(queue["video"])
        videos, texts = (jnp.concatenate([x, queue[name]]) for x, name in ((videos, "video"), (texts, "text")))
        known = jnp.concatenate([valid, jnp.ones(size, bool)])  # [B + Q]
        before = jnp.zeros((rows, size), bool)
        if clip is not None:
            before = jnp.all(clip[:, None] == queue["clip"][None], axis=-1)
        positive = jnp.concatenate([positive, before], axis=1)  # [B, B + Q]
    positive &= known
    hard = positive / jnp.maximum(jnp.sum(positive, axis=1, keepdims=True), 1)

    def scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("be,ke->bk", queries, keys, precision="highest") / temperature  # [B, B + Q]

    def direction(online: jax.Array, taught: jax.Array) -> jax.Array:
        hidden = jnp.finfo(jnp.float32).min
        soft = jax.nn.softmax(jnp.where(known, jax.lax.stop_gradient(taught), hidden), axis=-1)
        targets = share * soft + (1 - share) * hard
        logs = jax.nn.log_softmax(jnp.where(known, online, hidden), axis=-1)
        return -jnp.sum(jnp.where(known, targets * logs, 0), axis=-1)  # [B]

    to_text, to_video = scores(video, texts), scores(text, videos)
    each = 0.5 * (direction(to_text, scores(teacher_video, texts)) + direction(to_video, scores(teacher_text, videos)))
    total, weight = jnp.sum(jnp.where(valid, each, 0)), jnp.sum(valid, dtype=jnp.float32)
    return Contrast(total, weight, to_text[:, :rows], to_video[:, :rows])
