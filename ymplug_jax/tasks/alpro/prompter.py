"""ALPRO's teacher of entities by itself: two encoders and the contrastive loss over the global batch.

Evaluation leaves `index.npz` as retrieval does; with `config.options.prompts` it holds the table of entities as well, which
pre-training with entities reads (`config.options.entities`).
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import example_pages, gallery, losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import TITLED, Batch, Example, Report, Row, Task

PROMPTS = 512  # texts that are read at once
ANSWERS = ("retrieve",)
SCORES = (*scores.losses("contrastive_loss", "loss"), *scores.recalls(""))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the evaluation leaves."""

    prompts: str = option("", file=True, predict=False)  # file of entity prompts that data_prep.entity_prompts wrote


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of ALPRO with contrastive heads and no others."""
    data, options = experiment.data, build(Options, experiment.options)
    model = encode_pairs.model_of(experiment)
    if not model.contrastive_width or alpro.prompter_of(model) != model:
        raise ValueError("config.model: the prompter has contrastive heads alone; see models/alpro.py, prompter_of")
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens
    if options.prompts:
        read_prompts(options.prompts)  # used after the last batch; what is wrong with it is found now

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        return {"video": preprocess.video_of(record, data, rng), **encode_pairs.encode(tokenizer, title, length, model)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        total, out = contrastive(model, params, video, batch, key)
        return encode_pairs.with_loss(total, {"contrastive_loss": out["loss"]}, batch["valid"])

    def rescore(params: Params, rows: list[Row], kept: KeptRows) -> list[Row]:
        """The table of entities, which belongs to the model and not to a row, travels with the first one."""
        names, texts = read_prompts(options.prompts)
        cleaned = [clean_text(prompt, data.max_words) for prompt in texts]
        longest = max(len(preprocess.given(tokenizer).encode(prompt)) for prompt in cleaned) + 2
        made = [
            encode_pairs.encode(tokenizer, prompt, min(longest, model.text.max_positions), model) for prompt in cleaned
        ]
        ids, mask = (np.stack([row[key] for row in made]) for key in ("ids", "mask"))
        table = entity_features(model, params, ids, mask, len(names))
        return [rows[0] | {"entity": np.array(names), "entity_features": table}, *rows[1:]]

    def score(rows: list[Row], records: Split) -> Report:
        report = gallery.rank_all(rows, records)
        if "entity" in rows[0]:
            report.arrays.update({name: rows[0][name] for name in ("entity", "entity_features")})
            report.scores["entities"] = len(rows[0]["entity"])
        return report

    row = preprocess.row_spec(length)
    return encode_pairs.task_of(
        model,
        kinds=TITLED,
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row},
        loss=loss,
        predict=partial(encode_pairs.vectors, model),
        rescore=rescore if options.prompts else None,
        score=score,
        scores=SCORES,
        page=example_pages.ranking("similarity", "text_similarity"),
        embeds=True,
        fresh=(*alpro.TEMPORAL, "(vision_proj|text_proj|connector)/.*", "temperature"),
        bounds={"temperature": alpro.TEMPERATURE},
    )


def contrastive(
    model: ALPRO, params: Params, video: jax.Array, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, dict[str, Any]]:
    """(loss, unit vectors and the loss as a mean): normalised video f[B, T, S, S, 3]; ids, mask int32[B, L], valid bool[B]."""

    def read(run: ALPRO) -> dict[str, jax.Array]:
        tokens = run.encode_video(video, deterministic=key is None)
        return encode_pairs.contrast(
            run, tokens, run.encode_text(batch["ids"], batch["mask"], deterministic=key is None)
        )

    out, own = within(model, params, read, key), jnp.arange(len(video))[:, None]
    mean = Mean(*losses.retrieval(out["video"], out["text"], out["temperature"], own, valid=batch["valid"]))
    return losses.ratio(mean), out | {"loss": mean}


def entity_features(model: ALPRO, params: Params, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """f32[K, E]: the mean over the templates of the unit vectors of K entities' prompts, not normalised again.

    Args:
      model: with contrastive heads.
      params: its parameters.
      ids: int32[templates * K, L], template by template.
      mask: int32[templates * K, L].
      count: K.
    """
    step = jax.jit(partial(_text_units, model))
    pad = -len(ids) % min(PROMPTS, len(ids))
    ids, mask = (np.pad(x, ((0, pad), (0, 0)), mode="edge") for x in (ids, mask))
    size = min(PROMPTS, len(ids))
    parts = [np.asarray(step(params, ids[i : i + size], mask[i : i + size])) for i in range(0, len(ids), size)]
    units = np.concatenate(parts)[: len(ids) - pad]
    return units.reshape(-1, count, units.shape[-1]).mean(axis=0)


def _text_units(model: ALPRO, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return within(model, params, lambda run: run.embed_text(run.encode_text(ids, mask)))


def read_prompts(path: str) -> tuple[list[str], list[str]]:
    """(K entities, prompts template by template) of a file of data_prep.entity_prompts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; set config.options.prompts to what data_prep.entity_prompts wrote"
        )
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        entities, templates = list(made["entities"]), list(made["templates"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} (config.options.prompts) is no file of data_prep.entity_prompts: {error}") from None
    if not entities or not templates or any("{}" not in template for template in templates):
        raise ValueError(f"{path} (config.options.prompts) needs entities, and templates with {{}} in them")
    return entities, [template.replace("{}", entity) for template in templates for entity in entities]
