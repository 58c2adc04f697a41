"""Examples of the chat tasks: several conversations packed into one row, with the pixels of their images and clips.

Everything here runs on the host. See docs/models/mplug_chat.md, "Packed rows".
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import chat_media, conversation
from ymplug_jax.data.conversation import IMAGE, VIDEO, Tokens
from ymplug_jax.data.frames import Decoded
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import Medium
from ymplug_jax.tasks.task import Example


class Shape(NamedTuple):
    """Sizes of an example."""

    length: int  # tokens that the model reads, L
    slots: int  # vectors of one image or clip, Q + 1
    images: int  # images that a row holds at most
    videos: int  # clips that a row holds at most
    frames: int  # of a clip, T
    size: int  # height and width of a frame, S

    @property
    def room(self) -> Size:
        """What a row holds. Its last token is only predicted, never read."""
        return Size(self.length + 1, self.images, self.videos)

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an example, see `packed`."""
        length, size = self.length, self.size
        row = jax.ShapeDtypeStruct((length + 1,), jnp.int32)
        found = {"ids": row, "answer": row, "segments": row, "index": jax.ShapeDtypeStruct((length,), jnp.int32)}
        if self.images:
            found["images"] = jax.ShapeDtypeStruct((self.images, 1, size, size, 3), jnp.uint8)
        if self.videos:
            found["videos"] = jax.ShapeDtypeStruct((self.videos, self.frames, size, size, 3), jnp.uint8)
        return found


class Piece(NamedTuple):
    """A conversation that is packed together with others."""

    name: str  # of the record, for messages
    tokens: Tokens
    media: Sequence[Medium]  # images and clips of the record in order; those behind the last that fitted are not read


def size_of(tokens: Tokens, slots: int) -> Size:
    """What a conversation takes of a row; 0 tokens without an answer, as nothing can be learned from it."""
    if not tokens.answer.any():
        return Size(0, 0, 0)
    return Size(len(tokens.ids), tokens.media(IMAGE, slots), tokens.media(VIDEO, slots))


def packed(pieces: Sequence[Piece], shape: Shape, pad: int) -> Example:
    """One example of one or more conversations.

    Args:
      pieces: they fit into `shape.room`.
      shape: sizes of the example.
      pad: id of padding.

    Returns:
      ids int32[L + 1] (0 at slots), answer int32[L + 1] (1 at targets), segments int32[L + 1] (0 at padding, then 1, 2, ... in order),
      index int32[L] (row of the example's vectors seen as [(images + videos) * (Q + 1), H], -1 at text), images uint8[images, 1, S, S, 3]
      and videos uint8[videos, T, S, S, 3] (0 where there is none), each left out if the shape has none.

    Raises:
      ValueError: the pieces have more tokens than the row.
      Mistake: they have more media than the row, or the media of one are not those of its placeholders.
    """
    ids = np.full(shape.length + 1, pad, np.int32)
    answer, segments, index = np.zeros_like(ids), np.zeros_like(ids), np.full_like(ids, -1)
    found: dict[int, list[Medium]] = {IMAGE: [], VIDEO: []}
    begin = 0
    for number, (name, tokens, media) in enumerate(pieces, 1):
        end = begin + len(tokens.ids)
        if end > len(ids):
            raise ValueError(f"{name}: a row of {len(ids)} tokens cannot hold {end}; pack fewer conversations into it")
        place = slice(begin, end)
        slot = tokens.ids < 0
        ids[place], answer[place], segments[place] = np.where(slot, 0, tokens.ids), tokens.answer, number
        _check_media(name, tokens, media, shape.slots)
        shown = media[: int(slot.sum()) // shape.slots]
        index[place] = index_of(tokens.ids, shape, len(found[IMAGE]), len(found[VIDEO]))
        for kind in (IMAGE, VIDEO):
            found[kind] += [medium for medium in shown if medium.still == (kind == IMAGE)]
        begin = end
    _check_room(pieces[0].name, len(found[IMAGE]), len(found[VIDEO]), shape)
    made = {"ids": ids, "answer": answer, "segments": segments, "index": index[:-1]}
    if shape.images:
        made["images"] = _filled([still(medium, shape) for medium in found[IMAGE]], (shape.images, 1), shape.size)
    if shape.videos:
        made["videos"] = _filled(
            [clip(medium, shape) for medium in found[VIDEO]], (shape.videos, shape.frames), shape.size
        )
    return made


def index_of(ids: np.ndarray, shape: Shape, images: int = 0, videos: int = 0) -> np.ndarray:
    """Where the vectors of a conversation are among those of its row: images come before clips.

    Args:
      ids: int32[n], IMAGE or VIDEO at slots.
      shape: sizes of an example.
      images: images of the row that come before those of the conversation.
      videos: clips of the row that come before those of the conversation.

    Returns:
      int32[n], a row of [(images + videos) * (Q + 1), H], or -1 at text.
    """
    index = np.full(len(ids), -1, np.int32)
    for kind, first in ((IMAGE, images), (VIDEO, shape.images + videos)):
        at = np.flatnonzero(ids == kind)
        index[at] = first * shape.slots + np.arange(len(at))
    return index


def still(medium: Medium, shape: Shape) -> np.ndarray:
    """Pixels of an image, uint8[1, S, S, 3]."""
    return chat_media.still(Decoded(medium.frames, [0])[0], shape.size)


def clip(medium: Medium, shape: Shape) -> np.ndarray:
    """Pixels of a clip, uint8[T, S, S, 3]; a clip with fewer frames repeats some."""
    indices = chat_media.frame_indices(len(medium.frames), shape.frames)
    return chat_media.clip(Decoded(medium.frames, indices), shape.size)


def _filled(pixels: Sequence[np.ndarray], before: tuple[int, int], size: int) -> np.ndarray:
    out = np.zeros((*before, size, size, 3), np.uint8)
    for i, one in enumerate(pixels):
        out[i] = one
    return out


def _check_media(name: str, tokens: Tokens, media: Sequence[Medium], slots: int) -> None:
    """Check that the media of a record are images and clips in the order of its placeholders.

    Raises:
      Mistake: they are not.
    """
    wanted = [bool(kind == IMAGE) for kind in tokens.ids[tokens.ids < 0][::slots]]
    given = [medium.still for medium in media[: len(wanted)]]
    if wanted != given:
        words = {True: "image", False: "clip"}
        raise Mistake(
            f"{name}: its text has placeholders for {', '.join(words[one] for one in wanted)}, but the record holds "
            f"{', '.join(words[one] for one in given) or 'no media'}; build the shards again"
        )


def _check_room(name: str, images: int, videos: int, shape: Shape) -> None:
    """Check that a row has room for its media.

    Raises:
      Mistake: it has not; the message names the option to raise.
    """
    for what, count, most in (("images", images, shape.images), ("videos", videos, shape.videos)):
        if count > most:
            raise Mistake(
                f"config.options.{what}_per_row: {most}, but the row that begins with {name} has {count} {what}; raise it"
            )


def titled(title: Sequence[int], bos: int, eos: int, slots: int, length: int) -> Tokens:
    """A clip and its title: start token, slots, title, end token, at most `length` + 1 tokens; the title is cut if needed.

    Args:
      title: ids of the title.
      bos: id of the start token.
      eos: id of the end token.
      slots: Q + 1 of the clip.
      length: L, tokens that the model reads.
    """
    words = [*title[: length - 1 - slots], eos]
    ids = [bos, *[conversation.VIDEO] * slots, *words]
    return Tokens(np.array(ids, np.int32), np.arange(len(ids)) > slots)
