"""The chat model of a checkpoint on one device: its programs, and the vectors of images and clips.

`ChatModel` compiles a handful of programs, which serve every conversation: one for each length of a chunk of text, one for a medium,
one for a token of an answer. `chat_session.Session` holds a conversation.
"""

import os
from collections import OrderedDict
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.core.state import Params
from ymplug_jax.data import chat_media, video_file
from ymplug_jax.data.frames import Decoded
from ymplug_jax.data.text import load_tokenizer
from ymplug_jax.data.video_file import Clip, Reject
from ymplug_jax.inference import clip_stream
from ymplug_jax.inference.predictor import Predictor
from ymplug_jax.inference.wording import shown
from ymplug_jax.models import decode, decode_stream, language_models
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.decode_stream import Stream
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.common.preprocess import normalize
from ymplug_jax.tasks.task import build

CHUNKS = (32, 256)  # lengths in which text is read, in tokens; the last chunk is padded
KEPT = 64  # images and clips whose vectors are kept


class Medium(NamedTuple):
    """An image or clip that the model has seen."""

    file: str
    still: bool
    slots: jax.Array  # f[1, Q + 1, H]


class Broken(Mistake):
    """The model computes numbers that are not finite, whatever is asked."""


class ChatModel:
    """Model, tokenizer and compiled programs. Weights are read at the first use."""

    def __init__(self, predictor: Predictor):
        """Prepare the programs of a checkpoint whose model is an `MPLUGChat`."""
        self.folder = predictor.folder
        # Published weights were used with whole lines, see `conversation.for_answering`; their conversion says so.
        self.piecewise = not predictor.whole_lines
        self.introduction = predictor.introduction  # of the conversations that the model was trained on
        self._predictor, self._data = predictor, predictor.experiment.data
        self.model: MPLUGChat = build(MPLUGChat, predictor.experiment.model)
        self.tokenizer = load_tokenizer(self._data.tokenizer)
        self._reader = clip_stream.Reader(clip_stream.TIME_LIMIT)
        self._media: OrderedDict[tuple[object, ...], Medium] = OrderedDict()
        llm = self.model.llm
        self._begin = jax.jit(partial(decode_stream.begin, llm), static_argnums=(1, 2, 3))
        self._read = jax.jit(partial(decode_stream.read, llm), donate_argnums=1)
        self._read_text = jax.jit(self._embedded, donate_argnums=1)
        self._step = jax.jit(partial(decode_stream.step, llm), static_argnums=(3, 5), donate_argnums=1)
        self._beams = jax.jit(partial(decode_stream.beams, llm), static_argnums=(3, 4, 5, 7))
        self._encode = jax.jit(self._encoded)

    @property
    def context(self) -> int:
        """Tokens of the longest conversation that the model was trained for, media included."""
        limit = self.model.llm.max_positions
        return self._data.max_tokens if limit is None else min(limit, self._data.max_tokens)

    def checked_context(self, asked: int | None) -> int:
        """The length of a conversation in tokens.

        Raises:
          Mistake: the decoder has fewer positions, or the length holds no image and question.
        """
        limit, least = self.model.llm.max_positions, self.model.abstractor.slots + 16
        if asked is not None and limit is not None and asked > limit:
            raise Mistake(f"context {asked}: {self.folder} has {limit} positions; give at most {limit}")
        if asked is not None and asked < least:
            raise Mistake(f"context {asked}: too small for a clip and a question; give {least} or more")
        return asked or self.context

    def medium(self, file: str | os.PathLike[str], *, still: bool) -> Medium:
        """The vectors of an image or clip, kept for a later use of the same file.

        Raises:
          Mistake: the file cannot be read.
          PlaceFailed: the decoding process cannot start.
        """
        name = os.fsdecode(file)
        key = (os.path.realpath(name), still, *_stamp(name))
        if key not in self._media:
            self._media[key] = Medium(name, still, self._slots(name, clip_of(self._reader, name, still), still))
        self._media.move_to_end(key)
        while len(self._media) > KEPT:
            self._media.popitem(last=False)
        return self._media[key]._replace(file=name)

    def _slots(self, name: str, clip: Clip, still: bool) -> jax.Array:
        """Vectors of a decoded image or clip, f[1, Q + 1, H].

        Raises:
          Broken: they are not finite.
        """
        size, frames = self._data.image_size, self._data.frames
        if still:
            pixels = chat_media.still(Decoded(clip.frames, [0])[0], size)
        else:
            pixels = chat_media.clip(Decoded(clip.frames, chat_media.frame_indices(len(clip.frames), frames)), size)
        with self._predictor.tracing():
            slots = self._encode(self._predictor.params(), pixels[None])
        if not np.isfinite(slots).all():
            raise Broken(f"{shown(name)}: its vectors are not finite; this checkpoint is broken, use an earlier one")
        return slots

    def close(self) -> None:
        """End the decoding process."""
        self._reader.close()

    # The programs. `at` counts the positions that a stream has read.

    def begin(self, context: int, new_tokens: int) -> Stream:
        """An empty stream of one row, with room for `context` tokens and the padding of the last chunk."""
        with self._predictor.tracing():
            stream = self._begin(self._params, 1, context + CHUNKS[-1], new_tokens)
        # Placed like the parameters, as the programs return it: otherwise each of them would be compiled twice.
        place = jax.tree.leaves(self._params)[0].sharding
        assert isinstance(place, NamedSharding)
        return jax.device_put(stream, NamedSharding(place.mesh, PartitionSpec()))

    def read_text(self, stream: Stream, at: int, ids: list[int]) -> Stream:
        """Read the first tokens of a text, at most a chunk, see `chunk`; `stream` is used up."""
        padded = np.zeros((1, self.chunk(len(ids))), np.int32)
        padded[0, : len(ids)] = ids
        with self._predictor.tracing():
            return self._read_text(self._params, stream, np.int32(at), padded, np.int32(len(ids)))

    def read_medium(self, stream: Stream, at: int, medium: Medium) -> Stream:
        """Read the vectors of a medium; `stream` is used up."""
        with self._predictor.tracing():
            return self._read(self._params, stream, np.int32(at), medium.slots, np.int32(medium.slots.shape[1]))

    def step(self, stream: Stream, at: int, rules: Rules, count: int, key: jax.Array) -> tuple[Stream, jax.Array]:
        """Choose and read the next token, see `decode_stream.step`; `stream` is used up."""
        with self._predictor.tracing():
            return self._step(self._step_params, stream, np.int32(at), rules, np.int32(count), self.tokenizer.eos, key)

    def beams(self, stream: Stream, at: int, rules: Rules, count: int, new_tokens: int, room: int) -> decode.Generated:
        """The answer of a beam search, see `decode_stream.beams`."""
        with self._predictor.tracing():
            return self._beams(
                self._params, stream, np.int32(at), rules, count, new_tokens, np.int32(room), self.tokenizer.eos
            )

    @staticmethod
    def chunk(tokens: int) -> int:
        """Length of the chunk in which the next of `tokens` tokens are read."""
        return next((size for size in CHUNKS if size >= tokens), CHUNKS[-1])

    @property
    def _params(self) -> Params:
        llm = self._predictor.params()["llm"]
        assert isinstance(llm, dict)
        return llm

    @cached_property
    def _step_params(self) -> Params:
        """The same parameters, for a step of one token."""
        return language_models.for_steps(self.model.llm, self._params)

    def _embedded(self, params: Params, stream: Stream, at: jax.Array, ids: jax.Array, count: jax.Array) -> Stream:
        embeds = self.model.llm.apply({"params": params}, ids, method="embed")
        return decode_stream.read(self.model.llm, params, stream, at, embeds, count)

    def _encoded(self, params: Params, pixels: jax.Array) -> jax.Array:
        media = normalize(pixels, self.model.vision.dtype)
        return within(self.model, params, lambda model: model.encode_media(media)).astype(jnp.float32)


def _stamp(name: str) -> tuple[int, ...]:
    """Size and time of a file, by which a changed one is read again; () if there is none."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return ()
    return status.st_size, status.st_mtime_ns


def clip_of(reader: video_file.Reader, name: str, still: bool) -> Clip:
    """Decode a file.

    Raises:
      Mistake: it cannot be read.
      PlaceFailed: the decoding process cannot start.
    """
    try:
        if not os.path.exists(name):
            raise Reject("missing_file", "no such file")
        if not os.path.isfile(name):
            raise Reject("missing_file", "not a regular file")
        return reader.read(Path(name), clip_stream.STORED, still=still)
    except Reject as reject:
        reason, detail = reject.args
        other = "" if reason != "not_a_video" or still else "; a picture is shown with --image or /image"
        raise Mistake(f"{shown(name)}: {reason}: {shown(str(detail))}{other or '; give another file'}") from None
    except (OSError, RuntimeError) as error:
        raise PlaceFailed(
            f"{shown(name)}: the decoding process failed ({error}); free some memory, then run the same command again"
        ) from None
