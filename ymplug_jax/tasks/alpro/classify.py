"""Classification with ALPRO: a head on the fused title and video. With a list of answers it is open-ended video QA.

For video QA the question takes the place of the title. Evaluation scores video and title, the video alone and the title alone, as the
task "classify" does. See docs/models/alpro.md, "Classification head".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core import places
from ymplug_jax.core.config import Data, Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import class_votes, example_pages, losses, preprocess, scores
from ymplug_jax.tasks.common.class_votes import MODALITIES
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import Batch, Example, Task

BY = ("head",)  # kinds of votes
ANSWERS = ("classify",)
SCORES = (*scores.shares("accuracy"), *scores.losses("loss"), *scores.votes(MODALITIES, BY))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the classes are."""

    # Path to a file of possible answers, one per line, for video QA; "" classifies videos by category.
    answers: str = option("", file=True)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of ALPRO, with a classification head.

    The names are the answers of `config.options.answers`, the lines of `config.data.classes`, or the 45 categories. With
    answers or the 45 categories the head may have more classes than there are names.
    """
    data, options = experiment.data, build(Options, experiment.options)
    answers = options.answers
    model = encode_pairs.model_of(experiment)
    names = names_of(data, answers, model.classes)
    numbers = {name: number for number, name in enumerate(names)}
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        row = encode_pairs.encode(tokenizer, clean_text(record.title, data.max_words), length, model)
        label = numbers.get(record.label_text, -1) if answers else preprocess.label_of(record, names)
        return {"video": preprocess.video_of(record, data, rng), **row, "label": np.array(label, np.int32)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        def read(run: ALPRO) -> jax.Array:
            tokens, states = encode_pairs.seen(run, batch, deterministic=key is None)
            return run.classify(run.fuse(states, batch["mask"], tokens, deterministic=key is None))

        votes = within(model, params, read, key)  # [B, K]
        total, count = losses.classification(votes, batch["label"], batch["valid"])
        counts = batch["valid"] & (batch["label"] >= 0)
        right = jnp.sum(losses.chosen(votes[:, : len(names)], batch["label"]) & counts, dtype=jnp.float32)
        mean = Mean(total, count)
        return losses.ratio(mean), {"loss": mean, "accuracy": Mean(right, count)}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        blank = {
            name: jnp.broadcast_to(value, batch["ids"].shape)
            for name, value in encode_pairs.encode(tokenizer, "", length, model).items()
        }

        def read(run: ALPRO) -> jax.Array:
            tokens, _ = encode_pairs.seen(run, batch)
            votes = []
            for shown, texts in ((tokens, batch), (tokens, blank), (None, batch)):  # the order of MODALITIES
                states = run.encode_text(texts["ids"], texts["mask"])
                votes.append(run.classify(run.fuse(states, texts["mask"], shown))[:, : len(names)])
            return jnp.stack(votes, axis=1)  # [B, 3, K]

        return {"head": within(model, params, read), "label": batch["label"], "valid": batch["valid"]}

    def describe(row: Mapping[str, np.ndarray], record: Record, best: int) -> Answer:
        return class_votes.answer(row, record, best, known_names(), BY)

    @cache
    def known_names() -> Sequence[str]:  # read late: planning works without the file of answers
        return class_names(answers) if answers else names

    row = preprocess.row_spec(length)
    return encode_pairs.task_of(
        model,
        kinds=("classification", "question") if answers else ("classification",),
        example=example,
        spec={
            "video": preprocess.video_spec(data),
            "ids": row,
            "mask": row,
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        },
        loss=loss,
        predict=predict,
        score=partial(class_votes.report, names=names, by=BY),
        scores=SCORES,
        page=example_pages.classes(MODALITIES, BY),
        describe={"classify": describe},
        fresh=(*alpro.TEMPORAL, "(head|connector)/.*"),
    )


def names_of(data: Data, answers: str, classes: int) -> Sequence[str]:
    """Names of the classes or answers.

    Args:
      data: Data settings.
      answers: `config.options.answers`, the file of possible answers, "" for categories of videos.
      classes: `config.model.classes`, the size of the head.

    Raises:
      Mistake, ValueError: The settings contradict each other; the message names the one to change.
    """
    if not answers:
        return preprocess.head_names(data, classes)
    if data.classes:
        raise Mistake(
            "config.options.answers, config.data.classes: both are set; set answers for questions or classes for videos"
        )
    names = class_names(answers, classes if not data.path else 0)
    preprocess.check_room(len(names), classes)
    return names


def class_names(answers: str, planned: int = 0) -> Sequence[str]:
    """The possible answers, the lines of a file.

    Args:
      answers: Path of the file (`config.options.answers`).
      planned: Number of placeholder names to return if the file does not exist, as planning needs no names. 0: raise.

    Raises:
      Mistake: The file does not exist or is not a list of answers.
    """
    if planned and not places.place(answers, "config.options.answers").exists():
        return [str(number) for number in range(planned)]
    return preprocess.names_in(answers, "config.options.answers", "answer")
