"""From a record to what a model takes: pieces that the video-text tasks share."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.config import Data
from ymplug_jax.data import augment, frames, text
from ymplug_jax.data.records import Record
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.state import Params
from ymplug_jax.tasks.task import Example

# Of CLIP's images, RGB, for values in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def video_of(record: Record, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """uint8[T, S, S, 3] of a record. Frames are chosen before any is decoded: random in their segment in training, the middle
    one in evaluation."""
    indices = frames.choose_frames(data.frames, len(record.frames), rng)
    clip = frames.Decoded(record.frames, indices)  # [T, H, W, 3]
    if rng is not None and data.augment:
        return augment.train_transform(clip, data.image_size, rng)
    return augment.eval_transform(clip, data.image_size)


def check(data: Data, model: MPLUGVideo, text: int) -> None:
    """Whether data and model agree, with `text` tokens behind the visual ones.

    Raises:
      ValueError: they do not, with the setting to change.
    """
    check_video(data, model.vision)
    queries = model.abstractor.queries
    if queries + text > model.llm.max_positions:
        raise ValueError(
            f"{queries} queries + {text} tokens (config.data.max_tokens or config.options) exceed "
            f"config.model.llm.max_positions {model.llm.max_positions}"
        )


def check_video(data: Data, vision: TimeSformer) -> None:
    """Whether data and vision tower agree.

    Raises:
      ValueError: they do not.
    """
    if data.frames != vision.frames or data.image_size != vision.image_size:
        raise ValueError(
            f"config.data gives {data.frames} frames of {data.image_size} px, config.model.vision takes "
            f"{vision.frames} of {vision.image_size}; make them equal"
        )


def video_spec(data: Data) -> jax.ShapeDtypeStruct:
    """Of one example's video."""
    return jax.ShapeDtypeStruct((data.frames, data.image_size, data.image_size, 3), jnp.uint8)


def row_spec(length: int) -> jax.ShapeDtypeStruct:
    """Of one example's ids or mask."""
    return jax.ShapeDtypeStruct((length,), jnp.int32)


def normalize(video: jax.Array, dtype: str) -> jax.Array:
    """uint8[B, T, S, S, 3] to CLIP-normalised floats, on the device: a quarter of the bytes travel."""
    mean, std = (jnp.asarray(values, "float32") for values in (MEAN, STD))
    return ((video.astype("float32") / 255.0 - mean) / std).astype(dtype)


def tokenizer_for(data: Data, vocab: int, setting: str = "config.model.llm.vocab") -> text.Tokenizer | None:
    """The tokenizer of the settings, None where none is given (planning needs none).

    Raises:
      ValueError: it has more tokens than the model has rows.
    """
    if not data.tokenizer:
        return None
    tokenizer = text.load_tokenizer(data.tokenizer, lower_case=data.lower_case)
    if tokenizer.vocab_size > vocab:
        raise ValueError(f"{data.tokenizer} has {tokenizer.vocab_size} tokens, the model only {vocab}; raise {setting}")
    return tokenizer


def encode(tokenizer: text.Tokenizer, title: str, length: int) -> Example:
    """{"ids": int32[L], "mask": int32[L]} of a cleaned text: beginning, text, end, padding (spec: plain rule)."""
    ids, mask = text.encode_text(
        tokenizer.encode(title), length, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad
    )
    return {"ids": ids, "mask": mask}


def encode_pair(tokenizer: text.Tokenizer, prompt: str, target: str, length: int) -> Example:
    """{"ids": int32[L], "mask": int32[L], "prompt_length": int32} of beginning, prompt, target, end (spec: pair rule)."""
    ids, mask, prompt_length = text.encode_pair(
        tokenizer.encode(prompt),
        tokenizer.encode(target),
        length,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
    )
    return {"ids": ids, "mask": mask, "prompt_length": np.int32(prompt_length)}


def clip_id(record: Record) -> np.ndarray:
    """int32[2] that is the same for records of one clip, and for no others but by a chance of 2**-64."""
    return np.frombuffer(hashlib.blake2b(record.media_id.encode(), digest_size=8).digest(), np.int32)


def decode(tokenizer: text.Tokenizer, ids: np.ndarray) -> str:
    """Text of one row of ids up to the first end token; the beginning token is left out."""
    row = [int(i) for i in ids]
    row = row[1:] if row and row[0] == tokenizer.bos else row
    return tokenizer.decode(row[: row.index(tokenizer.eos)] if tokenizer.eos in row else row)


def given(tokenizer: text.Tokenizer | None) -> text.Tokenizer:
    """The tokenizer, or one clear error where the settings name none.

    Raises:
      ValueError: no tokenizer.
    """
    if tokenizer is None:
        raise ValueError(
            "config.data.tokenizer is empty; give a sentencepiece *.model, a tokenizer.json or a vocab.txt"
        )
    return tokenizer


def logits_of(model: MPLUGVideo, params: Params, hidden: jax.Array) -> jax.Array:
    """f[..., H] -> f32[..., V], as a pure function."""
    return model.apply({"params": params}, hidden, method="logits")
