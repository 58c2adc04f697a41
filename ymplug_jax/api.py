"""The Python API: `ymplug_jax.load` gives a model that captions, classifies and embeds video files, and answers questions. See docs/python.md.

    model = ymplug_jax.load("runs/caption")
    model.caption(["clip.mp4"])

The answers are those of `python -m ymplug_jax.predict`, which is built on this module.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.inference import arguments
from ymplug_jax.inference.arguments import Name
from ymplug_jax.training import hosts

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ymplug_jax.data.records import Record
    from ymplug_jax.inference.chat import ChatModel
    from ymplug_jax.inference.chat_session import Session
    from ymplug_jax.inference.predictor import Predictor
    from ymplug_jax.tasks.presentation import Answer

# Command of `ymplug_jax.predict` -> methods of `VideoModel` that need a task with these answers.
METHODS = {
    "caption": ("caption",), "classify": ("classify",), "answer": ("answer",), "retrieve": ("embed_videos", "embed_texts"),
    "chat": ("chat",), "perplexity": ("perplexity",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Classification:
    """The classes of one video.

    Attributes:
      video: path of the file, as given.
      name: the most probable class.
      scores: class name -> probability of the most probable classes, best first.
      head: the class that the classification head chooses.
      shown: what the model saw, "video and title" or "video".
    """

    video: str
    name: str
    scores: dict[str, float]
    head: str
    shown: str


def load(
    folder: Name,
    *,
    config: "Name | ConfigDict | Mapping[str, Any] | None" = None,
    tokenizer: Name | None = None,
    classes: Name | None = None,
    needs: str = "",
    int8: bool = False,
) -> "VideoModel":
    """Open a trained run, its best step, or a conversion.

    A run's folder holds its settings, its tokenizer and its class names. A conversion (`python -m ymplug_jax.convert`) holds parameters
    only: pass `config` and `tokenizer` for it, and only for it.

    The settings are checked here. The weights are read and the model is compiled at the first question, on the first device of this
    process.

    Args:
      folder: a run's folder (its `--workdir`, or `best/` below it) or a conversion's (its `--out`); local or gs://.
      config: config file of a task, as `--config` takes it ("configs/mplug_video/caption.py:1.3b"), or the settings that its
        `get_config` returns.
      tokenizer: tokenizer file of the source model; default: `config.data.tokenizer` of the settings.
      classes: file of class names, one a line; default: `config.data.classes` of the settings, or the 45 categories.
      needs: "caption", "classify", "answer", "retrieve", "chat" or "perplexity" to refuse a folder whose task does not answer it.
      int8: hold frozen matrices in eight bits, which halves their memory, see docs/models/language_models.md.

    Returns:
      The model. `model.methods` names what its task offers.

    Raises:
      Mistake: the folder holds no checkpoint, settings are missing or damaged, the task does not answer `needs`, or converted parameters
        do not fit the settings.
    """
    hosts.without_accelerator()  # before JAX is imported
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.inference import settings
    from ymplug_jax.inference.predictor import Predictor

    if needs and needs not in METHODS:
        raise Mistake(f"needs={needs!r}: unknown; give one of {', '.join(METHODS)}")
    place = checkpoint_files.folder_of(os.fsdecode(folder), "--checkpoint")
    if settings.is_conversion(place):
        given = config if config is None or isinstance(config, Mapping) else _plain(config)
        vocabulary, listed = ("" if file is None else os.fspath(file) for file in (tokenizer, classes))
        converted = settings.of_conversion(place, given, vocabulary, listed, needs)
        return VideoModel(Predictor(settings.in_int8(converted) if int8 else converted))
    source = settings.of_run(place, needs)
    for name, value in (("config", config), ("tokenizer", tokenizer), ("classes", classes)):
        if value is not None:
            raise Mistake(f"{name}={value!s:.60}: {place} is a run and keeps its own; leave {name} out")
    return VideoModel(Predictor(settings.in_int8(source) if int8 else source))


def _plain(config: "Name | ConfigDict") -> str | dict[str, Any]:
    """The name of a config file, or nested dicts."""
    return os.fspath(config) if isinstance(config, str | os.PathLike) else config.to_dict()


class VideoModel:
    """A model that `load` returns. Its methods decode files as `data_prep` does, so that the model sees what it was trained on.

    Files are decoded in parallel, ahead of the model, and memory does not grow with their number. Each method raises `Mistake` if the
    task does not offer it, and for the first file that cannot be read.

    Attributes:
      predictor: the compiled predictions, for programs that stream records.
    """

    def __init__(self, predictor: "Predictor"):
        """Wrap the predictions of a checkpoint; use `load`."""
        self.predictor = predictor
        self._chat: ChatModel | None = None

    def __repr__(self) -> str:
        offered = ", ".join(f"{name}()" for name in self.methods) or "no methods"
        return f"<VideoModel {self.predictor.folder}: task {self.task!r}, {offered}>"

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.predictor.experiment.task

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that the task offers."""
        task = self.predictor.task
        commands = [*task.describe, *(["retrieve"] if task.embeds else []), *(["chat"] if task.chats else [])]
        return tuple(name for command in commands for name in METHODS[command])

    def caption(self, paths: Sequence[Name]) -> list[str]:
        """Describe videos in words.

        Args:
          paths: video files.

        Returns:
          A caption for each file, in order.

        Raises:
          Mistake: the task has no captions, or a file cannot be read.
          PlaceFailed: the decoder cannot start.
        """
        self._must_offer("caption")
        return [answer.json["caption"] for answer in self._answers("caption", paths, None, 1)]

    def classify(
        self, paths: Sequence[Name], titles: Sequence[str] | None = None, *, best: int = 5
    ) -> list[Classification]:
        """Choose a class for each video.

        Args:
          paths: video files.
          titles: title of each video, in their order, "" where one has none; None: no titles.
          best: number of classes in `scores`.

        Returns:
          The classes of each file, in order.

        Raises:
          Mistake: the task has no classes, a file cannot be read, or the number of titles differs from that of the files.
          PlaceFailed: the decoder cannot start.
        """
        self._must_offer("classify")
        if not isinstance(best, int) or best < 1:
            raise Mistake(f"best={best!r}: not a whole number of at least 1; give 1 or more")
        found = (answer.json for answer in self._answers("classify", paths, titles, best))
        return [
            Classification(answer["video"], answer["class"], answer["best"], answer["head"], answer["shown"])
            for answer in found
        ]

    def answer(self, paths: Sequence[Name], questions: Sequence[str]) -> list[str]:
        """Answer a question about each video.

        Args:
          paths: video files.
          questions: the question about each video, in their order; name a file again to ask about it again.

        Returns:
          An answer for each question, in order.

        Raises:
          Mistake: the task answers no questions, a file cannot be read, nothing remains of a question after cleaning, a question is longer
            than the model reads, or the number of questions differs from that of the files.
          PlaceFailed: the decoder cannot start.
        """
        self._must_offer("answer")
        questions, files = self._texts(questions, "questions"), len(arguments.names(paths))
        if len(questions) != files:
            raise Mistake(f"questions: {len(questions)} questions for {files} files; give one for each, in their order")
        self.predictor.check_questions(questions, "questions:")
        return [answer.json["answer"] for answer in self._answers("answer", paths, questions, 1)]

    def embed_videos(self, paths: Sequence[Name]) -> np.ndarray:
        """Compute vectors of videos.

        Args:
          paths: video files.

        Returns:
          Unit vectors, f32[N, E]. Their dot products with those of `embed_texts` are cosine similarities.

        Raises:
          Mistake: the task has no vectors, or a file cannot be read.
          PlaceFailed: the decoder cannot start.
        """
        self._must_offer("embed_videos")
        found = [self.predictor.embed_records(records) for records in self._records(paths, None)]
        return np.concatenate(found or [self.predictor.embed_records([])])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Compute vectors of texts.

        Args:
          texts: titles, captions or search words.

        Returns:
          Unit vectors, f32[N, E].

        Raises:
          Mistake: the task has no vectors, or nothing remains of a text after cleaning.
        """
        self._must_offer("embed_texts")
        return self.predictor.embed_texts(self._texts(texts, "texts"))

    def perplexity(self, texts: Sequence[str]) -> list[float]:
        """Compute how improbable the language model finds titles.

        The perplexity per character: exp(-log-probability / characters), with the end of the title. Characters are those that remain
        after the cleaning of training, and tokenizers of any size can be compared. Of a title with more tokens than the model reads, the
        first ones stand for all.

        Args:
          texts: titles.

        Returns:
          A perplexity for each, 1 or more; the higher, the less probable.

        Raises:
          Mistake: the task is not a language model's, nothing remains of a title after cleaning, or a prediction is not finite.
        """
        from ymplug_jax.data.text import clean_text
        from ymplug_jax.inference.predictor import blank

        self._must_offer("perplexity")
        listed = self._texts(texts, "texts")
        answers = self.predictor.answers("perplexity", [blank(text) for text in listed], 1)
        found = []
        for text, answer in zip(listed, answers, strict=True):
            one, size = answer.json, len(clean_text(text, self.predictor.experiment.data.max_words))
            found.append(math.exp(-one["log_prob"] / one["read"] * one["tokens"] / size))
        return found

    def chat(
        self,
        video: Name | Sequence[Name] = (),
        image: Name | Sequence[Name] = (),
        *,
        beams: int = 1,
        new_tokens: int = 256,
        seed: int = 0,
        context: int | None = None,
        introduction: str | None = None,
        **rules: float,
    ) -> "Session":
        """Begin a conversation about videos and images.

            session = model.chat("clip.mp4")
            for piece in session.ask("视频里有什么？"):
                print(piece, end="", flush=True)
            print(session.ask("它是什么颜色的？").whole())

        Sessions of one model share its weights and programs, and the vectors of files that were shown before.

        Args:
          video: one video file or several.
          image: one image file or several.
          beams: above 1, answers come from a beam search, in one piece.
          new_tokens: largest number of tokens of an answer.
          seed: of the draws.
          context: tokens of the whole conversation, media included; None: those of the training.
          introduction: text before the first turn; "": none; None: that of the conversations of the training.
          **rules: fields of `ymplug_jax.models.decode_sampling.Rules`, such as temperature=0.7 and top_p=0.9. None: the likeliest tokens.

        Returns:
          The session, see `ymplug_jax.inference.chat_session.Session`.

        Raises:
          Mistake: the task has no conversations, a file cannot be read, or a value is out of range.
          PlaceFailed: the decoder cannot start.
        """
        from ymplug_jax.inference import chat_session

        self._must_offer("chat")
        style = chat_session.style_of(rules, beams=beams, new_tokens=new_tokens, seed=seed)
        session = chat_session.Session(self.chat_model(), style, context=context, introduction=introduction)
        session.show(arguments.one_or_more(video), arguments.one_or_more(image))
        return session

    def chat_model(self) -> "ChatModel":
        """The programs that the sessions of `chat` share."""
        from ymplug_jax.inference.chat import ChatModel

        if self._chat is None:
            self._chat = ChatModel(self.predictor)
        return self._chat

    def _must_offer(self, method: str) -> None:
        if method in self.methods:
            return
        offered = " and ".join(f"{name}()" for name in self.methods) or "none of the methods of a VideoModel"
        raise Mistake(
            f"{method}(): {self.predictor.folder} is a run of task {self.task!r}, which offers {offered}; load another run"
        )

    def _texts(self, texts: Sequence[str], name: str) -> list[str]:
        """Texts with words in them.

        Raises:
          Mistake: an element is no text, or nothing remains of it after cleaning.
        """
        from ymplug_jax.data.text import clean_text

        listed = arguments.words(texts, name)
        for text in listed:
            if not clean_text(text, 30):
                raise Mistake(f"{name}: {text!r}: nothing is left after cleaning; give words")
        return listed

    def _answers(
        self, command: str, paths: Sequence[Name], titles: Sequence[str] | None, best: int
    ) -> "Iterator[Answer]":
        for records in self._records(paths, titles):
            yield from self.predictor.answers(command, records, best)

    def _records(self, paths: Sequence[Name], titles: Sequence[str] | None) -> "Iterator[list[Record]]":
        """Decode the files in order, in lists of at most one batch.

        Raises:
          Mistake: a file cannot be read, or the number of titles differs from that of the files.
          PlaceFailed: the decoder cannot start.
        """
        from ymplug_jax.inference import clip_stream
        from ymplug_jax.inference.predictor import BATCH

        names = arguments.names(paths)
        given = [""] * len(names) if titles is None else arguments.words(titles, "titles")
        if len(given) != len(names):
            raise Mistake(f"titles: {len(given)} titles for {len(names)} files; give one for each, in their order")
        if folder := next((name for name in names if os.path.isdir(name)), None):
            raise Mistake(f"{folder}: a folder, not a file; list the video files in it")
        files = [clip_stream.File(name, True) for name in names]
        for reads in clip_stream.read_all(files, BATCH, clip_stream.decoders()):
            records = []
            for read in reads:
                if isinstance(read.clip, clip_stream.Reject):
                    raise Mistake(f"{read.file.name}: {read.clip.reason}: {read.clip.detail}; leave this file out")
                records.append(clip_stream.record_of(read.clip, read.file.name, given[read.number]))
            yield records
