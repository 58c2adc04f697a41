"""Video-text matching: does this title belong to this video? Answered in words by the frozen decoder and by a head (spec 8.5).

In training every title stands beside its own video once and beside videos of others twice, all of `config.options.group` rows
of the batch. The reference permutes videos and titles alike, so that its "negatives" are pairs that match; here only the videos
are permuted, and `config.options.reference_negatives` restores the reference's rows.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment, Options
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import decode, mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import losses, pair_losses, pair_scoring, preprocess, task_metrics
from ymplug_jax.tasks.mplug_video.retrieve import clips_of, gallery_of, text_of
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Report, Row, Task, build

YES, NO = "是", "否"
NAMES = ("generation", "head")  # of the scores


def prompt_of(title: str, length: int) -> str:
    """The question, with as much of the title as leaves room for it."""
    return f"标题：{title[: length - 20]} 这个视频与标题匹配吗？"


def derangement(key: jax.Array, n: int) -> jax.Array:
    """Uniform permutation int32[n] without a fixed point, n >= 2: draws again until there is none."""
    places = jnp.arange(n)

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, sub = jax.random.split(carry[0])
        return key, jax.random.permutation(sub, places)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] == places), again, (key, places))[1]


def rows(key: jax.Array, groups: int, group: int, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What stands side by side, counted within each group: videos, texts and the texts that say whether they match, each
    int32[groups, group, 3]. Every row has its own pair first, then two whose videos are another's."""
    keys = jax.random.split(key, (2, groups))
    negatives = jax.vmap(jax.vmap(partial(derangement, n=group)))(keys)  # [2, groups, group]
    own = jnp.broadcast_to(jnp.arange(group), negatives.shape[1:])
    videos = jnp.stack([own, *negatives], axis=-1)  # [groups, group, 3]
    others = jnp.stack([own] * 3, axis=-1)
    return videos, videos if options.reference_negatives else others, others


