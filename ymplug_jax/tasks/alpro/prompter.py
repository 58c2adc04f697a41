"""ALPRO's prompter, the teacher of entity prediction: two encoders trained with the contrastive loss over the global batch.

Evaluation writes `index.npz` as retrieval does. With `config.options.prompts` the file also holds the table of entities (and with
`config.options.image_prompts` a second one for still images), which pre-training reads (`config.options.entities`). See docs/models/alpro.md, "Entity prompts".
"""

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core import places
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
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

PROMPTS = 512  # prompts per batch
ANSWERS = ("retrieve",)
SCORES = (*scores.losses("contrastive_loss", "loss"), *scores.recalls(""))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the evaluation writes."""

    # Path to the entity prompts that data_prep.entity_prompts wrote; evaluation embeds them as the table of entities.
    prompts: str = option("", file=True, predict=False)
    # Path to the prompts of the same entities for still images; evaluation embeds them as a second table.
    image_prompts: str = option("", file=True, predict=False)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of ALPRO, with contrastive heads only."""
    data, options = experiment.data, build(Options, experiment.options)
    model = encode_pairs.model_of(experiment)
    if not model.contrastive_width or alpro.prompter_of(model) != model:
        raise ValueError(
            "config.model: the prompter has contrastive heads only; make the model with models/alpro.py, prompter_of"
        )
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens
    prompts = prompts_of(options)  # used after the last batch; report errors now

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        return {"video": preprocess.video_of(record, data, rng), **encode_pairs.encode(tokenizer, title, length, model)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        total, out = contrastive(model, params, video, batch, key)
        return encode_pairs.with_loss(total, {"contrastive_loss": out["loss"]}, batch["valid"])

    def rescore(params: Params, rows: list[Row], kept: KeptRows) -> list[Row]:
        """Add the tables of entities to the first row, because they belong to no row in particular."""
        found = {"entity": np.array(prompts["entity_features"][0])}
        return [rows[0] | found | {name: table(params, *of) for name, of in prompts.items()}, *rows[1:]]

    def table(params: Params, names: list[str], texts: list[str]) -> np.ndarray:
        cleaned = [clean_text(prompt, data.max_words) for prompt in texts]
        longest = max(len(preprocess.given(tokenizer).encode(prompt)) for prompt in cleaned) + 2
        made = [
            encode_pairs.encode(tokenizer, prompt, min(longest, model.text.max_positions), model) for prompt in cleaned
        ]
        ids, mask = (np.stack([row[key] for row in made]) for key in ("ids", "mask"))
        return entity_features(model, params, ids, mask, len(names))

    def score(rows: list[Row], records: Split) -> Report:
        report = gallery.rank_all(rows, records)
        if "entity" in rows[0]:
            report.arrays.update({name: rows[0][name] for name in ("entity", *prompts)})
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
        rescore=rescore if prompts else None,
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
    """Contrastive loss of a batch: (loss, encodings and the loss as a `Mean`).

    Args:
      model: With contrastive heads.
      params: Its parameters.
      video: Normalised video, f[B, T, S, S, 3].
      batch: ids and mask int32[B, L], valid bool[B].
      key: PRNG key of dropout, None in evaluation.
    """

    def read(run: ALPRO) -> dict[str, jax.Array]:
        tokens = run.encode_video(video, deterministic=key is None)
        return encode_pairs.contrast(
            run, tokens, run.encode_text(batch["ids"], batch["mask"], deterministic=key is None)
        )

    out, own = within(model, params, read, key), jnp.arange(len(video))[:, None]
    mean = Mean(*losses.retrieval(out["video"], out["text"], out["temperature"], own, valid=batch["valid"]))
    return losses.ratio(mean), out | {"loss": mean}


def entity_features(model: ALPRO, params: Params, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Table of entities f32[K, E]: the mean over the templates of the prompts' unit vectors, not normalised again.

    Args:
      model: With contrastive heads.
      params: Its parameters.
      ids: int32[templates * K, L], grouped by template.
      mask: int32[templates * K, L].
      count: K, the number of entities.
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


def prompts_of(options: Options) -> dict[str, tuple[list[str], list[str]]]:
    """The prompts of each table that the evaluation writes: array of index.npz -> (entities, prompts).

    Raises:
      Mistake: Prompts of still images are given alone, or with other entities.
      FileNotFoundError, ValueError: A file is missing or has another format.
    """
    if not options.prompts:
        if options.image_prompts:
            raise Mistake(
                "config.options.image_prompts: needs config.options.prompts as well; give the prompts of clips"
            )
        return {}
    found = {"entity_features": read_prompts(options.prompts)}
    if options.image_prompts:
        found["image_entity_features"] = read_prompts(options.image_prompts, "config.options.image_prompts")
        if found["image_entity_features"][0] != found["entity_features"][0]:
            raise Mistake(
                f"config.options.image_prompts {options.image_prompts}: its entities are not those of {options.prompts} "
                "(config.options.prompts); write both files with the same --entities, --csv and --count"
            )
    return found


def read_prompts(path: str, setting: str = "config.options.prompts") -> tuple[list[str], list[str]]:
    """Read a file of data_prep.entity_prompts: (K entities, all prompts grouped by template).

    Raises:
      FileNotFoundError: The file does not exist.
      ValueError: The file has another format.
    """
    file = places.place(path, setting)
    if not file.exists() or file.is_dir():
        raise FileNotFoundError(f"{setting} {path}: no such file; give the file that data_prep.entity_prompts wrote")
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        entities, templates = list(made["entities"]), list(made["templates"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{setting} {path}: not a file of entity prompts ({error}); write it with data_prep.entity_prompts"
        ) from None
    if not entities or not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"{setting} {path}: no entities, or a template without {{}}; write it with data_prep.entity_prompts"
        )
    return entities, [template.replace("{}", entity) for template in templates for entity in entities]
