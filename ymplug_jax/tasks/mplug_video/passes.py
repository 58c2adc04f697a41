"""Code shared by the tasks of mPLUG-video: making the model, forward passes over a batch, and the common fields of `Task`."""

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
    """Make the model and load its tokenizer; the tokenizer is None if the settings name none.

    Raises:
      Mistake: A setting of the model is invalid.
      ValueError: The vision tower does not fit the data's frames, or the tokenizer has more tokens than the model.
    """
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    preprocess.check_video(experiment.data, model.vision)
    return model, preprocess.tokenizer_for(experiment.data, model.llm.vocab)


def check_room(model: MPLUGVideo, text: int) -> None:
    """Check that `text` tokens fit after the visual tokens.

    Raises:
      ValueError: They exceed the model's positions; the message names the settings to change.
    """
    queries, limit = model.abstractor.queries, model.llm.max_positions
    if limit is not None and queries + text > limit:
        raise ValueError(
            f"{queries} queries + {text} tokens (config.data.max_tokens or config.options) exceed "
            f"config.model.llm.max_positions {limit}; lower them"
        )


def see(run: MPLUGVideo, video: jax.Array) -> dict[str, jax.Array]:
    """Normalise stored pixels uint8[B, T, S, S, 3] and encode them; `run` is a bound model inside `within`."""
    return run.encode_video(preprocess.normalize(video, run.vision.dtype))


def prefix_of(model: MPLUGVideo, params: Params, batch: Batch) -> jax.Array:
    """Visual tokens of a batch in evaluation: f[B, Q, H]."""
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
    """Loss of the text after the visual tokens, without materialising the logits of the whole batch.

    Args:
      model: The model.
      params: All of its parameters.
      hidden: f[B, Q + L, H] of `MPLUGVideo.hidden`.
      ids: int32[B, L].
      mask: int32[B, L]; all 0 drops a row.
      prompt_lengths: int32[B], number of prompt tokens after the start token; None: no prompt.
      keep_logits: `config.train.keep_logits`.

    Returns:
      The same as `losses.next_token_of`.
    """

    def logits(
        states: jax.Array,
    ) -> jax.Array:  # a new apply: the caller wraps it in scan and checkpoint, which a bound module does not allow
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
    """Token loss of the decoder after a prompt, and logits of the head on the plain title: two passes that share a prefix.

    Args:
      model: Model with a classification head.
      params: Its parameters.
      prefix: Function of the bound model that returns visual tokens f[B, Q, H].
      text: ids and mask int32[B, L], prompt_length int32[B], plain and plain_mask int32[B, L].
      key: PRNG key of dropout, None in evaluation.
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
    """Logits of the head in evaluation: f[B, Q, H] or None (no video), plain and plain_mask int32[B, L] -> f32[B, C]."""
    return within(model, params, lambda run: run.classify(run.hidden(prefix, text["plain"]), text["plain_mask"]))


def task_of(model: MPLUGVideo, frozen: tuple[str, ...] = mplug_video.FROZEN, **own: Any) -> Task:
    """The `Task` record of a task on this model; `own` holds its other fields."""
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
