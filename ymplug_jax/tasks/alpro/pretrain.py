"""Pre-training of ALPRO: contrastive, matching, masked words and, where the model has a head for them, entities of a region.

The losses are summed. All means are over the global batch; matching draws its negatives among `config.options.group` rows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core import checkpoint_files, index_file
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import losses, pair_losses, preprocess
from ymplug_jax.tasks.mplug_video import retrieve
from ymplug_jax.tasks.task import TITLED, Batch, Example, Report, Row, Task


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of ALPRO with contrastive, matching and masked-word heads."""
    data, options = experiment.data, experiment.options
    model = encode_pairs.model_of(experiment)
    if not (model.contrastive_width and model.matching and model.masked):
        raise ValueError("config.model: pre-training needs contrastive_width, matching and masked")
    tokenizer, length, group = encode_pairs.tokenizer_of(data, model), data.max_tokens, pair_losses.group_of(experiment)
    specials = encode_pairs.specials_of(tokenizer)
    spared = ("pad", "bos") if model.variant == "youku" else tuple(specials)
    never = tuple(specials[name] for name in spared)
    entities = teacher_entities(experiment, model)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        made = {"video": preprocess.video_of(record, data, rng), **encode_pairs.encode(tokenizer, title, length, model)}
        made["clip"] = preprocess.clip_id(record)
        if model.entities:
            draw = np.random.default_rng(made["clip"].view(np.uint32)) if rng is None else rng
            made["box"] = encode_pairs.choose_box(data.image_size, model.vision.patch_size, draw)
        return made

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        draws = jax.random.split(jax.random.key(0) if key is None else jax.random.fold_in(key, 1))
        masking = pair_losses.draw_masking(draws[0], batch["ids"].shape, model.text.vocab, options.masked_share)
        shown, told = pair_losses.mask_words(batch["ids"], masking, never, specials["mask"])
        run = encode_pairs.run_of(model, params, key)
        video, quiet = preprocess.normalize(batch["video"], model.vision.dtype), {"deterministic": key is None}
        clip = None if options.reference_negatives else batch["clip"]
        out = encode_pairs.forward(run, video, batch, key=draws[1], group=group, clip=clip, shown=shown, **quiet)
        targets = teach(model, params["prompter"], batch["video"], batch["box"]) if model.entities else None
        return total(model, params, batch, out, told, targets, experiment)

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = encode_pairs.run_of(model, params, None)
        tokens = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))
        out = encode_pairs.contrast(run, tokens, run.encode_text(batch["ids"], batch["mask"]))
        return {"video": out["video"], "text": out["text"], "valid": batch["valid"]}

    def score(rows: list[Row], records: Sequence[Record]) -> Report:
        return retrieve.rank_all(rows, records)

    row = preprocess.row_spec(length)
    spec = {"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)}
    return Task(
        kinds=TITLED,
        axes=alpro.AXES,
        frozen=alpro.TEACHER if model.entities else (),
        init=lambda key: started(model, key, entities),
        example=example,
        spec=spec | ({"box": preprocess.row_spec(4)} if model.entities else {}),
        loss=loss,
        predict=predict,
        score=score,
        fresh=(
            *alpro.TEMPORAL,
            "(vision_proj|text_proj|match|entity|connector)/.*",
            "temperature",
            "prompter/entities",
        ),
        resize=alpro.RESIZE,
        bounds={"temperature": alpro.TEMPERATURE},
    )


def total(
    model: ALPRO,
    params: Params,
    batch: Batch,
    out: dict,
    told: jax.Array,
    targets: jax.Array | None,
    experiment: Experiment,
) -> tuple[jax.Array, Metrics]:
    """The sum of the losses and each by itself.

    Args:
      model: unbound; params: its parameters.
      batch: ids int32[B, L], mask, valid; with entities box int32[B, 4].
      out: of `align.forward` with four pairs.
      told: bool[B, L], the words to tell.
      targets: f32[B, K], the teacher's entities, or None.
      experiment: settings.
    """
    valid, length = batch["valid"], batch["ids"].shape[1]
    run = encode_pairs.run_of(model, params, None)
    loss, metrics = encode_pairs.pair_metrics(
        out, valid, jnp.arange(len(valid))[:, None]
    )  # each row has its own text alone

    def words_at(states: jax.Array) -> jax.Array:
        return model.apply({"params": params}, states, method="words")

    told, keep = told & valid[:, None], experiment.train.keep_logits
    words, count, right = losses.words_of(words_at, out["fused"][:, 3, :length], batch["ids"], told, keep_logits=keep)
    metrics |= {"masked_loss": Mean(words, count), "masked_accuracy": Mean(right, count)}
    loss += losses.ratio(metrics["masked_loss"])
    if targets is not None:
        logits = run.entity_logits(out["fused"][:, 0], inside(model, batch["box"]))
        rule = experiment.options.reference_entities
        metrics["entity_loss"] = Mean(*pair_losses.entity(logits, targets, valid, reference_rule=rule))
        loss += losses.ratio(metrics["entity_loss"])
    return encode_pairs.with_loss(loss, metrics, valid)


def inside(model: ALPRO, box: jax.Array) -> jax.Array:
    """Patches that boxes cover: int32[B, 4] -> bool[B, P]."""
    return pair_losses.inside_of(box, model.vision.image_size // model.vision.patch_size).reshape(len(box), -1)


def teach(model: ALPRO, params: Params, video: jax.Array, box: jax.Array) -> jax.Array:
    """The teacher's entities of a region: uint8[B, T, S, S, 3], int32[B, 4] -> f32[B, K]; all outside the region is black."""
    side, patch = model.vision.image_size, model.vision.patch_size
    seen = pair_losses.inside_of(box * patch, side)[:, None, :, :, None]  # [B, 1, S, S, 1]
    crop = preprocess.normalize(jnp.where(seen, video, 0), model.vision.dtype)
    run = alpro.prompter_of(model).bind({"params": params})
    units = run.embed_video(run.encode_video(crop))
    temperature = jnp.clip(params["temperature"].astype(jnp.float32), *alpro.TEMPERATURE)
    return pair_losses.entity_targets(units, params["entities"], temperature)


def teacher_entities(experiment: Experiment, model: ALPRO) -> np.ndarray | None:
    """f32[K, E] of `config.options.entities`, None where it is not given.

    Raises:
      ValueError: a run that predicts entities and has none, as many as the model has no room for, or those of another prompter
        than `config.train.init_from` names.
    """
    options, train = experiment.options, experiment.train
    if not model.entities:
        return None
    if not options.entities:
        if experiment.data.path and (not train.init_from or "=" in train.init_from):
            raise ValueError(
                "config.options.entities is empty; evaluate a run of task alpro_prompter and give its index.npz"
            )
        return None
    index = index_file.read(options.entities, (), setting="config.options.entities")
    if "entity_features" not in index:
        raise ValueError(f"{options.entities} (config.options.entities) has no entity_features; see alpro_prompter")
    found = index["entity_features"].astype(np.float32)
    # The teacher's own table: that of another prompter has the same shape, and would teach at random.
    for subtree, _, folder in checkpoint_files.sources(train.init_from):
        if subtree == "prompter" and checkpoint_files.places(folder):
            own = {"fingerprint": checkpoint_files.fingerprint(folder)}
            index_file.check_origin(options.entities, index, own, f"{folder} (config.train.init_from)")
    if found.shape != (model.entities, model.contrastive_width):
        raise ValueError(
            f"{options.entities} (config.options.entities) has {found.shape[0]} entities of width {found.shape[1]}; "
            f"config.model.entities is {model.entities} and contrastive_width {model.contrastive_width}; give the model the "
            "table's numbers, or the table of another prompter"
        )
    return found


def started(model: ALPRO, key: jax.Array, entities: np.ndarray | None) -> Params:
    """Fresh parameters, the teacher's table of entities filled where it is known."""
    params = alpro.init(model, key)
    if entities is not None:
        params["prompter"]["entities"] = jnp.asarray(entities)
    return params
