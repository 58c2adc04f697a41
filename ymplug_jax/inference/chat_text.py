"""Text of a conversation: what is asked of the model, and the characters of an answer as soon as they are complete."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ymplug_jax.data import conversation

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no character, or not yet


class Turn(NamedTuple):
    """A question and its answer."""

    media: tuple[str, ...]  # placeholders of the images and clips that were shown since the turn before
    question: str
    answer: str = ""


def transcript(turns: Sequence[Turn], introduction: str = conversation.SYSTEM) -> str:
    """The text of a conversation that ends where the last turn's answer begins; media may be shown at any turn.

    It equals `conversation.prompt` if all media come with the first turn. An `introduction` of "" is left out.
    """
    lines = [introduction] if introduction else []
    for turn in turns[:-1]:
        lines += [asked(turn).strip("\n"), conversation.AI + conversation.plain(turn.answer)]
    return "\n".join([*lines, asked(turns[-1]).strip("\n"), conversation.AI])


def asked(turn: Turn) -> str:
    """The lines of a turn's media and question, each behind a line break."""
    lines = (*turn.media, conversation.plain(turn.question))
    return "".join(conversation.HUMAN + line for line in lines)


class Spoken:
    """Cuts a stream of tokens into pieces of text. A character of several tokens comes when its last one is there."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """Start an answer; `decode` is that of the tokenizer."""
        self._decode = decode
        self._ids: list[int] = []
        # Tokens before `_from` are settled; those from there to `_shown` are decoded again, as a token's text depends on the one before.
        self._from = self._shown = 0

    def add(self, token: int) -> str:
        """The text that the next token completes, "" if it completes none."""
        self._ids.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """The rest of the text, in which bytes that became no character are U+FFFD."""
        return self._new(last=True)

    def _new(self, last: bool) -> str:
        before, now = self._decode(self._ids[self._from : self._shown]), self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(UNKNOWN) and not last):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]
