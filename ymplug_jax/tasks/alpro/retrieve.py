"""Retrieval with ALPRO: contrastive and matching loss in training; similarity, then the match head on the best pairs in evaluation.

Texts of one clip are all right for it, and are no negatives of it (`config.options.reference_negatives` lets them be).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.alpro import encode_pairs
from ymplug_jax.tasks.common import pair_losses, pair_scoring, preprocess
from ymplug_jax.tasks.mplug_video import match, retrieve
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Report, Row, Task


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of ALPRO with contrastive and matching heads."""
    data, options = experiment.data, experiment.options
    model = encode_pairs.model_of(experiment)
    if not (model.contrastive_width and model.matching):
        raise ValueError("config.model: retrieval needs contrastive_width and matching")
    tokenizer, length, group = encode_pairs.tokenizer_of(data, model), data.max_tokens, pair_losses.group_of(experiment)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        texts = record.captions or [record.title]
        title = clean_text(texts[0 if rng is None else int(rng.integers(len(texts)))], data.max_words)
        row = encode_pairs.encode(tokenizer, title, length, model)
        return {"video": preprocess.video_of(record, data, rng), **row, "clip": preprocess.clip_id(record)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        run, draw = (
            encode_pairs.run_of(model, params, key),
            jax.random.key(0) if key is None else jax.random.fold_in(key, 1),
        )
        video, quiet = preprocess.normalize(batch["video"], model.vision.dtype), {"deterministic": key is None}
        clip = None if options.reference_negatives else batch["clip"]
        out = encode_pairs.forward(run, video, batch, key=draw, group=group, clip=clip, **quiet)
        total, metrics = encode_pairs.pair_metrics(out, batch["valid"], batch["clip"])
        return encode_pairs.with_loss(total, metrics, batch["valid"])

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = encode_pairs.run_of(model, params, None)
        tokens = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))
        out = encode_pairs.contrast(run, tokens, run.encode_text(batch["ids"], batch["mask"]))
        row = {name: batch[name] for name in ("mask", "clip", "valid")}
        row |= {name: out[name].astype(jnp.float32) for name in ("tokens", "states")}
        return row | {"video": out["video"], "text": out["text"]}

    def rescore(params: Params, rows: list[Row]) -> list[Row]:
        return score_pairs(model, params, rows, options.best)

    row = preprocess.row_spec(length)
    return Task(
        kinds=(*CAPTIONED, *TITLED),
        axes=alpro.AXES,
        frozen=(),
        init=lambda key: alpro.init(model, key),
        example=example,
        spec={"video": preprocess.video_spec(data), "ids": row, "mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        rescore=rescore,
        score=score,
        fresh=(*alpro.TEMPORAL, "(vision_proj|text_proj|match|connector)/.*", "temperature"),
        resize=alpro.RESIZE,
        bounds={"temperature": alpro.TEMPERATURE},
    )


def pair_logits(model: ALPRO, params: Params, tokens: jax.Array, texts: dict[str, jax.Array]) -> jax.Array:
    """Match logits of every video with the texts that it comes with.

    Args:
      model: unbound, with a matching head.
      params: its parameters.
      tokens: f[V, 1 + P, C] of `encode_video`.
      texts: states f[V, K, L, C] of `encode_text`, mask int32[V, K, L].

    Returns:
      f32[V, K, 2]; class 1 is a pair that matches.
    """
    run = encode_pairs.run_of(model, params, None)
    v, k, length = texts["mask"].shape
    states = texts["states"].reshape(v * k, length, -1)
    fused = run.fuse(states, texts["mask"].reshape(v * k, length), jnp.repeat(tokens, k, axis=0))
    return run.match_logits(fused).reshape(v, k, 2)


def match_score(logits: jax.Array) -> jax.Array:
    """Log-odds of a match, f32[..., 2] -> f32[...]: the order of the probability, without its ties near 0 and 1."""
    return logits[..., 1] - logits[..., 0]


def score_pairs(model: ALPRO, params: Params, rows: list[Row], best: int) -> list[Row]:
    """Adds to every row the scores of its video with the `best` texts by similarity and those whose best videos it is among
    (0: with all): match, f32[texts], -inf where not scored; `scored`, bool[texts]; and `fallback`, the similarity that orders
    what was not scored. Encoder states go."""
    clip, first = retrieve.clips_of([row["clip"].tobytes().hex() for row in rows])
    similarity = np.stack([rows[i]["video"] for i in first]) @ np.stack([row["text"] for row in rows]).T
    wanted = pair_scoring.best_of(similarity, best) if best else np.ones(similarity.shape, bool)

    def score(params: Params, tokens: jax.Array, texts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"match": match_score(pair_logits(model, params, tokens, texts))}

    table = {name: np.stack([row[name] for row in rows]) for name in ("states", "mask")}
    step = partial(jax.jit(score), params)
    found = pair_scoring.scores(step, [rows[i]["tokens"] for i in first], table, wanted, ("match",))
    keep = ("index", "clip", "video", "text")
    return [
        {key: row[key] for key in keep} | {"match": found["match"][c], "scored": wanted[c], "fallback": similarity[c]}
        for row, c in zip(rows, clip, strict=True)
    ]


def score(rows: list[Row], records: Sequence[Record]) -> Report:
    """Recalls of both stages: by similarity as in task "retrieve", and by the match head under "match/".

    Ranks and retrieved entries of the readable rows are those of the match head; "similarity" is of the retrieved videos.
    """
    by_similarity, by_match = retrieve.rank_all(rows, records), match.score(rows, records, ("match",))
    places = {int(row["index"]): row for row in rows}
    readable = []
    for r, (first, second) in enumerate(zip(by_similarity.rows, by_match.rows, strict=True)):
        answer = first | second | {"similarity_rank": first["t2v_rank"]}
        del answer["text_similarity"]  # in the order of the first stage, which is not kept
        answer["similarity"] = [round(float(places[i]["fallback"][r]), 4) for i in second["retrieved_index"]]
        readable.append(answer)
    return Report(by_match.scores | by_similarity.scores, readable, by_similarity.arrays)
