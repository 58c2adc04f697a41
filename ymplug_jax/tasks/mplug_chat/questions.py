"""The questions of a split of conversations, and the same questions with other media (docs/models/mplug_chat.md, "Evaluation").

Evaluation asks for the last answer of each conversation; what stands before it is given to the model.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ymplug_jax.data import conversation
from ymplug_jax.data.records import CorruptRecord, Medium, Record, Split
from ymplug_jax.tasks.common import open_answers

BLACK, OTHER = "black", "other"  # the controls
CONTROLS = {BLACK: "black frames", OTHER: "another clip"}
WITHOUT_KIND = "other"  # kind of a record without a task type
DELIMITERS = (conversation.HUMAN, conversation.AI, *conversation.PLACEHOLDERS)


class Asked(NamedTuple):
    """The last answer of a conversation and what leads to it."""

    prompt: str  # the conversation up to and with the "AI: " before the answer
    question: str  # what the human says last, without placeholders
    answer: str  # without spaces around it


class Question(NamedTuple):
    """What one record asks."""

    asked: Asked | None  # None: the conversation has no answer
    kind: str
    media: tuple[str, ...]  # fingerprint of the content of each medium
    names: tuple[str, ...]  # file of each medium
    options: tuple[str, ...]  # the answers to choose from; (): the question is open only
    given: bool  # whether the data names the options

    @property
    def key(self) -> tuple[object, ...]:
        """Records with the same key are one question with several right answers."""
        prompt = self.asked.prompt if self.asked else ""
        return prompt, self.media, self.kind, self.options if self.given else ()


def last_answer(text: str) -> Asked | None:
    """Find the last answer of a conversation that is not empty; None if there is none. What follows it is left out."""
    pieces = conversation.pieces(text)
    for place in range(len(pieces) - 2, -1, -1):
        answer = pieces[place + 1]
        if pieces[place] == conversation.AI and answer not in DELIMITERS and answer.strip():
            start = max((i for i in range(place) if pieces[i] == conversation.HUMAN), default=-1) + 1
            words = [piece for piece in pieces[start:place] if piece not in conversation.PLACEHOLDERS]
            question = " ".join("".join(words).removeprefix(conversation.HUMAN.lstrip()).split())
            return Asked("".join(pieces[: place + 1]), question, answer.strip())
    return None


def kind_of(task_type: str) -> str:
    """Kind of a question: its task type without the part after the last "_", which chooses the transform of images."""
    return task_type.rpartition("_")[0] or task_type or WITHOUT_KIND


def fingerprint(medium: Medium) -> str:
    """Sort ("still" or "clip") and fingerprint of the content of a medium, whatever its name."""
    digest = hashlib.blake2b(digest_size=16)
    for frame in medium.frames:
        digest.update(len(frame).to_bytes(8, "little") + bytes(frame))
    return f"{'still' if medium.still else 'clip'} {digest.hexdigest()}"


class Questions:
    """A split of conversations whose records carry the options of their questions. Reads every record once when it is made."""

    def __init__(self, records: Split, most: int = 0, fits: Callable[[str], bool] = bool):
        """Read the questions and choose the options of those without any.

        A question without options is one among all answers of its kind in the split, if there are 2 to `most` different ones and
        all of them fit. They are sorted, so that their order says nothing about their number.

        Args:
          records: The split.
          most: Largest number of answers of a kind; 0: questions without options are open only.
          fits: Whether the model can score a text as an option.
        """
        self.path, self.split, self.kind = records.path, records.split, records.kind
        self._records = records
        self.questions: list[Question | None] = []  # by position; None: the record is corrupt
        self.places: dict[str, tuple[int, int]] = {}  # fingerprint -> first record with it, position among its media
        for index in range(len(records)):
            self.questions.append(self._read(index))
        closed = self._closed(most, fits)
        for index, question in enumerate(self.questions):
            if question and question.asked and not question.given:
                self.questions[index] = question._replace(options=closed.get(question.kind, ()))

    def _read(self, index: int) -> Question | None:
        try:
            record = self._records[index]
        except CorruptRecord:
            return None
        media = tuple(fingerprint(medium) for medium in record.media)
        for place, content in enumerate(media):
            self.places.setdefault(content, (index, place))
        names = tuple(medium.name for medium in record.media)
        asked, options = last_answer(record.text), tuple(open_answers.distinct(record.options))
        return Question(asked, kind_of(record.task_type), media, names, options, bool(options))

    def _closed(self, most: int, fits: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
        answers: dict[str, list[str]] = {}
        for question in self.questions:
            if question and question.asked and not question.given:
                answers.setdefault(question.kind, []).append(question.asked.answer)
        closed = {kind: sorted(open_answers.distinct(texts)) for kind, texts in answers.items()}
        return {
            kind: tuple(texts) for kind, texts in closed.items() if 2 <= len(texts) <= most and all(map(fits, texts))
        }

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record, question = self._records[index], self.questions[index]
        return record if question is None else record._replace(options=question.options)


class Changed:
    """The questions with every image and clip replaced. Texts, options and the number and kind of the media stay."""

    def __init__(self, questions: Questions, change: Callable[[int, Record], Record]):
        self.path, self.split, self.kind = questions.path, questions.split, questions.kind
        self._questions, self._change = questions, change

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Record:
        return self._change(index, self._questions[index])


def views(questions: Questions) -> dict[str, Split]:
    """The split as it is evaluated, "", and the controls."""
    return {"": questions, BLACK: Changed(questions, _darkened), OTHER: Changed(questions, Others(questions))}


@functools.cache
def black_frame() -> bytes:
    """A JPEG whose pixels are all 0."""
    import cv2  # imported here: training makes no black frames

    return bytes(cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes())


def _darkened(index: int, record: Record) -> Record:
    return with_media(record, [[black_frame()] * len(medium.frames) for medium in record.media], record.timestamps)


def with_media(record: Record, frames: Sequence[Sequence[bytes]], timestamps: np.ndarray) -> Record:
    """The record with other frames in each of its media, which keep their names."""
    media = tuple(medium._replace(frames=own) for medium, own in zip(record.media, frames, strict=True))
    return record._replace(media=media, frames=[frame for own in frames for frame in own], timestamps=timestamps)


class Others:
    """Gives every image and clip of a record the frames of another one of the same sort, from anywhere in the split.

    All images of the split, each content once, form a cycle in a fixed random order, and so do all clips. A medium gets the frames
    of the next one on its cycle that differs in content and in name from all media of the record and was not given to the record
    already. So the choice does not depend on the batch, and every clip is the other clip of about one clip.
    """

    def __init__(self, questions: Questions):
        self._questions = questions
        self._next: dict[str, str] = {}
        for sort in ("clip", "still"):
            pool = sorted(content for content in questions.places if content.startswith(sort))
            order = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
            self._next |= dict(zip(order, order[1:] + order[:1], strict=True))

    def donors(self, index: int) -> list[tuple[int, int]] | None:
        """(record, position among its media) that each medium of a record gets; None if there are not enough other media."""
        question = self._questions.questions[index]
        if question is None:
            return None
        taken = set(question.media)
        chosen: dict[str, str] = {}
        for content in dict.fromkeys(question.media):  # a clip that a record shows twice is replaced by one other clip
            other = self._next[content]
            while other in taken or self._name(other) in question.names:
                other = self._next[other]
                if other == content:
                    return None
            taken.add(other)
            chosen[content] = other
        return [self._questions.places[chosen[content]] for content in question.media]

    def _name(self, content: str) -> str:
        index, position = self._questions.places[content]
        question = self._questions.questions[index]
        assert question is not None  # a corrupt record has no media
        return question.names[position]

    def __call__(self, index: int, record: Record) -> Record:
        """The record with the frames of its donors; unchanged if there are none."""
        donors = self.donors(index)
        if not donors:
            return record
        frames, times = [], []
        for donor, position in donors:
            other = self._questions[donor]
            frames.append(other.media[position].frames)
            start = sum(len(medium.frames) for medium in other.media[:position])
            times.append(other.timestamps[start : start + len(other.media[position].frames)])
        return with_media(record, frames, np.concatenate(times))
