"""What the tasks of mPLUG-video share: the model of the settings, its passes over a batch, and what every record of them holds."""

from collections.abc import Callable
from typing import Any

import jax

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import losses, preprocess
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import Batch, Task, build


def model_of(experiment: Experiment) -> tuple[MPLUGVideo, Tokenizer | None]:
    """The model of the settings and its tokenizer, None where the settings name none.

    Raises:
      Mistake: settings that the model does not have.
      ValueError: a vision tower that does not take the data's frames, or a tokenizer with more tokens than the model has.
    """
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    preprocess.check_video(experiment.data, model.vision)
    return model, preprocess.tokenizer_for(experiment.data, model.llm.vocab)


def check_room(model: MPLUGVideo, text: int) -> None:
    """Whether `text` tokens have room behind the visual ones.

    Raises:
      ValueError: they have not, with the setting to change.
    """
    queries, limit = model.abstractor.queries, model.llm.max_positions
    if limit is not None and queries + text > limit:
        raise ValueError(
            f"{queries} queries + {text} tokens (config.data.max_tokens or config.options) exceed "
            f"config.model.llm.max_positions {limit}"
        )


def see(run: MPLUGVideo, video: jax.Array) -> dict[str, jax.Array]:
    """`encode_video` of pixels as they are stored, uint8[B, T, S, S, 3]; `run` is inside `within`."""
    return run.encode_video(preprocess.normalize(video, run.vision.dtype))


def prefix_of(model: MPLUGVideo, params: Params, batch: Batch) -> jax.Array:
    """The visual tokens of a batch in evaluation: f[B, Q, H]."""
    return within(model, params, lambda run: see(run, batch["video"])["prefix"])


def said(
    model: MPLUGVideo,
    params: Params,
    hidden: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    prompt_lengths: jax.Array | None = None,
    *,
    keep_logits: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of the text after the visual tokens; logits of the whole batch never exist.

    Args:
      model: of the parameters.
      params: all of them.
      hidden: f[B, Q + L, H] of `MPLUGVideo.hidden`.
      ids: int32[B, L].
      mask: int32[B, L]; all 0 drops a row.
      prompt_lengths: int32[B], tokens after the start token that are given; None: none.
      keep_logits: `config.train.keep_logits`.

    Returns:
      What `losses.next_token_of` does.
    """

    def logits(states: jax.Array) -> jax.Array:  # not of the module that runs: a scan with a checkpoint is around it
        return within(model, params, lambda run: run.logits(states))

    text = hidden[:, model.abstractor.queries : -1]  # the states that predict text
    return losses.next_token_of(logits, text, ids, mask, prompt_lengths, keep_logits=keep_logits)


def words_and_votes(
    model: MPLUGVideo,
    params: Params,
    prefix: Callable[[MPLUGVideo], jax.Array],
    text: Batch,
    key: jax.Array | None,
    *,
    keep_logits: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """What the decoder says after a prompt, and what the head votes on the plain title: two passes after one prefix.

    Args:
      model: with a head.
      params: its parameters.
      prefix: of the model that runs -> visual tokens f[B, Q, H].
      text: ids and mask int32[B, L], prompt_length int32[B], plain and plain_mask int32[B, L].
      key: randomness of dropout, None in evaluation.
      keep_logits: `config.train.keep_logits`.

    Returns:
      (sum of the cross-entropies, number of targets), and f32[B, C].
    """

    def read(run: MPLUGVideo) -> tuple[jax.Array, jax.Array]:
        seen, quiet = prefix(run), key is None
        hidden = run.hidden(seen, text["ids"], deterministic=quiet)  # [B, Q + L, H]
        return hidden, run.classify(run.hidden(seen, text["plain"], deterministic=quiet), text["plain_mask"])

    hidden, votes = within(model, params, read, key)
    loss, count, _ = said(
        model, params, hidden, text["ids"], text["mask"], text["prompt_length"], keep_logits=keep_logits
    )
    return (loss, count), votes


def votes(model: MPLUGVideo, params: Params, prefix: jax.Array | None, text: Batch) -> jax.Array:
    """What the head votes in evaluation: f[B, Q, H] or None (no video), plain and plain_mask int32[B, L] -> f32[B, C]."""
    return within(model, params, lambda run: run.classify(run.hidden(prefix, text["plain"]), text["plain_mask"]))


def task_of(model: MPLUGVideo, frozen: tuple[str, ...] = mplug_video.FROZEN, **own: Any) -> Task:
    """The record of a task on this model; `own` are its other fields."""
    return Task(
        axes=mplug_video.axes_of(model),
        frozen=frozen,
        init=lambda key: mplug_video.init(model, key),
        resize=mplug_video.RESIZE,
        **own,
    )


def spoken(record: Record, caption: str) -> Answer:
    """The answer of `predict caption` about one clip."""
    return Answer({"video": record.media_id, "caption": caption}, (f"{record.media_id}: {caption}",))