def pair_scores(
    model: MPLUGVideo, params: Params, prefix: jax.Array, texts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Both scores of every video with every text that it comes with; a video's visual tokens are read once.

    Args:
      model: unbound, with a head of two classes.
      params: its parameters.
      prefix: f[B, Q, H].
      texts: of each video K texts: ids and mask int32[B, K, L] of question and 是, prompt_length int32[B, K], and plain,
        plain_mask int32[B, K, L] of the raw titles.

    Returns:
      generation: f32[B, K], log-probability of 是 and the end token; head: f32[B, K], probability of a match.
    """
    lm = params["llm"]
    _, past = model.llm.apply({"params": lm}, prefix, method="prefill")
    length = texts["ids"].shape[-1]
    after = jnp.arange(length) > texts["prompt_length"][..., None]  # [B, K, L]
    generation = decode.branch_scores(model.llm, lm, past, texts["ids"], texts["mask"].astype(bool) & after)
    b, k, _ = texts["plain"].shape
    embeds = model.llm.apply({"params": lm}, texts["plain"], method="embed")  # [B, K, L, H]
    own = model.llm.apply({"params": lm}, b, k, length, method="open_branches")
    hidden, _ = model.llm.apply({"params": lm}, embeds, past, own, method="branch")
    flat = hidden.reshape(b * k, length, -1), texts["plain_mask"].reshape(b * k, length)
    logits = model.apply({"params": params}, *flat, method="classify").reshape(b, k, -1)  # [B, K, 2]
    return {"generation": generation, "head": jax.nn.softmax(logits, axis=-1)[..., 1]}


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of MPLUGVideo, with a head of two classes."""
    data, options = experiment.data, experiment.options
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    length, queries = data.max_tokens, model.abstractor.queries
    preprocess.check(data, model, length)
    if model.classes != 2:
        raise ValueError(f"config.model.classes is {model.classes}; matching has two: no and yes")
    if experiment.train.accumulate > 1 or experiment.train.batch_size < 2:
        raise ValueError("matching takes its negatives from the batch: config.train.accumulate 1 and batch_size >= 2")
    tokenizer, group = preprocess.tokenizer_for(data, model.llm.vocab), pair_losses.group_of(experiment)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known, title = preprocess.given(tokenizer), clean_text(text_of(record), data.max_words)
        rows = [preprocess.encode_pair(known, prompt_of(title, length), answer, length) for answer in (NO, YES)]
        made = {key: np.stack([row[key] for row in rows]) for key in rows[0]}  # [2, L]: row 1 says that they match
        plain = preprocess.encode(known, title, length)
        made |= {"plain": plain["ids"], "plain_mask": plain["mask"], "clip": preprocess.clip_id(record)}
        return {"video": preprocess.video_of(record, data, rng), **made}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        run = model.bind({"params": params}, rngs={} if key is None else {"dropout": key})
        prefix = run.encode_video(preprocess.normalize(batch["video"], model.vision.dtype))["prefix"]
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        videos, texts, others = (pick.reshape(-1, 3) for pick in rows(draw, len(prefix) // group, group, options))
        take = partial(pair_losses.take, group=group)
        same = take(batch["clip"], videos) == take(batch["clip"], others)  # another of the same clip is a match
        labels = jnp.all(same, axis=-1).astype(jnp.int32)  # [3B]
        counts = take(batch["valid"], videos) & take(batch["valid"], texts)
        both = [take(batch[name], texts) for name in ("ids", "mask", "prompt_length")]  # [3B, 2, ...]
        ids, mask, lengths = (jnp.where(labels.reshape(-1, *[1] * (x.ndim - 2)), x[:, 1], x[:, 0]) for x in both)
        prefix = take(prefix, videos)  # [3B, Q, H]
        hidden = run.hidden(prefix, ids, deterministic=key is None)  # [3B, Q + L, H]
        keep = experiment.train.keep_logits
        logits_of = partial(preprocess.logits_of, model, params)
        words = losses.next_token_of(
            logits_of, hidden[:, queries:-1], ids, mask * counts[:, None], lengths, keep_logits=keep
        )[:2]
        hidden = run.hidden(prefix, take(batch["plain"], texts), deterministic=key is None)
        votes = run.classify(hidden, take(batch["plain_mask"], texts))  # [3B, 2]
        return losses.words_and_head(words, votes, labels, counts)

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        video = preprocess.normalize(batch["video"], model.vision.dtype)
        prefix = model.apply({"params": params}, video, method="encode_video")["prefix"]
        row = {"ids": batch["ids"][:, 1], "mask": batch["mask"][:, 1], "prompt_length": batch["prompt_length"][:, 1]}
        row |= {name: batch[name] for name in ("plain", "plain_mask", "clip", "valid")}
        return {"prefix": prefix.astype(jnp.float32), **row}

    def rescore(params: Params, rows: list[Row]) -> list[Row]:
        return score_pairs(model, params, rows, options)

    row, pair = preprocess.row_spec(length), jax.ShapeDtypeStruct((2, length), jnp.int32)
    spec = {"video": preprocess.video_spec(data), "ids": pair, "mask": pair, "prompt_length": preprocess.row_spec(2)}
    return Task(
        kinds=(*CAPTIONED, *TITLED),
        axes=mplug_video.axes_of(model),
        frozen=mplug_video.FROZEN,
        init=lambda key: mplug_video.init(model, key),
        example=example,
        spec=spec | {"plain": row, "plain_mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        rescore=rescore,
        score=score,
        fresh=("head/.*",),
        resize=mplug_video.RESIZE,
    )


def score_pairs(model: MPLUGVideo, params: Params, rows: list[Row], options: Options) -> list[Row]:
    """Adds to every row the scores of its video with all titles (or with the best of a retrieval index): generation and
    head, f32[texts], -inf where not scored; `scored`, bool[texts]; and `fallback`, f32[texts], the similarity that orders what
    was not scored."""
    clip, first = clips_of([row["clip"].tobytes().hex() for row in rows])
    count = len(rows)
    wanted, fallback = np.ones((len(first), count), bool), np.zeros((len(first), count), np.float32)
    if options.candidates:
        wanted, fallback = _from_index(options, [rows[i]["clip"] for i in first], clip)
    step = partial(jax.jit(partial(pair_scores, model)), params)
    texts = ("ids", "mask", "prompt_length", "plain", "plain_mask")
    table = {name: np.stack([row[name] for row in rows]) for name in texts}
    scores = pair_scoring.scores(step, [rows[i]["prefix"] for i in first], table, wanted, NAMES)
    lines = scores | {"scored": wanted, "fallback": fallback}
    keep = ("index", "clip")
    return [
        {key: row[key] for key in keep} | {name: matrix[c] for name, matrix in lines.items()}
        for row, c in zip(rows, clip, strict=True)
    ]


def _from_index(options: Options, videos: list[np.ndarray], clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs to score, similarities), bool and f32[videos, texts], from the index of a retrieval run on the same split.

    Args:
      options: of the settings.
      videos: `inputs.clip_id` of each video, int32[2].
      clip: int[texts], the video of each text.
    """
    file = f"{options.candidates} (config.options.candidates)"
    with np.load(options.candidates, allow_pickle=False) as index:
        known = {name: index[name] for name in ("video", "text", "video_id", "text_clip") if name in index}
    there, texts = known["video"], known["text"]
    if (len(there), len(texts)) != (len(videos), len(clip)):
        raise Mistake(
            f"{file} has {len(there)} videos and {len(texts)} texts, this split "
            f"{len(videos)} and {len(clip)}; evaluate the retrieval run on this very split"
        )
    ours = [tuple(part.tolist()) for part in videos]
    theirs = [tuple(preprocess.hash_of(str(name)).tolist()) for name in known.get("video_id", ())]
    if (theirs and theirs != ours) or not np.array_equal(known.get("text_clip", clip), clip):
        raise Mistake(
            f"{file} is of other videos or texts than this split; evaluate the retrieval run on this very split"
        )
    for name, part in (("video", there), ("text", texts)):
        task_metrics.check_finite(part, f"the vector in {file}", f"{name} {{}}".format)
    similarity = there @ texts.T
    return pair_scoring.best_of(similarity, options.best), similarity.astype(np.float32)


def score(rows: list[Row], records: Sequence[Record], names: Sequence[str] = NAMES) -> Report:
    """Recalls of scores of pairs, each in both directions. The last name decides the ranks of the readable rows.

    Args:
      rows: f32[texts] by name, "scored" bool[texts], and "fallback" f32[texts], which orders what was not scored.
      records: of the split.
      names: of the scores.

    Raises:
      Mistake: a score that the model gave is not finite; the message names the first video and its text.
    """
    found = [records[int(row["index"])] for row in rows]
    clip, first = clips_of([record.media_id for record in found])
    right = np.arange(len(first))[:, None] == clip  # [videos, texts]
    scored, fallback = (np.stack([rows[i][key] for i in first]) for key in ("scored", "fallback"))
    scores = gallery_of(found, len(first))
    orders, ranks = {}, {}
    for name in names:
        matrix = np.stack([rows[i][name] for i in first])
        for values in (np.where(scored, matrix, 0), fallback):
            _check(values, name, [rows[i] for i in first], rows, records)
        orders[name] = in_one_order(matrix, scored, fallback)
        ranks[name] = task_metrics.ranks_in(orders[name], right), task_metrics.ranks_in(orders[name].T, right.T)
        scores |= {f"{name}/{key}": value for key, value in task_metrics.recalls(*ranks[name]).items()}
    v2t, t2v = ranks[names[-1]]
    readable = []
    for r, (row, record) in enumerate(zip(rows, found, strict=True)):
        column, line = orders[names[-1]][:, r], orders[names[-1]][clip[r]]
        best = task_metrics.order(column)[:10]
        answer = {"index": int(row["index"]), "id": record.media_id, "text": text_of(record)}
        answer |= {"t2v_rank": int(t2v[r]), "v2t_rank": int(v2t[clip[r]])}
        answer["retrieved"] = [found[first[v]].media_id for v in best]
        answer["retrieved_index"] = [int(rows[first[v]]["index"]) for v in best]
        answer["match_score"] = [round(float(column[v]), 4) if scored[v, r] else None for v in best]
        texts = task_metrics.order(line)[:5]
        answer["retrieved_texts"] = [text_of(found[t]) for t in texts]
        answer["retrieved_texts_right"] = [bool(clip[t] == clip[r]) for t in texts]
        answer["text_match_score"] = [round(float(line[t]), 4) if scored[clip[r], t] else None for t in texts]
        readable.append(answer)
    return Report(scores, readable)


def in_one_order(scores: np.ndarray, scored: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Pairs that were scored by their score, and after all of them the others in the order of `fallback`.

    Args:
      scores: f32[V, G]; what stands where nothing was scored does not matter.
      scored: bool[V, G].
      fallback: f32[V, G].

    Returns:
      f64[V, G], finite: float32 could not tell close similarities apart once they are moved below the scores.
    """
    lowest = float(scores[scored].min()) if scored.any() else 0.0
    others = lowest - 1.0 - (fallback.max() - fallback.astype(np.float64))
    return np.where(scored, scores.astype(np.float64), others)


def _check(values: np.ndarray, name: str, videos: list[Row], texts: list[Row], records: Sequence[Record]) -> None:
    """f32[V, G] are finite, or a Mistake names the first pair."""

    def pair(v: int) -> str:
        text = texts[int(np.argmax(~np.isfinite(values[v])))]
        return f"{task_metrics.example_name(videos[v], records)} with the text of {task_metrics.example_name(text, records)}"

    task_metrics.check_finite(values, f"the model's {name!r}", pair)
