"""A conversation about images and clips. The key/value cache stays between turns, so that a turn costs its own tokens only."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import conversation
from ymplug_jax.data.conversation import IMAGE, PLACEHOLDERS, VIDEO
from ymplug_jax.inference.chat import Broken, ChatModel, Medium
from ymplug_jax.inference.chat_text import Spoken, Turn, asked, transcript
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.decode_stream import Stream

_NAMES = {kind: placeholder for placeholder, kind in PLACEHOLDERS.items()}


class Style(NamedTuple):
    """How answers are generated."""

    rules: Rules = Rules()
    beams: int = 1  # above 1: beam search, which gives the answer as one piece
    new_tokens: int = 256  # largest number of tokens of an answer
    seed: int = 0  # of the draws; turn i of a conversation draws with a key of its own


def style_of(rules: Mapping[str, float], *, beams: int = 1, new_tokens: int = 256, seed: int = 0) -> Style:
    """How answers are generated, checked.

    Args:
      rules: fields of `Rules`. `top_k` or `top_p` without a temperature draws with temperature 1.
      beams: see `Style`.
      new_tokens: see `Style`.
      seed: see `Style`.

    Raises:
      Mistake: a value is out of range, unknown, or has no effect together with the others.
    """
    known = {field.name: field.default for field in dataclasses.fields(Rules)}
    for name, value in rules.items():
        if name not in known:
            raise Mistake(f"{name}: unknown; give some of {', '.join(known)}")
        if type(value) is not int and (type(known[name]) is int or type(value) is not float):
            raise Mistake(f"{name}={value!r}: not {'a whole' if type(known[name]) is int else 'a'} number; give one")
    for name, value, least, most in (
        ("beams", beams, 1, 64), ("new_tokens", new_tokens, 1, 2**16), ("seed", seed, 0, 2**32 - 1)
    ):  # fmt: skip
        if type(value) is not int or not least <= value <= most:
            raise Mistake(f"{name}={value!r}: out of range; give a whole number from {least} to {most}")
    drawn = [name for name in ("top_k", "top_p") if rules.get(name, known[name]) != known[name]]
    if beams > 1 and (odd := [name for name in ("temperature", *drawn) if rules.get(name)]):
        raise Mistake(f"{odd[0]}: a search with beams draws nothing; leave it out, or beams")
    if drawn and rules.get("temperature") == 0:
        raise Mistake(
            f"{drawn[0]}: has no effect with temperature 0, which draws nothing; leave it out, or raise the temperature"
        )
    try:
        made = Rules(**{"temperature": 1.0 if drawn and beams == 1 else 0.0, **rules})  # type: ignore[arg-type]
    except ValueError as error:
        raise Mistake(str(error)) from None
    return Style(made, beams, new_tokens, seed)


def introduction_from(text: str) -> str:
    """A checked introduction, see `conversation.checked_introduction`.

    Raises:
      Mistake: it holds turns, placeholders or control characters.
    """
    try:
        return conversation.checked_introduction(text)
    except ValueError as error:
        raise Mistake(f"introduction: {error}") from None


class Answer(Iterator[str]):
    """An answer while it is generated: an iterator over pieces of text.

    Stopping early, by `close` or by leaving a loop and asking again, keeps what was said so far.

    Attributes:
      text: what was said so far.
      ended: why the answer ended: "end" (the model ended it), "length" (`new_tokens`), "context" (the conversation is full) or
        "stopped"; "" while it goes on.
    """

    def __init__(self, pieces: "Iterator[str]"):
        """Wrap the generator of `Session.ask`."""
        self._pieces = pieces
        self.text = self.ended = ""

    def __iter__(self) -> "Answer":
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here."""
        self._pieces.close()  # type: ignore[attr-defined]  # a generator

    def whole(self) -> str:
        """Generate the rest and return the whole text."""
        for _ in self:
            pass
        return self.text


