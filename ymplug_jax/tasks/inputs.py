"""From a record to what a model takes: pieces that the video-text tasks share."""

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.config import Data
from ymplug_jax.data import augment, frames, text
from ymplug_jax.data.records import Record
from ymplug_jax.tasks.task import Example

# Of CLIP's images, RGB, for values in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def video_of(record: Record, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """uint8[T, S, S, 3] of a record. Frames are chosen before any is decoded: random in their segment in training, the middle
    one in evaluation."""
    indices = frames.choose_frames(data.frames, len(record.frames), rng)
    clip = frames.decode_frames(record.frames, indices)  # [T, H, W, 3]
    if rng is not None and data.augment:
        return augment.train_transform(clip, data.image_size, rng)
    return augment.eval_transform(clip, data.image_size)


def normalize(video: jax.Array, dtype: str) -> jax.Array:
    """uint8[B, T, S, S, 3] to CLIP-normalised floats, on the device: a quarter of the bytes travel."""
    mean, std = (jnp.asarray(values, "float32") for values in (MEAN, STD))
    return ((video.astype("float32") / 255.0 - mean) / std).astype(dtype)


def tokenizer_for(data: Data, vocab: int) -> text.Tokenizer | None:
    """The tokenizer of the settings, None where none is given (planning needs none).

    Raises:
      ValueError: it has more tokens than the model has rows.
    """
    if not data.tokenizer:
        return None
    tokenizer = text.load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"{data.tokenizer} has {tokenizer.vocab_size} tokens, the model only {vocab}; raise config.model.llm.vocab"
        )
    return tokenizer


def encode(tokenizer: text.Tokenizer, title: str, length: int) -> Example:
    """{"ids": int32[L], "mask": int32[L]} of a cleaned text: beginning, text, end, padding (spec: plain rule)."""
    ids, mask = text.encode_text(
        tokenizer.encode(title), length, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad
    )
    return {"ids": ids, "mask": mask}


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
