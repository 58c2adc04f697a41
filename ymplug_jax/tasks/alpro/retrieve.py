"""Retrieval with ALPRO: contrastive and matching loss in training; in evaluation, rank by similarity and re-rank with the matching head.

All texts of a clip are positives and never negatives of it; `config.options.reference_negatives` allows them as negatives.
See docs/models/alpro.md, "Retrieval head".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import example_pages, gallery, pair_losses, pair_ranking, pair_scoring, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Report, Row, Task

ANSWERS = ("retrieve",)
SCORES = (
    *scores.losses("contrastive_loss", "loss"),
    *scores.shares("matching_accuracy"),
    *scores.losses("matching_loss"),
    *scores.recalls("match", ""),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How negatives are drawn, and which pairs the matching head scores in evaluation."""

    # Allow other rows of the same clip as negatives, as the reference does.
    reference_negatives: bool = option(False, predict=False)
    # Number of candidates of each video and each text that the matching head scores in evaluation; 0 scores all pairs.
    best: int = option(32, least=0, predict=False)
    # Number of rows of the batch that share negatives, which is the batch of one device in the reference; 0 uses the whole batch.
    group: int = option(0, least=0, predict=False)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of ALPRO, with contrastive and matching heads."""
    data, options = experiment.data, build(Options, experiment.options)
    model = encode_pairs.model_of(experiment)
    if not (model.contrastive_width and model.matching):
        raise ValueError("config.model: retrieval needs contrastive_width and matching; set both")
    tokenizer, length = encode_pairs.tokenizer_of(data, model), data.max_tokens
    group = pair_losses.group_of(experiment.train, options.group)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(gallery.drawn_text(record, rng), data.max_words)
        row = encode_pairs.encode(tokenizer, title, length, model)
        return {"video": preprocess.video_of(record, data, rng), **row, "clip": preprocess.clip_id(record)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        clip = None if options.reference_negatives else batch["clip"]

        def read(run: ALPRO) -> dict[str, Any]:
            video = preprocess.normalize(batch["video"], model.vision.dtype)
            return encode_pairs.forward(run, video, batch, key=draw, group=group, clip=clip, deterministic=key is None)

        out = within(model, params, read, key)
        total, metrics = encode_pairs.pair_metrics(out, batch["valid"], batch["clip"])
        return encode_pairs.with_loss(total, metrics, batch["valid"])

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        out = within(model, params, lambda run: encode_pairs.contrast(run, *encode_pairs.seen(run, batch)))
        row = {name: batch[name] for name in ("mask", "clip", "valid")}
        return row | {name: out[name] for name in ("tokens", "states", "video", "text")}

    def rescore(params: Params, rows: list[Row], kept: KeptRows) -> list[Row]:
        return score_pairs(model, params, rows, kept, options.best)

    row = preprocess.row_spec(length)
    return encode_pairs.task_of(
        model,
        kinds=(*CAPTIONED, *TITLED),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        rescore=rescore,
        kept=("tokens", "states"),
        score=score,
        scores=SCORES,
        page=example_pages.ranking("match_score", "text_match_score", "matching_accuracy"),
        embeds=True,
        fresh=(*alpro.TEMPORAL, "(vision_proj|text_proj|match|connector)/.*", "temperature"),
        bounds={"temperature": alpro.TEMPERATURE},
    )


def pair_logits(model: ALPRO, params: Params, tokens: jax.Array, texts: dict[str, jax.Array]) -> jax.Array:
    """Matching logits of every video with each of its K texts.

    Args:
      model: With a matching head.
      params: Its parameters.
      tokens: f[V, 1 + P, C] of `encode_video`.
      texts: states f[V, K, L, C] of `encode_text`, mask int32[V, K, L].

    Returns:
      f32[V, K, 2]; class 1 is a match.
    """
    v, k, length = texts["mask"].shape
    states = texts["states"].reshape(v * k, length, -1)
    mask = texts["mask"].reshape(v * k, length)

    def read(run: ALPRO) -> jax.Array:
        return run.match_logits(run.fuse(states, mask, jnp.repeat(tokens, k, axis=0)))

    return within(model, params, read).reshape(v, k, 2)


def match_score(logits: jax.Array) -> jax.Array:
    """Log-odds of a match, f32[..., 2] -> f32[...]. They order pairs as the probability does, but do not saturate at 0 and 1."""
    return logits[..., 1] - logits[..., 0]


def score_pairs(model: ALPRO, params: Params, rows: list[Row], kept: KeptRows, best: int) -> list[Row]:
    """Add the matching scores of a row's video with its `best` texts and with the texts that have it among their `best` videos.

    With `best` 0 all pairs are scored.

    Returns:
      The rows with match, f32[texts], -inf where not scored; `scored`, bool[texts]; and `fallback`, f32[texts], the similarity
      that orders the unscored pairs.
    """
    clip, first = gallery.clips_of([row["clip"].tobytes().hex() for row in rows])
    similarity = np.stack([rows[i]["video"] for i in first]) @ np.stack([row["text"] for row in rows]).T
    wanted = pair_scoring.best_of(similarity, best) if best else np.ones(similarity.shape, bool)

    def score(params: Params, videos: Params, texts: Params) -> dict[str, jax.Array]:
        return {"match": match_score(pair_logits(model, params, videos["tokens"], texts))}

    places, mask = [int(row["index"]) for row in rows], np.stack([row["mask"] for row in rows])
    sides = pair_scoring.Sides(("tokens",), [places[i] for i in first], ("states",), places, {"mask": mask})
    found = pair_scoring.scores(score, params, kept, sides, wanted, ("match",))
    keep = ("index", "clip", "video", "text")
    return [
        {key: row[key] for key in keep} | {"match": found["match"][c], "scored": wanted[c], "fallback": similarity[c]}
        for row, c in zip(rows, clip, strict=True)
    ]


def score(rows: list[Row], records: Split) -> Report:
    """Recalls of both stages: by similarity as in task "retrieve", and by the matching head under "match/".

    The readable rows show the ranking of the matching head; "similarity" lists the similarities of the retrieved videos.
    """
    by_similarity, by_match = gallery.rank_all(rows, records), pair_ranking.score(rows, records, ("match",))
    places = {int(row["index"]): row for row in rows}
    readable = []
    for r, (first, second) in enumerate(zip(by_similarity.rows, by_match.rows, strict=True)):
        answer = first | second | {"similarity_rank": first["t2v_rank"]}
        del answer["text_similarity"]  # dropped: it is in the order of the first stage
        answer["similarity"] = [round(float(places[i]["fallback"][r]), 4) for i in second["retrieved_index"]]
        readable.append(answer)
    return Report(by_match.scores | by_similarity.scores, readable, by_similarity.arrays)
