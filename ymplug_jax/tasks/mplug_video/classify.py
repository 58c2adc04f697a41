"""Video category classification: the frozen decoder names the class after title and video, and a head votes beside it (spec 8.2).

Evaluation scores all class names (the 45 categories, or those of `config.data.classes`) by their log-probability and by the head, with video and title, with the video alone
and with the title alone: a title by itself already goes far on this data.
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
from ymplug_jax.models import mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import candidates, losses, preprocess, task_metrics
from ymplug_jax.tasks.task import Batch, Example, Report, Row, Task, build

NAME = 16  # positions for a class name and the end token
MODALITIES = ("both", "video", "title")  # what the model is shown


def prompt_of(title: str, length: int) -> str:
    """What the class name follows, with as much of the title as leaves room for it."""
    return f"视频标题：{title[: length - 15]} 视频类目："


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of MPLUGVideo, with a head of as many classes as there are names."""
    data = experiment.data
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    length, names = data.max_tokens, preprocess.class_names(data)
    if model.classes != len(names):
        where = f"names in {data.classes} (config.data.classes)" if data.classes else "categories"
        raise Mistake(
            f"config.model.classes is {model.classes}; the {where} are {len(names)}: set config.model.classes={len(names)}"
        )
    preprocess.check_classes(data, names)
    tokenizer = preprocess.tokenizer_for(data, model.llm.vocab)
    preprocess.check(data, model, length + room_for(names, tokenizer, length))

    def asked(title: str) -> Example:
        """The candidates after a title, and the title by itself for the head."""
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
        made = {"video": preprocess.video_of(record, data, rng), **pair, "label": np.int32(label)}
        made |= {"plain": plain["ids"], "plain_mask": plain["mask"]}
        return made | asked(title) if rng is None else made

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        run = model.bind({"params": params}, rngs={} if key is None else {"dropout": key})
        counts = batch["valid"] & (batch["label"] >= 0)
        mask = batch["mask"] * counts[:, None]  # [B, L]
        prefix = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))["prefix"]
        hidden = run.hidden(prefix, batch["ids"], deterministic=key is None)  # [B, Q + L, H]
        keep = experiment.train.keep_logits
        text, logits_of = hidden[:, model.abstractor.queries : -1], partial(preprocess.logits_of, model, params)
        words = losses.next_token_of(logits_of, text, batch["ids"], mask, batch["prompt_length"], keep_logits=keep)[:2]
        hidden = run.hidden(prefix, batch["plain"], deterministic=key is None)
        votes = run.classify(hidden, batch["plain_mask"])  # [B, C]
        return losses.words_and_head(words, votes, batch["label"], counts)

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = model.bind({"params": params})
        prefix = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))["prefix"]
        b = prefix.shape[0]
        blank = {key: jnp.broadcast_to(value, (b, *np.shape(value))) for key, value in asked("").items()}
        shown = {"both": (prefix, batch), "video": (prefix, blank), "title": (None, batch)}
        likelihood, head = [], []
        for modality in MODALITIES:
            seen, texts = shown[modality]
            likelihood.append(candidates.scores(model.llm, params["llm"], seen, texts))
            hidden = run.hidden(seen, texts["plain"])
            head.append(run.classify(hidden, texts["plain_mask"]))
        out = {"likelihood": jnp.stack(likelihood, axis=1), "head": jnp.stack(head, axis=1)}  # [B, 3, C] each
        return out | {"label": batch["label"], "valid": batch["valid"]}

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    row = preprocess.row_spec(length)
    spec = {"video": preprocess.video_spec(data), "ids": row, "mask": row, "prompt_length": scalar, "label": scalar}
    return Task(
        kinds=("classification",),
        axes=mplug_video.axes_of(model),
        frozen=mplug_video.FROZEN,
        init=lambda key: mplug_video.init(model, key),
        example=example,
        spec=spec | {"plain": row, "plain_mask": row},
        loss=loss,
        predict=predict,
        score=partial(report, names=names),
        fresh=("head/.*",),
        resize=mplug_video.RESIZE,
    )


def room_for(names: Sequence[str], tokenizer: Tokenizer | None, length: int) -> int:
    """Positions that the names take behind a row of `length` tokens.

    Raises:
      Mistake: a name that does not fit into a row, so that its tail would not count.
    """
    if tokenizer is None:
        return NAME
    longest = max(names, key=lambda name: len(tokenizer.encode(name)))
    tokens = len(tokenizer.encode(longest))
    if tokens + 2 > length:
        raise Mistake(
            f"config.data.max_tokens is {length}, but the class {longest!r} has {tokens} tokens, beginning and end not counted; "
            "raise it or shorten the name"
        )
    return max(NAME, tokens + 1)


def report(
    rows: list[Row], records: Sequence[Record], names: Sequence[str], by: Sequence[str] = ("likelihood", "head")
) -> Report:
    """Top-1 and top-5 of every kind of vote and every modality. Ties count against the model (`metrics.top_k`), in the scores
    and in what is "predicted" alike; a true name that is not in the list counts as missed.

    Args:
      rows: of each kind in `by` votes f32[3, C] in the order of MODALITIES, and "label" (-1: none).
      records: of the split.
      names: of the C classes.
      by: kinds of votes; the first one decides what is "predicted".

    Raises:
      Mistake: votes that are not finite; the message names the first example.
    """
    task_metrics.check_rows(rows, records, *by)
    known = [row for row in rows if row["label"] >= 0]
    unlisted = sum(1 for row in rows if row["label"] < 0 and records[int(row["index"])].label_text)
    labelled = len(known) + unlisted
    scores: dict[str, object] = {"modalities": "both (video and title), video, title", "labelled": labelled}
    scores["classes"] = len(names)
    if unlisted:
        scores["unlisted"] = unlisted
    if not labelled:
        scores["note"] = "this split has no labels: predictions are written, nothing is scored"
    for m, modality in enumerate(MODALITIES):
        for kind in by if labelled else ():
            ranks = np.full(labelled, np.inf)  # of what is not listed: missed
            if known:
                votes, labels = np.stack([row[kind][m] for row in known]), np.array([row["label"] for row in known])
                ranks[: len(known)] = task_metrics.class_ranks(votes, labels)
            for k in (1, 5):
                scores[f"{modality}/{kind}_top{k}"] = 100 * float(np.mean(ranks <= k))
    return Report(scores, [readable(row, records, names, by) for row in rows])


def readable(row: Row, records: Sequence[Record], names: Sequence[str], by: Sequence[str]) -> dict:
    """One example's answers by name."""
    record = records[int(row["index"])]
    answer = {"index": int(row["index"]), "id": record.media_id, "title": record.title}
    label = int(row["label"])
    answer["label"] = names[label] if label >= 0 else record.label_text or None
    for m, modality in enumerate(MODALITIES):
        answer |= {f"{modality}/{kind}": names[task_metrics.order(row[kind][m], label)[0]] for kind in by}
    shares = np.asarray(candidates.probabilities(row[by[0]][0]))
    best = task_metrics.order(row[by[0]][0], label)[:5]
    return answer | {"predicted": names[best[0]], "top5": {names[c]: float(shares[c]) for c in best}}
