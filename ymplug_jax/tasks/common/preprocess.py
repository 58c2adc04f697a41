"""Preprocessing shared by the video-text tasks: from records to model inputs, tokenizers and class names."""

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
from ymplug_jax.data import frames, schema, text, transforms, windows
from ymplug_jax.data.records import Record
from ymplug_jax.data.source import folders_of
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks.task import Example


def video_of(record: Record, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """Video of a record, uint8[T, S, S, 3]; in training with `config.data.window` a crop for the devices, see `data/windows.py`.

    Only the chosen frames are decoded: a random frame of each segment in training, the middle one in evaluation.
    """
    indices = frames.choose_frames(data.frames, len(record.frames), rng)
    clip = frames.Decoded(record.frames, indices)  # [T, H, W, 3]
    if rng is not None and data.augment and data.window:
        return windows.train_window(clip, data.window, rng)
    if rng is not None and data.augment:
        return transforms.train_transform(clip, data.image_size, rng, wrap_uint8=data.wrap_uint8)
    return transforms.eval_transform(clip, data.image_size)


def still_of(record: Record, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """Still image of a record as a video, uint8[T, S, S, 3]: the same frame T times, augmented as an image."""
    if rng is None or not data.augment:
        return video_of(record, data, rng)
    image = transforms.still_transform(frames.Decoded(record.frames, [0])[0], data.image_size, rng)
    video = np.broadcast_to(image, (data.frames, *image.shape)).copy()
    return windows.finished_window(video, data.window) if data.window else video


def check_video(data: Data, vision: TimeSformer) -> None:
    """Check that the data and the vision tower agree.

    Raises:
      ValueError: The number of frames or the image size differs.
    """
    if data.frames != vision.frames or data.image_size != vision.image_size:
        raise ValueError(
            f"config.data gives {data.frames} frames of {data.image_size} px, config.model.vision takes "
            f"{vision.frames} of {vision.image_size}; make them equal"
        )


def video_spec(data: Data) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example's video."""
    return jax.ShapeDtypeStruct((data.frames, data.image_size, data.image_size, 3), jnp.uint8)


def row_spec(length: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example's ids or mask."""
    return jax.ShapeDtypeStruct((length,), jnp.int32)


def normalize(video: jax.Array, dtype: str) -> jax.Array:
    """CLIP-normalise uint8[B, T, S, S, 3] on the device: uint8 is a quarter of the bytes to transfer."""
    mean, std = (jnp.asarray(values, "float32") for values in (transforms.CLIP_MEAN, transforms.CLIP_STD))
    return ((video.astype("float32") / 255.0 - mean) / std).astype(dtype)


def tokenizer_for(data: Data, vocab: int, setting: str = "config.model.llm.vocab") -> text.Tokenizer | None:
    """Load the tokenizer of the settings; None if they name none, as planning needs none.

    Raises:
      ValueError: The tokenizer has more tokens than the model's vocabulary.
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
    """{"ids": int32[L], "mask": int32[L]} of a cleaned text: start token, text, end token, padding."""
    ids, mask = text.encode_text(
        tokenizer.encode(title), length, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad
    )
    return {"ids": ids, "mask": mask}


def encode_pair(tokenizer: text.Tokenizer, prompt: str, target: str, length: int) -> Example:
    """{"ids": int32[L], "mask": int32[L], "prompt_length": int32}: start token, prompt, target, end token, padding."""
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
    """64-bit hash of the clip's name as int32[2], equal for all records of a clip."""
    return hash_of(record.media_id)


def hash_of(media_id: str) -> np.ndarray:
    """`clip_id` of a record with the given `media_id`."""
    return np.frombuffer(hashlib.blake2b(media_id.encode(), digest_size=8).digest(), np.int32)


def decode(tokenizer: text.Tokenizer, ids: np.ndarray) -> str:
    """Decode a row of ids up to the first end token. The row must not include the start token, as both may be the same token."""
    row = [int(i) for i in ids]
    return tokenizer.decode(row[: row.index(tokenizer.eos)] if tokenizer.eos in row else row)


def given(tokenizer: text.Tokenizer | None) -> text.Tokenizer:
    """Return the tokenizer if there is one.

    Raises:
      ValueError: The settings name no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("config.data.tokenizer: empty; give a sentencepiece *.model, a tokenizer.json or a vocab.txt")
    return tokenizer


def class_names(data: Data) -> tuple[str, ...]:
    """Class names of a run: the lines of `config.data.classes`, or the 45 categories of Youku-mPLUG.

    Raises:
      Mistake: The file does not exist or is not a list of names.
    """
    return names_in(data.classes, "config.data.classes") if data.classes else schema.CLASS_NAMES


def names_in(path: str, setting: str, what: str = "class name") -> tuple[str, ...]:
    """Read a UTF-8 file with one name per line, where line i is class i; the shard builder reads it with the same parser.

    Args:
      path: Path of the file, local or gs://.
      setting: Setting that names the file, for messages.
      what: What a line is, for messages.

    Raises:
      Mistake: The file does not exist, is not UTF-8 or has no names, an empty line, spaces around a name or a duplicate name.
    """
    from ymplug_jax.core import checkpoint_files  # imported here because a benchmark runs without Orbax

    try:
        return schema.parse_class_names(
            text_files.read_text(checkpoint_files.folder_of(path)), f"{setting} {path}", what
        )
    except FileNotFoundError:
        raise Mistake(f"{setting} {path}: no such file; give a file with one {what} per line") from None
    except OSError as error:
        raise Mistake(
            f"{setting} {path}: cannot be read ({error.strerror or error}); give a file with one {what} per line"
        ) from None
    except ValueError as error:
        raise Mistake(str(error)) from None


def head_names(data: Data, classes: int) -> tuple[str, ...]:
    """`class_names`, which are those of the shards and fit a classifier.

    Args:
      data: Data settings.
      classes: `config.model.classes`, which may exceed the number of names unless a file lists them.

    Raises:
      Mistake, ValueError: The settings contradict each other; the message names the one to change.
    """
    names = class_names(data)
    check_classes(data, names)
    if data.classes and len(names) != classes > 0:
        raise Mistake(
            f"config.model.classes: {classes} classes, but there are {len(names)} names in {data.classes} (config.data.classes); set "
            f"config.model.classes={len(names)}"
        )
    check_room(len(names), classes)
    return names


def check_room(names: int, classes: int) -> None:
    """Check that a classifier (`config.model.classes`) has a class for every name.

    Raises:
      ValueError: It has fewer classes, or none.
    """
    if not classes:
        raise ValueError(f"config.model.classes: 0 classes; set it to the number of categories, {names}")
    if names > classes:
        raise ValueError(
            f"config.model.classes: {classes} classes, but there are {names} names; set it to {names} or more"
        )


def check_classes(data: Data, names: Sequence[str]) -> None:
    """Check that the shards were built with the same class names. A manifest without class names means the 45 categories.

    Raises:
      Mistake: The names or their order differ.
    """
    for folder in folders_of(data.path) if data.path else ():
        _check_classes_of(folder, data, names)


def _check_classes_of(folder: str, data: Data, names: Sequence[str]) -> None:
    file = epath.Path(folder) / schema.MANIFEST
    if not file.exists():
        return  # `label_of` still checks each record
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # reported by the record reader
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
        else "the 45 categories, because config.data.classes is empty"
    )
    raise Mistake(
        f"{folder}: built with {len(theirs)} classes, class {place} is {there!r}, but the run has {what}: {len(names)}, class "
        f"{place} is {ours!r}; set config.data.classes to the names that the shards were built with"
    )


def label_of(record: Record, names: Sequence[str]) -> int:
    """Class number of a record's label, -1 if it has no label or one that is not in the names.

    Raises:
      Mistake: The record's class number belongs to another name.
    """
    label = record.label_index
    if label >= 0 and (label >= len(names) or record.label_text not in ("", names[label])):
        ours = repr(names[label]) if label < len(names) else f"none of the {len(names)} classes of this run"
        raise Mistake(
            f"{record.media_id}: its label {record.label_text!r} has number {label}, which is {ours}; set config.data.classes to "
            "the names that the shards were built with"
        )
    return label
