"""Code shared by the tasks of the chat model: making and checking the model, forward passes and the loss of packed rows."""

import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from ymplug_jax.core import sharding
from ymplug_jax.core.config import Data, Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data import schema
from ymplug_jax.data.source import folders_of
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import language_models, mplug_chat
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.tasks.common import losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug_chat.packed_rows import Shape
from ymplug_jax.tasks.task import Batch, Task, build

SCORES = (*scores.losses("loss"), *scores.shares("token_accuracy"))
# Positions per product with the vocabulary on each device. Rows are long and few, and 250,880 ids take more of them than a title's.
TOGETHER = 512
# Start and end token of the released decoders, by kind and rows of the embedding table: a text that begins with another id, or never
# ends, is not what they were trained on.
MARKS = {
    ("bloom", 250880): (1, 2),
    **{("qwen", rows): (151643, 151643) for rows in (151936, 152064)},
}


def model_of(experiment: Experiment, *, images: int, videos: int) -> tuple[MPLUGChat, Tokenizer | None, Shape]:
    """Make the model, load its tokenizer (None if the settings name none) and check that settings and data agree.

    Args:
      experiment: all settings.
      images: images that a row holds at most.
      videos: clips that a row holds at most.

    Raises:
      Mistake: A setting of the model is invalid or does not agree with another one.
      ValueError: The tokenizer has more tokens than the model.
    """
    data = experiment.data
    model: MPLUGChat = build(MPLUGChat, experiment.model)
    shape = Shape(data.max_tokens, model.abstractor.slots, images, videos, data.frames, data.image_size)
    _check_model(model, data, shape)
    if videos:
        _check_stored(data)
    tokenizer = preprocess.tokenizer_for(data, model.llm.vocab)
    if tokenizer is not None:
        _check_marks(model, data, tokenizer)
    return model, tokenizer, shape


def _check_model(model: MPLUGChat, data: Data, shape: Shape) -> None:
    """Check model and data against each other.

    Raises:
      Mistake: They do not agree; the message names the setting.
    """
    if data.image_size != model.vision.image_size:
        raise Mistake(
            f"config.data.image_size: {data.image_size}, but config.model.vision.image_size is {model.vision.image_size}; make them equal"
        )
    if data.augment:
        raise Mistake(
            "config.data.augment: True, but the chat tasks read frames as they are, because questions ask for colours, sides and text; "
            "set it to False"
        )
    if shape.videos and model.vision.dtype == "float16":
        raise Mistake(
            "config.model.vision.dtype: float16 overflows with clips, whose cls token grows with every block; set it to bfloat16"
        )
    if shape.videos and data.frames < 2:
        raise Mistake(
            f"config.data.frames: {data.frames}, but a clip needs 2 or more, as the model treats one frame as a still image; raise it"
        )
    limit = model.llm.max_positions
    if limit is not None and data.max_tokens > limit:
        raise Mistake(
            f"config.data.max_tokens: {data.max_tokens} exceeds config.model.llm.max_positions {limit}; lower it"
        )
    least = 1 + shape.slots + 1
    if (shape.images or shape.videos) and data.max_tokens < least:
        raise Mistake(
            f"config.data.max_tokens: {data.max_tokens} cannot hold the {shape.slots} slots of an image or clip (config.model.abstractor.queries "
            f"+ 1) and an answer; give {least} or more"
        )


