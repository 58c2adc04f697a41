"""Classification with mPLUG-2: a head on the first token of the title after it read the video.

Evaluation scores video and title, the video alone and the title alone, as the task "classify" does. See docs/models/mplug2.md,
"Classification".
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks.common import class_votes, example_pages, losses, preprocess, scores
from ymplug_jax.tasks.common.class_votes import MODALITIES
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug2 import inputs
from ymplug_jax.tasks.task import Batch, Example, Task

BY = ("head",)  # kinds of votes
ANSWERS = ("classify",)
SCORES = (*scores.shares("accuracy"), *scores.losses("loss"), *scores.votes(MODALITIES, BY))


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUG2, with text encoder, fusion encoder and classifier.

    The names are the lines of `config.data.classes` or the 45 categories; with the categories the head may have more classes.
    """
    data, model = experiment.data, inputs.model_of(experiment)
    if not model.reads:
        raise Mistake("config.model.reads: classification reads the title; set it to True")
    names = preprocess.head_names(data, model.classes)
    tokenizer, length = inputs.tokenizer_of(data, model), data.max_tokens

    def encoded(title: str) -> dict[str, np.ndarray]:
        known = preprocess.given(tokenizer)
        return inputs.encode(known, known.encode(clean_text(title, data.max_words)), length)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        label = np.array(preprocess.label_of(record, names), np.int32)
        return {"video": preprocess.video_of(record, data, rng), **encoded(record.title), "label": label}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        def read(run: MPLUG2) -> jax.Array:
            calm = key is None
            video = preprocess.normalize(batch["video"], model.vision.dtype)
            tokens = run.encode_video(video, deterministic=calm)
            return votes_of(run, tokens, batch["ids"], batch["mask"], deterministic=calm)

        votes = within(model, params, read, key)  # [B, K]
        total, count = losses.classification(votes, batch["label"], batch["valid"])
        counts = batch["valid"] & (batch["label"] >= 0)
        right = jnp.sum(losses.chosen(votes[:, : len(names)], batch["label"]) & counts, dtype=jnp.float32)
        mean = Mean(total, count)
        return losses.ratio(mean), {"loss": mean, "accuracy": Mean(right, count)}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        blank = {name: jnp.broadcast_to(value, batch["ids"].shape) for name, value in encoded("").items()}

        def read(run: MPLUG2) -> jax.Array:
            tokens = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))
            shown = ((tokens, batch), (tokens, blank), (tokens[:, :0], batch))  # the order of MODALITIES
            votes = [votes_of(run, seen, texts["ids"], texts["mask"])[:, : len(names)] for seen, texts in shown]
            return jnp.stack(votes, axis=1)  # [B, 3, K]

        return {"head": within(model, params, read), "label": batch["label"], "valid": batch["valid"]}

    row = preprocess.row_spec(length)
    label = jax.ShapeDtypeStruct((), jnp.int32)
    return inputs.task_of(
        model,
        kinds=("classification",),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "label": label},
        lengths=lambda record: inputs.lengths(tokenizer, data, [record.title], length - 2),
        loss=loss,
        predict=predict,
        score=partial(class_votes.report, names=names, by=BY),
        scores=SCORES,
        page=example_pages.classes(MODALITIES, BY),
        describe={"classify": partial(class_votes.answer, names=names, by=BY)},
        fresh=("head/.*",),
    )


def votes_of(
    run: MPLUG2, tokens: jax.Array, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True
) -> jax.Array:
    """Logits of the classes, inside `passes.within`.

    Args:
      run: Bound model with a classifier.
      tokens: f[B, M, C] of `encode_video`; M 0: the title alone.
      ids: int32[B, L], the title.
      mask: int32[B, L].
      deterministic: False applies dropout.

    Returns:
      f32[B, K].
    """
    states = run.encode_text(ids, mask, deterministic=deterministic)
    return run.classify(run.fuse(states, mask, tokens, deterministic=deterministic)[1])
