"""Pre-training of mPLUG-video: the frozen language model tells the title of the video; optionally a contrastive loss beside it.

The caption loss is one token mean over the global batch. (The reference averages per process first, so that processes with
short titles weigh more; on one process the two are the same.)
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import decode, mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import losses, preprocess
from ymplug_jax.tasks.task import TITLED, Batch, Example, Report, Row, Task, build


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of MPLUGVideo; contrastive where the model has the heads for it."""
    data = experiment.data
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    queries, length = model.abstractor.queries, data.max_tokens
    preprocess.check(data, model, length)
    tokenizer = preprocess.tokenizer_for(data, model.llm.vocab)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        return {
            "video": preprocess.video_of(record, data, rng),
            **preprocess.encode(preprocess.given(tokenizer), title, length),
        }

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        run = model.bind({"params": params}, rngs={} if key is None else {"dropout": key})
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        mask = batch["mask"] * batch["valid"][:, None]  # [B, L]
        seen = run.encode_video(video)
        hidden = run.hidden(seen["prefix"], batch["ids"], deterministic=key is None)  # [B, Q + L, H]
        keep = experiment.train.keep_logits
        logits_of = partial(preprocess.logits_of, model, params)
        words, count, right = losses.next_token_of(
            logits_of, hidden[:, queries:-1], batch["ids"], mask, keep_logits=keep
        )  # only text
        caption = Mean(words, count)
        total, metrics = losses.ratio(caption), {"caption_loss": caption, "token_accuracy": Mean(right, count)}
        if model.contrastive_width:
            text_hidden = run.hidden(None, batch["ids"], deterministic=key is None)
            units = run.contrastive(seen["image_query"], text_hidden, mask)
            pair = losses.contrastive(units["video"], units["text"], units["temperature"], valid=batch["valid"])
            metrics["contrastive_loss"] = Mean(*pair)
            total += losses.ratio(metrics["contrastive_loss"])
        metrics["loss"] = Mean(total * caption.weight, caption.weight)
        return total, metrics

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = model.bind({"params": params})
        prefix = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))["prefix"]
        begin = batch["ids"][:, :1]  # [B, 1]: the start token
        ones = jnp.ones(begin.shape[0], jnp.int32)
        eos = preprocess.given(tokenizer).eos
        prompt = decode.prompt_of(model.llm, params["llm"], prefix, begin, ones)
        out = decode.greedy(model.llm, params["llm"], *prompt, new_tokens=length - 1, eos=eos)
        return {"generated": out.ids, "ids": batch["ids"], "valid": batch["valid"]}

    def score(rows: list[Row], records: Sequence[Record]) -> Report:
        return report_of(rows, records, partial(preprocess.decode, preprocess.given(tokenizer)))

    spec = {
        "video": preprocess.video_spec(data),
        "ids": preprocess.row_spec(length),
        "mask": preprocess.row_spec(length),
    }
    return Task(
        kinds=TITLED,
        axes=mplug_video.axes_of(model),
        frozen=mplug_video.FROZEN,
        init=lambda key: mplug_video.init(model, key),
        example=example,
        spec=spec,
        loss=loss,
        predict=predict,
        score=score,
        fresh=mplug_video.TEMPORAL,
        resize=mplug_video.RESIZE,
    )


def report_of(rows: list[Row], records: Sequence[Record], text: Callable[[np.ndarray], str]) -> Report:
    """How many titles are told to the last character. A clip counts once: its first row's text stands against the titles of
    all its rows.

    Args:
      rows: ids and generated int32[L], "index" the place in the split.
      records: of the split.
      text: ids of a row as text.
    """
    clips: dict[str, dict] = {}
    for row in rows:
        index = int(row["index"])
        own = {"index": index, "id": records[index].media_id, "titles": [], "generated": text(row["generated"])}
        clips.setdefault(own["id"], own)["titles"].append(text(row["ids"]))
    answers = []
    for clip in clips.values():
        titles = clip.pop("titles")
        title = clip["generated"] if clip["generated"] in titles else titles[0]
        more = {"titles": titles} if len(titles) > 1 else {}
        answers.append(clip | {"title": title} | more)
    right = sum(answer["title"] == answer["generated"] for answer in answers)
    scores = {"modalities": "video", "rows": len(rows), "clips": len(answers), "exact_titles": right}
    return Report(scores | {"exact_share": right / max(len(answers), 1)}, answers)