def _check_stored(data: Data) -> None:
    """Check that the shards hold as many frames of a clip as the run shows, as far as their manifests say.

    Raises:
      Mistake: They hold fewer, so that every clip would repeat some.
    """
    for folder in folders_of(data.path) if data.path else ():
        try:
            manifest = json.loads((epath.Path(folder) / schema.MANIFEST).read_text(encoding="utf-8"))
            stored = int(manifest["frames"]["per_clip"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # predictions need no shards; the record reader reports a damaged manifest
        if stored < data.frames:
            raise Mistake(
                f"config.data.frames: {data.frames}, but {folder} holds {stored} frames per clip; lower it, or build the shards with "
                f"--num_frames={data.frames}"
            )


def _check_marks(model: MPLUGChat, data: Data, tokenizer: Tokenizer) -> None:
    """Check that texts begin and end with the tokens that a released decoder knows.

    Raises:
      Mistake: They do not.
    """
    marks = MARKS.get((language_models.kind_of(model.llm), model.llm.vocab))
    if marks is not None and marks != (tokenizer.bos, tokenizer.eos):
        raise Mistake(
            f"{data.tokenizer}: texts begin with {tokenizer.begins()} and end with token {tokenizer.eos}, but this decoder was trained with "
            f"{marks[0]} and {marks[1]}; give its own tokenizer.json as config.data.tokenizer"
        )


def end_of(model: MPLUGChat, tokenizer: Tokenizer | None) -> int:
    """The end token of the tokenizer, or that of a released decoder where the settings name no tokenizer, as to plan a run.

    Raises:
      ValueError: There is no tokenizer, and the decoder is not a released one.
    """
    marks = MARKS.get((language_models.kind_of(model.llm), model.llm.vocab))
    return marks[1] if tokenizer is None and marks else preprocess.given(tokenizer).eos


def slots_of(run: MPLUGChat, batch: Batch, *, deterministic: bool = True) -> jax.Array | None:
    """Vectors of the images and clips of a batch, each row its own: f[B, (images + videos) * (Q + 1), H].

    `run` is a bound model inside `within`. Every device encodes the media of its own rows.

    Args:
      run: The bound model.
      batch: images uint8[B, I, 1, S, S, 3] and videos uint8[B, V, T, S, S, 3], if the task has them.
      deterministic: False applies dropout.

    Returns:
      Images before clips, or None if the task has neither.
    """
    parts = []
    for name in ("images", "videos"):
        if name in batch:
            pixels = batch[name]
            rows, count = pixels.shape[:2]
            flat = preprocess.normalize(pixels.reshape(rows * count, *pixels.shape[2:]), run.vision.dtype)
            vectors = run.encode_media(flat, deterministic=deterministic)  # [B * M, Q + 1, H]
            parts.append(vectors.reshape(rows, count * vectors.shape[1], vectors.shape[2]))
    return jnp.concatenate(parts, axis=1) if parts else None


def hidden_of(run: MPLUGChat, batch: Batch, *, deterministic: bool = True) -> jax.Array:
    """Hidden states of packed rows, f[B, L, H]; `run` is a bound model inside `within`."""
    slots = slots_of(run, batch, deterministic=deterministic)
    embeds = run.embed_rows(batch["ids"][:, :-1], slots, batch["index"])  # [B, L, H]
    return run.hidden(embeds, segments=batch["segments"][:, :-1], deterministic=deterministic)


def loss_of(
    model: MPLUGChat, params: Params, batch: Batch, key: jax.Array | None, *, keep_logits: bool
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of the targets of the global batch, 0 without any, and the metrics.

    Args:
      model: The model.
      params: All of its parameters.
      batch: See `packed_rows.packed`, with a leading B, and valid bool[B].
      key: PRNG key of dropout, None in evaluation.
      keep_logits: `config.train.keep_logits`.
    """

    def logits(
        states: jax.Array,
    ) -> jax.Array:  # a new apply: a bound module does not allow scan and checkpoint around it
        return within(model, params, lambda run: run.logits(states))

    hidden = within(model, params, lambda run: hidden_of(run, batch, deterministic=key is None), key)
    segments, valid = batch["segments"], batch["valid"]
    inside = (segments[:, 1:] == segments[:, :-1]) & valid[:, None]  # a row predicts nothing of the next one
    targets = batch["answer"][:, 1:].astype(bool) & inside
    own_rows = max(1, hidden.shape[0] // sharding.parts("batch"))
    total, count, right = losses.words_of(
        logits,
        hidden,
        batch["ids"][:, 1:],
        targets,
        keep_logits=keep_logits,
        positions=max(1, TOGETHER // own_rows),
    )
    loss = Mean(total, count)
    metrics = {"loss": loss, "token_accuracy": Mean(right, count)}
    if key is not None:  # in evaluation every row holds one conversation
        metrics |= _packing(segments, valid)
    return losses.ratio(loss), metrics


def _packing(segments: jax.Array, valid: jax.Array) -> Metrics:
    """Conversations per row, and share of the positions that the model reads without a token: int32[B, L + 1], bool[B]."""
    read = segments[:, :-1]
    rows = jnp.sum(valid, dtype=jnp.float32)
    empty = jnp.sum((read == 0) & valid[:, None], dtype=jnp.float32)
    held = jnp.sum(jnp.where(valid, jnp.max(segments, axis=1), 0), dtype=jnp.float32)
    return {"padding": Mean(empty, rows * read.shape[1]), "packed_rows": Mean(held, rows)}


def task_of(model: MPLUGChat, experiment: Experiment, shape: Shape, **own: Any) -> Task:
    """The `Task` record of a task on this model; `own` holds its other fields."""
    keep = experiment.train.keep_logits
    has_adapters = bool(getattr(model.llm, "lora_rank", 0))
    fields: dict[str, Any] = {
        "axes": mplug_chat.axes_of(model),
        "frozen": mplug_chat.PARTITIONS["adapters_abstractor_lora" if has_adapters else "adapters_abstractor"],
        "init": lambda key: mplug_chat.init(model, key),
        "spec": shape.spec,
        "loss": lambda params, batch, key: loss_of(model, params, batch, key, keep_logits=keep),
        "resize": mplug_chat.RESIZE,
        "fresh": mplug_chat.FRESH,
        "scores": SCORES,
    }
    return Task(**(fields | own))
