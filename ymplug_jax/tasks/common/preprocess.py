"""From a record to what a model takes: pieces that the video-text tasks share."""

import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ymplug_jax.core import text_files
from ymplug_jax.core.config import Data
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import frames, schema, text, transforms
from ymplug_jax.data.records import Record
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks.task import Example


def video_of(record: Record, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """uint8[T, S, S, 3] of a record. Frames are chosen before any is decoded: random in their segment in training, the middle
    one in evaluation."""
    indices = frames.choose_frames(data.frames, len(record.frames), rng)
    clip = frames.Decoded(record.frames, indices)  # [T, H, W, 3]
    if rng is not None and data.augment:
        return transforms.train_transform(clip, data.image_size, rng, wrap_uint8=data.wrap_uint8)
    return transforms.eval_transform(clip, data.image_size)


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
    mean, std = (jnp.asarray(values, "float32") for values in (transforms.CLIP_MEAN, transforms.CLIP_STD))
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
        raise ValueError(
            f"{data.tokenizer} has {tokenizer.vocab_size} tokens, the model only {vocab}; give the tokenizer that the model was "
            f"trained with (only for a model that starts from no checkpoint: raise {setting})"
        )
    return tokenizer


def encode(tokenizer: text.Tokenizer, title: str, length: int) -> Example:
    """{"ids": int32[L], "mask": int32[L]} of a cleaned text: beginning, text, end, padding."""
    ids, mask = text.encode_text(
        tokenizer.encode(title), length, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad
    )
    return {"ids": ids, "mask": mask}


def encode_pair(tokenizer: text.Tokenizer, prompt: str, target: str, length: int) -> Example:
    """{"ids": int32[L], "mask": int32[L], "prompt_length": int32} of beginning, prompt, target, end."""
    ids, mask, prompt_length = text.encode_pair(
        tokenizer.encode(prompt),
        tokenizer.encode(target),
        length,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
    )
    return {"ids": ids, "mask": mask, "prompt_length": np.array(prompt_length, np.int32)}


def clip_id(record: Record) -> np.ndarray:
    """int32[2] that is the same for records of one clip, and for no others but by a chance of 2**-64."""
    return hash_of(record.media_id)


def hash_of(media_id: str) -> np.ndarray:
    """`clip_id` of a record with this name."""
    return np.frombuffer(hashlib.blake2b(media_id.encode(), digest_size=8).digest(), np.int32)


def decode(tokenizer: text.Tokenizer, ids: np.ndarray) -> str:
    """Text of one row of ids up to the first end token. The row is without its start token, which may be the end token too."""
    row = [int(i) for i in ids]
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


def class_names(data: Data) -> tuple[str, ...]:
    """Names of the classes of a run: the lines of `config.data.classes`, else the 45 categories of Youku-mPLUG.

    Raises:
      Mistake: no such file, or it is no list of names.
    """
    return names_in(data.classes, "config.data.classes") if data.classes else schema.CLASS_NAMES


def names_in(path: str, setting: str, what: str = "class name") -> tuple[str, ...]:
    """One name a line of a UTF-8 file, line i is class i, as the builder of the shards reads it: see `schema.parse_class_names`.

    Args:
      path: of the file, local or gs://.
      setting: that names it, for messages.
      what: is listed, for messages.

    Raises:
      Mistake: no such file, not UTF-8, no name, an empty line, blanks around a name, or a name that stands twice.
    """
    from ymplug_jax.core import checkpoint_files  # here: a benchmark runs without Orbax

    try:
        return schema.parse_class_names(
            text_files.read_text(checkpoint_files.folder_of(path)), f"{setting} {path}", what
        )
    except OSError as error:
        raise Mistake(f"{setting} {path}: {error.strerror or error}; give a file with one {what} a line") from None
    except ValueError as error:
        raise Mistake(str(error)) from None


def check_classes(data: Data, names: Sequence[str]) -> None:
    """Whether labels of the shards count in these names. Shards whose manifest names no classes have the 45 categories.

    Raises:
      Mistake: other names, or another order.
    """
    if not data.path:
        return
    file = epath.Path(data.path) / schema.MANIFEST
    if not file.exists():
        return  # labels are compared with the names record by record
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # the reader of the records says so
    if not isinstance(manifest, dict) or manifest.get("kind", "classification") != "classification":
        return
    theirs = tuple(manifest.get("classes") or schema.CLASS_NAMES)
    if theirs == tuple(names):
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(theirs, names, strict=False)) if a != b), min(len(theirs), len(names))
    )
    there, ours = (line[place] if place < len(line) else "nothing" for line in (theirs, names))
    what = (
        f"{data.classes} (config.data.classes)"
        if data.classes
        else "the 45 categories, since config.data.classes is empty"
    )
    raise Mistake(
        f"{data.path}: its labels count in {len(theirs)} classes, class {place} is {there!r}, but the run has {what}: "
        f"{len(names)}, class {place} is {ours!r}; set config.data.classes to the names that the shards were built with"
    )


def label_of(record: Record, names: Sequence[str]) -> int:
    """The record's label as a place in the names, -1 where it has none that is in them.

    Raises:
      Mistake: the shards' number of the class stands for another name.
    """
    label = record.label_index
    if label >= 0 and (label >= len(names) or record.label_text not in ("", names[label])):
        ours = repr(names[label]) if label < len(names) else f"none of the {len(names)} classes of this run"
        raise Mistake(
            f"{record.media_id}: its label {record.label_text!r} has number {label}, which is {ours}; set config.data.classes to "
            "the names that the shards were built with"
        )
    return label
