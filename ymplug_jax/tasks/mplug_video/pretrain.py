"""Pre-training of mPLUG-video: generate the title with the frozen language model, optionally with a contrastive loss.

The caption loss is the mean over the target tokens of the global batch. The reference averages per process first, which gives
processes with short titles more weight; on one process both are the same. See docs/models/mplug_video.md, "Pre-training".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import decode, mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import chance, example_pages, losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug_video import passes
from ymplug_jax.tasks.mplug_video.passes import spoken
from ymplug_jax.tasks.presentation import Answer, Chance, ReadableRow, Scores
from ymplug_jax.tasks.task import TITLED, Batch, Example, Report, Row, Task

ANSWERS = ("caption",)
SCORES = (*scores.losses("caption_loss", "contrastive_loss", "loss"), *scores.shares("token_accuracy", "exact_share"))


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGVideo. The contrastive loss needs `contrastive_width` > 0."""
    data, keep = experiment.data, experiment.train.keep_logits
    model, tokenizer = passes.model_of(experiment)
    length = data.max_tokens
    passes.check_room(model, length)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        return {
            "video": preprocess.video_of(record, data, rng),
            **preprocess.encode(preprocess.given(tokenizer), title, length),
        }

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        mask = batch["mask"] * batch["valid"][:, None]  # [B, L]

        def read(run: MPLUGVideo) -> tuple[jax.Array, dict[str, jax.Array]]:
            seen, quiet = passes.see(run, batch["video"]), key is None
            hidden = run.hidden(seen["prefix"], batch["ids"], deterministic=quiet)  # [B, Q + L, H]
            if not model.contrastive_width:
                return hidden, {}
            return hidden, run.contrastive(
                seen["image_query"], run.hidden(None, batch["ids"], deterministic=quiet), mask
            )

        hidden, units = within(model, params, read, key)
        words, count, right = passes.said(model, params, hidden, batch["ids"], mask, keep_logits=keep)
        caption = Mean(words, count)
        total, metrics = losses.ratio(caption), {"caption_loss": caption, "token_accuracy": Mean(right, count)}
        if units:
            pair = losses.contrastive(units["video"], units["text"], units["temperature"], valid=batch["valid"])
            metrics["contrastive_loss"] = Mean(*pair)
            total += losses.ratio(metrics["contrastive_loss"])
        metrics["loss"] = Mean(total * caption.weight, caption.weight)
        return total, metrics

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        prefix = passes.prefix_of(model, params, batch)
        begin = batch["ids"][:, :1]  # [B, 1]: the start token
        ones = jnp.ones(begin.shape[0], jnp.int32)
        eos = preprocess.given(tokenizer).eos
        prompt = decode.prompt_of(model.llm, params["llm"], prefix, begin, ones)
        out = decode.greedy(model.llm, params["llm"], *prompt, new_tokens=length - 1, eos=eos)
        return {
            "generated": out.ids,
            "ids": batch["ids"][:, 1:],
            "valid": batch["valid"],
        }  # both without the start token

    def score(rows: list[Row], records: Split) -> Report:
        return report_of(rows, records, partial(preprocess.decode, preprocess.given(tokenizer)))

    page = example_pages.titles()

    def by_chance(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
        return chance.both(page.chance(scores, rows), chance.tokens(scores, model.llm.vocab, "token_accuracy"))

    def describe(row: Mapping[str, np.ndarray], record: Record, best: int) -> Answer:
        return spoken(record, preprocess.decode(preprocess.given(tokenizer), row["generated"]))

    spec = {
        "video": preprocess.video_spec(data),
        "ids": preprocess.row_spec(length),
        "mask": preprocess.row_spec(length),
    }
    return passes.task_of(
        model,
        kinds=TITLED,
        example=example,
        spec=spec,
        loss=loss,
        predict=predict,
        score=score,
        scores=(*SCORES[:1], *(SCORES[1:2] if model.contrastive_width else ()), *SCORES[2:]),
        page=dataclasses.replace(page, chance=by_chance),
        describe={"caption": describe},
        fresh=mplug_video.TEMPORAL,
    )


def report_of(rows: list[Row], records: Split, text: Callable[[np.ndarray], str]) -> Report:
    """Share of titles that are generated exactly.

    A clip counts once: the text generated for its first row is compared with the titles of all its rows.

    Args:
      rows: ids and generated, int32[L - 1] without the start token; "index" is the position in the split.
      records: Records of the split.
      text: Decodes the ids of a row.
    """
    clips: dict[str, dict[str, Any]] = {}
    for row in rows:
        index = int(row["index"])
        own: dict[str, Any] = {
            "index": index,
            "id": records[index].media_id,
            "titles": [],
            "generated": text(row["generated"]),
        }
        clips.setdefault(records[index].media_id, own)["titles"].append(text(row["ids"]))
    answers = []
    for clip in clips.values():
        titles = clip.pop("titles")
        title = clip["generated"] if clip["generated"] in titles else titles[0]
        more = {"titles": titles} if len(titles) > 1 else {}
        answers.append(clip | {"title": title} | more)
    right = sum(answer["title"] == answer["generated"] for answer in answers)
    found = {"modalities": "video", "rows": len(rows), "clips": len(answers), "exact_titles": right}
    return Report(found | {"exact_share": right / max(len(answers), 1)}, answers)
