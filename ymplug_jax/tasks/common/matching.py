"""Both stages of retrieval with a matching head: rank by similarity, then re-rank the best pairs by the head.

The head reads a pair jointly, so a model gives a function of encoded pairs; everything else is the same for all models.
See docs/models/alpro.md, "Retrieval head".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Split
from ymplug_jax.tasks.common import gallery, pair_ranking, pair_scoring
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.task import Report, Row

# The matching head on N pairs: (params, tokens f[N, M, C], states f[N, L, C], mask int32[N, L]) -> f32[N, 2], class 1 is a match.
Logits = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def pair_logits(logits: Logits, params: Params, tokens: jax.Array, texts: dict[str, jax.Array]) -> jax.Array:
    """Matching logits of every video with each of its K texts.

    Args:
      logits: The matching head of the model.
      params: Its parameters.
      tokens: f[V, M, C], encoded videos.
      texts: states f[V, K, L, C], encoded texts, and mask int32[V, K, L].

    Returns:
      f32[V, K, 2]; class 1 is a match.
    """
    v, k, length = texts["mask"].shape
    states, mask = texts["states"].reshape(v * k, length, -1), texts["mask"].reshape(v * k, length)
    return logits(params, jnp.repeat(tokens, k, axis=0), states, mask).reshape(v, k, 2)


def match_score(logits: jax.Array) -> jax.Array:
    """Log-odds of a match, f32[..., 2] -> f32[...]. They order pairs as the probability does, but do not saturate at 0 and 1."""
    return logits[..., 1] - logits[..., 0]


def score_pairs(
    logits: Logits, params: Params, rows: list[Row], kept: KeptRows, best: int, *, summed: bool = False
) -> list[Row]:
    """Add the matching scores of a row's video with its `best` texts and with the texts that have it among their `best` videos.

    Args:
      logits: The matching head of the model.
      params: Its parameters.
      rows: index, clip int32[I], mask int32[L], and the unit vectors video and text f32[E].
      kept: tokens f[M, C] and states f[L, C] of every row.
      best: Number of candidates of each video and each text; 0 scores all pairs.
      summed: The score is the logit of class 1 plus the similarity instead of `match_score`.

    Returns:
      The rows with match, f32[texts], -inf where not scored; `scored`, bool[texts]; and `fallback`, f32[texts], the similarity
      that orders the unscored pairs.
    """
    clip, first = gallery.clips_of([row["clip"].tobytes().hex() for row in rows])
    similarity = np.stack([rows[i]["video"] for i in first]) @ np.stack([row["text"] for row in rows]).T
    wanted = pair_scoring.best_of(similarity, best) if best else np.ones(similarity.shape, bool)

    def score(params: Params, videos: Params, texts: Params) -> dict[str, jax.Array]:
        found = pair_logits(logits, params, videos["tokens"], texts)
        return {"match": found[..., 1] if summed else match_score(found)}

    places, mask = [int(row["index"]) for row in rows], np.stack([row["mask"] for row in rows])
    sides = pair_scoring.Sides(("tokens",), [places[i] for i in first], ("states",), places, {"mask": mask})
    match = pair_scoring.scores(score, params, kept, sides, wanted, ("match",))["match"]
    if summed:
        match = match + similarity
    keep = ("index", "clip", "video", "text")
    return [
        {key: row[key] for key in keep} | {"match": match[c], "scored": wanted[c], "fallback": similarity[c]}
        for row, c in zip(rows, clip, strict=True)
    ]


def report(rows: list[Row], records: Split) -> Report:
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
