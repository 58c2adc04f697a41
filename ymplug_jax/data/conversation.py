"""Conversations with images and clips as token ids (docs/models/mplug_chat.md, "Conversations").

A conversation is one text. `Human: ` and `AI: ` start the turns, each on a line of its own, and `<image>` and `<|video|>` stand where
the media belong:

    The following is a conversation between ...
    Human: <|video|>
    Human: 视频里有什么？
    AI: 一只猫。

Each placeholder takes as many slots as the abstractor gives vectors. The loss counts answers and the end token behind each of them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ymplug_jax.data.text import Tokenizer

SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN, AI = "\nHuman: ", "AI: "
# Ids of slots in a row of tokens; no tokenizer has them.
IMAGE, VIDEO = -1, -2
PLACEHOLDERS = {"<image>": IMAGE, "<|video|>": VIDEO}
_MEDIA = "|".join(map(re.escape, PLACEHOLDERS))
_TURN = re.compile(rf"({_MEDIA}|{HUMAN}|^{AI})", re.MULTILINE)
_UNFIT = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # control characters and half surrogate pairs
_TURN_ANYWHERE = re.compile(rf"({_MEDIA}|{HUMAN}|{AI})")


class Tokens(NamedTuple):
    """A tokenised conversation of n tokens, the beginning token first."""

    ids: np.ndarray  # int32[n]; IMAGE or VIDEO at a slot
    answer: np.ndarray  # bool[n], True at the tokens of an answer and at the end token behind it

    def media(self, kind: int, slots: int) -> int:
        """Images (IMAGE) or clips (VIDEO) that fitted, each of `slots` slots."""
        return int(np.sum(self.ids == kind)) // slots


def prompt(
    question: str,
    media: Sequence[str] = ("<|video|>",),
    history: Sequence[tuple[str, str]] = (),
    introduction: str = SYSTEM,
) -> str:
    """The text of a question, ready for an answer.

    Args:
      question: of the user; placeholders in it are removed, so that a text cannot ask for media that are not there.
      media: a placeholder for each image and clip, in order.
      history: (question, answer) of the turns before.
      introduction: see `introduction_of`; "": none.
    """
    lines = [*([introduction] if introduction else []), *(f"Human: {placeholder}" for placeholder in media)]
    for asked, answered in history:
        lines += [f"Human: {plain(asked)}", f"AI: {plain(answered)}"]
    return "\n".join([*lines, f"Human: {plain(question)}", AI])


def plain(text: str) -> str:
    """The text without placeholders and as one line, so that it cannot start a turn."""
    return " ".join(re.sub(_MEDIA, " ", text).split())


def introduction_of(text: str) -> str | None:
    """The text before the first turn of a conversation, or before the line of its first medium; None if it has no answer.

    Put before a conversation without one, with a line break between, it gives the tokens of the whole conversation again.
    """
    parts = pieces(f"\n{text}")
    if AI not in parts:
        return None
    before, first = parts[0], parts[1] if len(parts) > 1 else ""
    if before in (HUMAN, AI, *PLACEHOLDERS):
        return ""
    return (before if first == HUMAN else before.rpartition("\n")[0])[1:]


def checked_introduction(text: str) -> str:
    """An introduction from a user, without blanks around it; "" is none.

    Raises:
      ValueError: it would not stay one text before the first turn; the message says why.
    """
    text = text.replace("\r\n", "\n")
    if any(len(pieces(f"\n{part}\n")) > 1 for part in (text, text.strip())):
        raise ValueError("holds turns or placeholders; give only the text before the first turn")
    if bad := _UNFIT.search(text):
        raise ValueError(f"holds the control character U+{ord(bad[0]):04X}; leave it out")
    return text.strip()


def for_training(text: str, tokenizer: Tokenizer, slots: int, limit: int, *, reference: bool = False) -> Tokens:
    """Token ids and answers of a conversation, at most `limit` + 1 tokens: the last one is only predicted.

    Turns are tokenised piece by piece, with delimiters as pieces of their own. An answer that is too long is cut, and the end token
    still follows it. Any other text is cut where the row ends. An image or clip that does not fit ends the row.

    Args:
      text: the conversation.
      tokenizer: adds no special tokens itself.
      slots: that each placeholder takes, Q + 1.
      limit: L, the tokens that the model reads.
      reference: as the public code does: "AI: " starts an answer anywhere in a line, and a placeholder at the very start is text.

    Returns:
      The tokens. `answer` may be all False: such a row teaches nothing, and the caller drops it.
    """
    ids, answer = [tokenizer.bos], [False]
    before = ""
    with_media = re.search(_MEDIA, text) is not None
    for position, piece in _pieces(text, reference):
        kind = None if reference and position == 0 else PLACEHOLDERS.get(piece)
        if kind is not None:
            if len(ids) + slots > limit + 1:
                break
            ids += [kind] * slots
            answer += [False] * slots
            before = piece
            continue
        # The next turn behind an empty answer is not its text.
        new, spoken = tokenizer.encode(piece), before == AI and (reference or piece != HUMAN)
        before = piece
        room = limit - len(ids) if spoken else limit + 1 - len(ids)
        cut = len(new) > room
        new = new[: max(room, 0)]
        if spoken and (len(ids) < limit or not cut):
            new = [*new, tokenizer.eos]
        ids += new
        answer += [spoken] * len(new)
        if len(ids) > limit or (cut and not with_media):
            break
    return Tokens(np.array(ids, np.int32), np.array(answer))


def for_answering(text: str, tokenizer: Tokenizer, slots: int, *, piecewise: bool = True) -> np.ndarray:
    """Token ids of a conversation whose last answer is to be generated, int32[n], the beginning token first.

    Args:
      text: the conversation, ending with "AI: ".
      tokenizer: adds no special tokens itself.
      slots: that each placeholder takes, Q + 1.
      piecewise: tokenise as `for_training` does, with an end token behind each earlier answer. False: tokenise all text between
        two placeholders at once, as the public code does; for weights that it was published with.
    """
    ids, before = [tokenizer.bos], ""
    parts = _pieces(text, False) if piecewise else ((0, piece) for piece in re.split(f"({_MEDIA})", text) if piece)
    for _, piece in parts:
        kind = PLACEHOLDERS.get(piece)
        if piecewise and before == AI and piece == HUMAN:  # an empty answer
            ids.append(tokenizer.eos)
        ids += [kind] * slots if kind is not None else tokenizer.encode(piece)
        if piecewise and before == AI and kind is None and piece != HUMAN:
            ids.append(tokenizer.eos)
        before = piece
    return np.array(ids, np.int32)


def pieces(text: str) -> list[str]:
    """The delimiters and placeholders of a conversation and the texts between them, in order; joined they are the text."""
    return [piece for _, piece in _pieces(text, False)]


def _pieces(text: str, reference: bool) -> Iterator[tuple[int, str]]:
    """(position, piece) of delimiters, placeholders and the texts between them; empty texts are left out."""
    position = 0
    for piece in (_TURN_ANYWHERE if reference else _TURN).split(text):
        if piece:
            yield position, piece
        position += len(piece)
