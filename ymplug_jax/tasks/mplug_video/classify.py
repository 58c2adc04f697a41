"""Video category classification: the frozen decoder generates the class name after title and video, beside a classification head.

Evaluation scores all class names (the 45 categories, or those of `config.data.classes`) by log-probability and by the head. It does so
with video and title, the video alone and the title alone, because titles alone already score high on this data.
See docs/models/mplug_video.md, "Classification head".
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import Tokenizer, clean_text
from ymplug_jax.tasks.common import candidates, class_votes, example_pages, losses, preprocess, scores
from ymplug_jax.tasks.common.class_votes import MODALITIES
from ymplug_jax.tasks.mplug_video import passes
from ymplug_jax.tasks.task import Batch, Example, Task

NAME = 16  # positions reserved for a class name and the end token
BY = ("likelihood", "head")  # kinds of votes
ANSWERS = ("classify",)
SCORES = (
    *scores.losses("generation_loss"),
    *scores.shares("head_accuracy"),
    *scores.losses("head_loss", "loss"),
    *scores.votes(MODALITIES, BY),
)


def prompt_of(title: str, length: int) -> str:
    """The prompt before the class name, with the title truncated so that the name fits."""
    return f"视频标题：{title[: length - 15]} 视频类目："


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGVideo, with one class of the head per name."""
    data, keep = experiment.data, experiment.train.keep_logits
    model, tokenizer = passes.model_of(experiment)
    length, names = data.max_tokens, preprocess.class_names(data)
    if model.classes != len(names):
        where = f"names in {data.classes} (config.data.classes)" if data.classes else "categories"
        raise Mistake(
            f"config.model.classes: {model.classes} classes, but there are {len(names)} {where}; set config.model.classes={len(names)}"
        )
    preprocess.check_classes(data, names)
    passes.check_room(model, length + room_for(names, tokenizer, length))

    def asked(title: str) -> Example:
        """Candidate answers after a title, and the plain title for the head."""
        known = preprocess.given(tokenizer)
        answers = [known.encode(name) for name in names]
        plain = preprocess.encode(known, title, length)
        pair = candidates.encode(known, prompt_of(title, length), answers, length)
        return pair | {"plain": plain["ids"], "plain_mask": plain["mask"]}

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known, title = preprocess.given(tokenizer), clean_text(record.title, data.max_words)
        label = preprocess.label_of(record, names)
        pair = preprocess.encode_pair(known, prompt_of(title, length), names[label] if label >= 0 else "", length)
        plain = preprocess.encode(known, title, length)
        made = {"video": preprocess.video_of(record, data, rng), **pair, "label": np.array(label, np.int32)}
        made |= {"plain": plain["ids"], "plain_mask": plain["mask"]}
        return made | asked(title) if rng is None else made

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        counts = batch["valid"] & (batch["label"] >= 0)
        text = batch | {"mask": batch["mask"] * counts[:, None]}  # [B, L]
        words, votes = passes.words_and_votes(
            model, params, lambda run: passes.see(run, batch["video"])["prefix"], text, key, keep_logits=keep
        )
        return losses.words_and_head(words, votes, batch["label"], counts)

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        prefix = passes.prefix_of(model, params, batch)
        b = prefix.shape[0]
        blank = {key: jnp.broadcast_to(value, (b, *np.shape(value))) for key, value in asked("").items()}
        shown = {"both": (prefix, batch), "video": (prefix, blank), "title": (None, batch)}
        likelihood, head = [], []
        for modality in MODALITIES:
            seen, texts = shown[modality]
            likelihood.append(candidates.scores(model.llm, params["llm"], seen, texts))
            head.append(passes.votes(model, params, seen, texts))
        out = {"likelihood": jnp.stack(likelihood, axis=1), "head": jnp.stack(head, axis=1)}  # [B, 3, C] each
        return out | {"label": batch["label"], "valid": batch["valid"]}

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    row = preprocess.row_spec(length)
    spec = {"video": preprocess.video_spec(data), "ids": row, "mask": row, "prompt_length": scalar, "label": scalar}
    return passes.task_of(
        model,
        kinds=("classification",),
        example=example,
        spec=spec | {"plain": row, "plain_mask": row},
        loss=loss,
        predict=predict,
        score=partial(class_votes.report, names=names, by=BY),
        scores=SCORES,
        page=example_pages.classes(MODALITIES, BY),
        describe={"classify": partial(class_votes.answer, names=names, by=BY)},
        fresh=("head/.*",),
    )


def room_for(names: Sequence[str], tokenizer: Tokenizer | None, length: int) -> int:
    """Positions that the class names need after a row of `length` tokens.

    Raises:
      Mistake: A name does not fit into a row and would be truncated.
    """
    if tokenizer is None:
        return NAME
    longest = max(names, key=lambda name: len(tokenizer.encode(name)))
    tokens = len(tokenizer.encode(longest))
    if tokens + 2 > length:
        raise Mistake(
            f"config.data.max_tokens: {length} tokens, but the class {longest!r} has {tokens} tokens plus start and end token; "
            "raise it or shorten the name"
        )
    return max(NAME, tokens + 1)
