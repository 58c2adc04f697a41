"""Pre-training of ALPRO: contrastive, matching, masked language modelling and, with `model.entities`, entity prediction for a region.

The losses are summed. Each is a mean over the global batch; negatives for matching come from the `config.options.group` rows of a
group. See docs/models/alpro.md, "Pre-training".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core import checkpoint_files, index_file
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import chance, example_pages, gallery, losses, pair_losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.presentation import Chance, ReadableRow, Scores
from ymplug_jax.tasks.task import TITLED, Batch, Example, Task

ANSWERS = ("retrieve",)
SCORES = (
    *scores.losses("contrastive_loss", "entity_loss", "loss"),
    *scores.shares("masked_accuracy"),
    *scores.losses("masked_loss"),
    *scores.shares("matching_accuracy"),
    *scores.losses("matching_loss"),
    *scores.recalls(""),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is masked, how negatives are drawn, and the teacher's entities."""

    # Allow other rows of the same clip as negatives, as the reference does.
    reference_negatives: bool = option(False, predict=False)
    # Number of rows of the batch that share negatives, which is the batch of one device in the reference; 0 uses the whole batch.
    group: int = option(0, least=0, predict=False)
    masked_share: float = option(
        0.15, least=0, most=1, predict=False
    )  # Share of the tokens that are selected for prediction.
    # Path to the index.npz of a prompter's evaluation, which holds the teacher's table of entities.
    entities: str = option("", file=True, arrays=("entity_features",), predict=False)
    # Exclude rows by the index of their best entity instead of its probability, as the reference does.
    reference_entities: bool = option(False, predict=False)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of ALPRO, with contrastive, matching and masked-token heads."""
    data, options = experiment.data, build(Options, experiment.options)
    model = encode_pairs.model_of(experiment)
    if model.stills and not model.entities:
        raise Mistake(
            "config.model.stills: needs config.model.entities, whose second table it adds; set both or neither"
        )
    if not (model.contrastive_width and model.matching and model.masked):
        raise ValueError("config.model: pre-training needs contrastive_width, matching and masked; set all three")
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens
    group = pair_losses.group_of(experiment.train, options.group)
    specials = encode_pairs.specials_of(tokenizer)
    spared = ("pad", "bos") if model.variant == "youku" else tuple(specials)
    never = tuple(specials[name] for name in spared)
    entities = teacher_entities(experiment, options.entities, model)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        still = model.stills and len(record.frames) == 1
        video = (preprocess.still_of if still else preprocess.video_of)(record, data, rng)
        made = {"video": video, **encode_pairs.encode(tokenizer, title, length, model)}
        made["clip"] = preprocess.clip_id(record)
        if model.stills:
            made["still"] = np.array(still)
        if model.entities:
            draw = np.random.default_rng(made["clip"].view(np.uint32)) if rng is None else rng
            made["box"] = encode_pairs.choose_box(data.image_size, model.vision.patch_size, draw)
        return made

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        draws = jax.random.split(jax.random.key(0) if key is None else jax.random.fold_in(key, 1))
        masking = pair_losses.draw_masking(draws[0], batch["ids"].shape, model.text.vocab, options.masked_share)
        shown, told = pair_losses.mask_words(batch["ids"], masking, never, specials["mask"])
        clip = None if options.reference_negatives else batch["clip"]

        def read(run: ALPRO) -> dict[str, Any]:
            video = preprocess.normalize(batch["video"], model.vision.dtype)
            return encode_pairs.forward(
                run, video, batch, key=draws[1], group=group, clip=clip, shown=shown, deterministic=key is None
            )

        out = within(model, params, read, key)
        targets = None
        if model.entities:
            targets = teach(model, params["prompter"], batch["video"], batch["box"], batch.get("still"))
        return total(
            model, params, batch, out, told, targets,
            keep_logits=experiment.train.keep_logits, reference_entities=options.reference_entities,
        )  # fmt: skip

    def by_chance(scores: Scores, rows: Sequence[ReadableRow]) -> Chance:
        return chance.both(page.chance(scores, rows), chance.tokens(scores, model.text.vocab, "masked_accuracy"))

    page = example_pages.ranking("similarity", "text_similarity", "matching_accuracy")

    row = preprocess.row_spec(length)
    spec = {"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)}
    spec |= {"box": preprocess.row_spec(4)} if model.entities else {}
    spec |= {"still": jax.ShapeDtypeStruct((), bool)} if model.stills else {}
    return encode_pairs.task_of(
        model,
        kinds=TITLED,
        frozen=alpro.TEACHER if model.entities else (),
        init=lambda key: started(model, key, entities),
        example=example,
        spec=spec,
        apart=model.stills,  # a batch holds still images or clips
        loss=loss,
        predict=partial(encode_pairs.vectors, model),
        score=gallery.rank_all,
        scores=tuple(score for score in SCORES if model.entities or score.name != "entity_loss"),
        page=dataclasses.replace(page, chance=by_chance),
        embeds=True,
        fresh=(
            *alpro.TEMPORAL,
            "(vision_proj|text_proj|match|entity|connector)/.*",
            "temperature",
            "prompter/(image_)?entities",
        ),
        bounds={"temperature": alpro.TEMPERATURE},
    )


def total(
    model: ALPRO,
    params: Params,
    batch: Batch,
    out: dict[str, Any],
    told: jax.Array,
    targets: jax.Array | None,
    *,
    keep_logits: bool,
    reference_entities: bool,
) -> tuple[jax.Array, Metrics]:
    """Sum of the losses, and the metrics with each loss.

    Args:
      model: The model.
      params: All of its parameters.
      batch: ids and mask int32[B, L], valid bool[B]; with entities also box int32[B, 4].
      out: Result of `encode_pairs.forward` with four pairs.
      told: bool[B, L], the masked positions to predict.
      targets: f32[B, K], soft entity labels of the teacher, or None.
      keep_logits: `config.train.keep_logits`.
      reference_entities: `config.options.reference_entities`.
    """
    valid, length = batch["valid"], batch["ids"].shape[1]
    loss, metrics = encode_pairs.pair_metrics(
        out, valid, jnp.arange(len(valid))[:, None]
    )  # only its own text is a positive of a row

    def words_at(states: jax.Array) -> jax.Array:
        return within(model, params, lambda run: run.words(states))

    words, count, right = losses.words_of(
        words_at, out["fused"][:, 3, :length], batch["ids"], told & valid[:, None], keep_logits=keep_logits
    )
    metrics |= {"masked_loss": Mean(words, count), "masked_accuracy": Mean(right, count)}
    loss += losses.ratio(metrics["masked_loss"])
    if targets is not None:
        region = inside(model, batch["box"])
        logits = within(model, params, lambda run: run.entity_logits(out["fused"][:, 0], region))
        found = pair_losses.entity(logits, targets, valid, reference_rule=reference_entities)
        metrics["entity_loss"] = Mean(*found)
        loss += losses.ratio(metrics["entity_loss"])
    return encode_pairs.with_loss(loss, metrics, valid)


def inside(model: ALPRO, box: jax.Array) -> jax.Array:
    """Mask of the patches inside the boxes: int32[B, 4] -> bool[B, P]."""
    return pair_losses.inside_of(box, model.vision.image_size // model.vision.patch_size).reshape(len(box), -1)


def teach(model: ALPRO, params: Params, video: jax.Array, box: jax.Array, still: jax.Array | None = None) -> jax.Array:
    """Soft entity labels for a region, f32[B, K]. Pixels outside the region are set to 0.

    Args:
      model: The model.
      params: Parameters of the teacher.
      video: uint8[B, T, S, S, 3].
      box: int32[B, 4], in patches.
      still: bool[B], rows whose entities are those of still images; None: no row.
    """
    side, patch = model.vision.image_size, model.vision.patch_size
    seen = pair_losses.inside_of(box * patch, side)[:, None, :, :, None]  # [B, 1, S, S, 1]
    crop = preprocess.normalize(jnp.where(seen, video, 0), model.vision.dtype)
    units = within(alpro.prompter_of(model), params, lambda run: run.embed_video(run.encode_video(crop)))
    temperature = jnp.clip(params["temperature"].astype(jnp.float32), *alpro.TEMPERATURE)
    targets = pair_losses.entity_targets(units, params["entities"], temperature)
    if still is None:
        return targets
    of_images = pair_losses.entity_targets(units, params["image_entities"], temperature)
    return jnp.where(still[:, None], of_images, targets)


def teacher_entities(experiment: Experiment, path: str, model: ALPRO) -> dict[str, np.ndarray]:
    """Read the teacher's tables of entities from `path` (`config.options.entities`).

    Returns:
      Name of the teacher's parameter -> f32[K, E]; {} if the model needs none, or no path is given.

    Raises:
      ValueError: A table is missing, its shape does not fit the model, or it is of another prompter than the one that
        `config.train.init_from` names.
    """
    train = experiment.train
    if not model.entities:
        return {}
    if not path:
        if experiment.data.path and (not train.init_from or "=" in train.init_from):
            raise ValueError(
                "config.options.entities: empty; evaluate a run of task alpro_prompter and give its index.npz"
            )
        return {}
    index = index_file.read(path, (), setting="config.options.entities")
    # A table of another prompter would have the right shape but give random labels.
    for subtree, _, folder in checkpoint_files.sources(train.init_from):
        if subtree == "prompter" and checkpoint_files.places(folder):
            own = {"fingerprint": checkpoint_files.fingerprint(folder)}
            index_file.check_origin(path, index, own, f"{folder} (config.train.init_from)")
    tables = {"entities": _table(index, path, model, "entity_features", "config.options.prompts")}
    if model.stills:
        tables["image_entities"] = _table(index, path, model, "image_entity_features", "config.options.image_prompts")
    return tables


def _table(index: Mapping[str, np.ndarray], path: str, model: ALPRO, name: str, option_of: str) -> np.ndarray:
    if name not in index:
        raise ValueError(
            f"config.options.entities {path}: has no {name}; give the index.npz of task alpro_prompter, evaluated with {option_of}"
        )
    found = index[name].astype(np.float32)
    if found.shape != (model.entities, model.contrastive_width):
        raise ValueError(
            f"config.options.entities {path}: has {found.shape[0]} entities of width {found.shape[1]}; "
            f"config.model.entities is {model.entities} and config.model.contrastive_width {model.contrastive_width}; set them to the table's "
            "sizes or give the table of another prompter"
        )
    return found


def started(model: ALPRO, key: jax.Array, entities: Mapping[str, np.ndarray]) -> Params:
    """Initial parameters, with the teacher's tables of entities that are given."""
    params = alpro.init(model, key)
    for name, table in entities.items():
        params["prompter"][name] = jnp.asarray(table)
    return params