class Session:
    """A conversation with a chat model. Not thread-safe.

    Attributes:
      turns: questions and answers so far.
      media: images and clips of the conversation, in order.
    """

    def __init__(
        self,
        model: ChatModel,
        style: Style | None = None,
        *,
        context: int | None = None,
        introduction: str | None = None,
    ):
        """Begin a conversation.

        Args:
          model: shared by any number of sessions.
          style: how answers are generated; None: the likeliest tokens.
          context: tokens that the conversation may take; None: those of the model's training.
          introduction: text before the first turn; "": none; None: that of the model's training.

        Raises:
          Mistake: the model cannot hold `context`, the introduction holds turns or placeholders, or the decoder has too few tokens for
            the beams.
        """
        self.model, self._style = model, style or Style()
        self.context = model.checked_context(context)
        if self._style.beams > 1 and 2 * self._style.beams > model.model.llm.vocab:
            raise Mistake(f"beams {self._style.beams}: too many for {model.model.llm.vocab} tokens; give fewer")
        self._own = model.introduction if introduction is None else introduction_from(introduction)
        self._stream: Stream | None = None
        self._answer: Answer | None = None
        self.reset()

    @property
    def introduction(self) -> str:
        """Text before the first turn of the conversation; "" is none."""
        return self._introduction

    def reset(self, introduction: str | None = None) -> None:
        """Forget the conversation and its media.

        Args:
          introduction: of the next conversation only; None: that of the session.

        Raises:
          Mistake: the introduction holds turns or placeholders.
        """
        self._introduction = self._own if introduction is None else introduction_from(introduction)
        self._end_answer()
        self.turns: list[Turn] = []
        self.ended: list[str] = []
        self.media: list[Medium] = []
        self._shown: list[Medium] = []  # since the last turn
        self._ids: list[int] = []  # of the conversation, the last answer and its end token included
        self._read: list[int] = []  # those that the cache holds

    def show(self, video: Sequence[str] = (), image: Sequence[str] = ()) -> None:
        """Add clips, then images, before the next question. Each file is read once.

        Raises:
          Mistake: a file cannot be read; none is added then.
          PlaceFailed: the decoding process cannot start.
        """
        self._end_answer()
        found = [self.model.medium(name, still=False) for name in video]
        self._shown += found + [self.model.medium(name, still=True) for name in image]

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far, media included."""
        return len(self._ids)

    def ask(self, question: str) -> Answer:
        """Ask about everything shown and said so far.

        The text of the question is taken as it is, as one line: it can neither ask for media nor speak for the model.

        Args:
          question: of the user.

        Returns:
          The answer; iterate over it, or call `whole`.

        Raises:
          Mistake: the question is empty, is no Unicode text, or does not fit into what is left of the conversation.
        """
        self._end_answer()
        if not conversation.plain(question):
            raise Mistake("question: nothing is left of it; give words")
        if any("\ud800" <= letter <= "\udfff" for letter in question):  # no tokenizer takes it
            raise Mistake("question: holds half a surrogate pair, which is no character; give text that UTF-8 can hold")
        turn = Turn(tuple(_NAMES[IMAGE if medium.still else VIDEO] for medium in self._shown), question)
        ids = self._ids_with(turn)
        if len(ids) >= self.context:
            raise Mistake(
                f"question: the conversation would have {len(ids)} tokens and holds {self.context} with the answer; begin a new one "
                "(/reset), ask with fewer words, or give a larger context"
            )
        answer = Answer(iter(()))
        answer._pieces = self._answered(answer, turn, ids)
        self._answer = answer
        return answer

    def transcript(self) -> dict[str, Any]:
        """The conversation as JSON: checkpoint, introduction, and media, question, answer and reason of its end for each turn."""
        self._end_answer()
        media, turns = iter(self.media), []
        for turn, ended in zip(self.turns, self.ended, strict=True):
            seen = [next(media) for _ in turn.media]
            turns.append({
                "video": [medium.file for medium in seen if not medium.still],
                "image": [medium.file for medium in seen if medium.still],
                "question": turn.question,
                "answer": turn.answer,
                "ended": ended,
            })  # fmt: skip
        return {"checkpoint": str(self.model.folder), "introduction": self._introduction, "turns": turns}

    def _end_answer(self) -> None:
        """Stop an answer that its reader left."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _ids_with(self, turn: Turn) -> list[int]:
        """Token ids of the conversation with a new question, ready for its answer."""
        slots, tokenizer = self.model.model.abstractor.slots, self.model.tokenizer
        if self.model.piecewise and self.turns:  # answers stay as they were generated
            new = conversation.for_answering(f"{asked(turn)}\n{conversation.AI}", tokenizer, slots)[1:]
            return [*self._ids, *new.tolist()]
        whole = transcript([*self.turns, turn], self._introduction)
        return conversation.for_answering(whole, tokenizer, slots, piecewise=self.model.piecewise).tolist()

    def _answered(self, answer: Answer, turn: Turn, ids: list[int]) -> Iterator[str]:
        """Read the question, then generate; the turn counts once its question was read."""
        self._feed(ids, [*self.media, *self._shown])
        said: list[int] = []
        spoken = Spoken(self.model.tokenizer.decode)
        key = jax.random.fold_in(jax.random.key(self._style.seed), len(self.turns))
        answer.ended = "stopped"
        try:
            for token in self._tokens(answer, len(ids), key):
                said.append(token)
                if piece := spoken.add(token):
                    answer.text += piece
                    yield piece
            if piece := spoken.end():
                answer.text += piece
                yield piece
        finally:
            answer.text = self.model.tokenizer.decode(said)
            self._ids = [*ids, *said, self.model.tokenizer.eos]
            self.media += self._shown
            self._shown = []
            self.turns.append(turn._replace(answer=answer.text))
            self.ended.append(answer.ended)

    def _tokens(self, answer: Answer, at: int, key: jax.Array) -> Iterator[int]:
        """Tokens of the answer after `at` tokens; sets `answer.ended` when it ends."""
        style = self._style
        room = min(style.new_tokens, self.context - at)
        full = "context" if room < style.new_tokens else "length"
        if style.beams > 1:
            found = self.model.beams(self._held(), at, style.rules, style.beams, style.new_tokens, room)
            if not np.isfinite(np.asarray(found.scores)).all():
                raise Broken(_broken(self.model))
            said = found.ids[0, : int(found.lengths[0])].tolist()
            answer.ended = full if len(said) >= room else "end"
            yield from said
            return
        following = self._step(at, 0, key)
        for count in range(room):
            # The next step is computed while the host decodes the text of this one.
            token, following = following, self._step(at, count + 1, key) if count + 1 < room else following
            chosen = int(token[0])
            if chosen < 0:
                raise Broken(_broken(self.model))
            if chosen == self.model.tokenizer.eos:
                answer.ended = "end"
                return
            self._read.append(chosen)
            yield chosen
        answer.ended = full

    def _step(self, at: int, count: int, key: jax.Array) -> jax.Array:
        stream = self._taken()
        self._stream, token = self.model.step(stream, at + count, self._style.rules, count, key)
        return token

    def _feed(self, ids: list[int], media: Sequence[Medium]) -> None:
        """Read what the cache does not hold of a conversation, in chunks; at least its last token."""
        if self._stream is None:  # none yet, or lost when a call was interrupted
            self._stream, self._read = self.model.begin(self.context, self._style.new_tokens), []
        at = next((i for i, (old, new) in enumerate(zip(self._read, ids, strict=False)) if old != new), len(self._read))
        at = min(at, len(ids) - 1)
        del self._read[at:]
        slots = self.model.model.abstractor.slots
        while at < len(ids):
            if ids[at] < 0:
                seen = sum(token < 0 for token in ids[:at]) // slots
                end = at + slots
                self._stream = self.model.read_medium(self._taken(), at, media[seen])
            else:
                end = next((i for i in range(at, len(ids)) if ids[i] < 0), len(ids))
                end = min(end, at + self.model.chunk(end - at))
                self._stream = self.model.read_text(self._taken(), at, ids[at:end])
            self._read += ids[at:end]
            at = end

    def _held(self) -> Stream:
        assert self._stream is not None
        return self._stream

    def _taken(self) -> Stream:
        """The stream for a program that uses it up. If the program is interrupted, the cache is filled again at the next question."""
        stream, self._stream = self._held(), None
        return stream


def _broken(model: ChatModel) -> str:
    return f"{model.folder}: the model's scores are not finite; this checkpoint is broken, use an earlier one"
