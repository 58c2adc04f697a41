"""Classification with ALPRO: a head on title and video together. With a list of answers it is open-ended video QA, the question as title.

Evaluation scores video and title, the video alone and the title alone, as task "classify" does.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment, Options
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import losses, preprocess
from ymplug_jax.tasks.mplug_video import classify
from ymplug_jax.tasks.task import Batch, Example, Task


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of ALPRO with a classifier of as many classes as there are names.

    Names are those of `config.data.classes`, else the 45 categories, or the possible answers. A head may have room for more
    answers than there are.
    """
    data, answers = experiment.data, experiment.options.answers
    model = encode_pairs.model_of(experiment)
    if not model.classes:
        raise ValueError(f"config.model.classes is 0; the categories are {len(preprocess.class_names(data))}")
    if answers and data.classes:
        raise Mistake(
            "config.options.answers and config.data.classes are both set; questions have answers, videos classes"
        )
    names = (
        class_names(experiment.options, model.classes if not data.path else 0)
        if answers
        else preprocess.class_names(data)
    )
    if not answers:
        preprocess.check_classes(data, names)
    if data.classes and len(names) != model.classes:
        raise Mistake(
            f"config.model.classes is {model.classes}; the names in {data.classes} (config.data.classes) are {len(names)}: set "
            f"config.model.classes={len(names)}"
        )
    if len(names) > model.classes:
        raise ValueError(f"config.model.classes is {model.classes}, but there are {len(names)} names to choose from")
    numbers = {name: number for number, name in enumerate(names)}
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        row = encode_pairs.encode(tokenizer, clean_text(record.title, data.max_words), length, model)
        label = numbers.get(record.label_text, -1) if answers else preprocess.label_of(record, names)
        return {"video": preprocess.video_of(record, data, rng), **row, "label": np.int32(label)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        run, quiet = encode_pairs.run_of(model, params, key), {"deterministic": key is None}
        tokens = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype), **quiet)
        states = run.encode_text(batch["ids"], batch["mask"], **quiet)
        votes = run.classify(run.fuse(states, batch["mask"], tokens, **quiet))  # [B, K]
        total, count = losses.classification(votes, batch["label"], batch["valid"])
        counts = batch["valid"] & (batch["label"] >= 0)
        right = jnp.sum(losses.chosen(votes[:, : len(names)], batch["label"]) & counts, dtype=jnp.float32)
        mean = Mean(total, count)
        return losses.ratio(mean), {"loss": mean, "accuracy": Mean(right, count)}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = encode_pairs.run_of(model, params, None)
        tokens = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))
        blank = encode_pairs.encode(tokenizer, "", length, model)
        blank = {name: jnp.broadcast_to(value, batch["ids"].shape) for name, value in blank.items()}
        votes = []
        for shown, texts in ((tokens, batch), (tokens, blank), (None, batch)):  # the order of classify.MODALITIES
            states = run.encode_text(texts["ids"], texts["mask"])
            votes.append(run.classify(run.fuse(states, texts["mask"], shown))[:, : len(names)])
        return {"head": jnp.stack(votes, axis=1), "label": batch["label"], "valid": batch["valid"]}  # [B, 3, K]

    row = preprocess.row_spec(length)
    return Task(
        kinds=("classification", "question") if experiment.options.answers else ("classification",),
        axes=alpro.AXES,
        frozen=(),
        init=lambda key: alpro.init(model, key),
        example=example,
        spec={
            "video": preprocess.video_spec(data),
            "ids": row,
            "mask": row,
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        },
        loss=loss,
        predict=predict,
        score=partial(classify.report, names=names, by=("head",)),
        fresh=(*alpro.TEMPORAL, "(head|connector)/.*"),
        resize=alpro.RESIZE,
    )


def class_names(options: Options, planned: int = 0) -> Sequence[str]:
    """The possible answers to questions: the lines of `config.options.answers`, which is set.

    Args:
      options: of the settings.
      planned: so many nameless ones where the file is missing: planning needs no names.

    Raises:
      Mistake: no such file, or it is no list of answers.
    """
    if planned and not Path(options.answers).is_file():
        return [str(number) for number in range(planned)]
    return preprocess.names_in(options.answers, "config.options.answers", "answer")
