"""Video-text matching: the frozen decoder and a classification head predict whether a title belongs to a video.

In training each title is paired with its own video and with two negative videos from its group of `config.options.group` rows. The
reference permutes titles together with videos, so its "negatives" are matching pairs. Here only the videos are permuted;
`config.options.reference_negatives` restores the reference's behaviour. See docs/models/mplug_video.md, "Matching head".
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import decode
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import (
    example_pages,
    gallery,
    losses,
    pair_losses,
    pair_ranking,
    pair_scoring,
    preprocess,
    scores,
    task_metrics,
)
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.mplug_video import passes
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import CAPTIONED, TITLED, Batch, Example, Row, Task

YES, NO = "是", "否"
NAMES = ("generation", "head")  # names of the scores
SCORES = (
    *scores.losses("generation_loss"),
    *scores.shares("head_accuracy"),
    *scores.losses("head_loss", "loss"),
    *scores.recalls(*NAMES),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which pairs are trained and scored."""

    reference_negatives: bool = option(
        False, predict=False
    )  # Permute titles together with videos, as the reference does.
    # Path to the index.npz of a retrieval run's evaluation, whose best pairs are scored; "" scores all pairs.
    candidates: str = option("", file=True, arrays=("video", "text"), predict=False)
    best: int = option(32, least=0, predict=False)  # Number of candidates scored for each video and each title.
    # Number of rows of the batch that share negatives, which is the batch of one device in the reference; 0 uses the whole batch.
    group: int = option(0, least=0, predict=False)


def prompt_of(title: str, length: int) -> str:
    """The question about a title, with the title truncated so that the question fits."""
    return f"标题：{title[: length - 20]} 这个视频与标题匹配吗？"


def derangement(key: jax.Array, n: int) -> jax.Array:
    """Draw a uniform permutation int32[n] without fixed points, n >= 2, by rejection sampling."""
    places = jnp.arange(n)

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, sub = jax.random.split(carry[0])
        return key, jax.random.permutation(sub, places)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] == places), again, (key, places))[1]


def rows(key: jax.Array, groups: int, group: int, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw the pairs of a batch: its own pair and two negatives for each row, as row numbers within its group.

    Returns:
      (videos, texts, labels' texts), int32[groups, group, 3] each. A pair matches if the video and the third entry are of one clip.
    """
    keys = jax.random.split(key, (2, groups))
    negatives = jax.vmap(jax.vmap(partial(derangement, n=group)))(keys)  # [2, groups, group]
    own = jnp.broadcast_to(jnp.arange(group), negatives.shape[1:])
    videos = jnp.stack([own, *negatives], axis=-1)  # [groups, group, 3]
    others = jnp.stack([own] * 3, axis=-1)
    return videos, videos if options.reference_negatives else others, others


def pair_scores(
    model: MPLUGVideo, params: Params, prefix: jax.Array, texts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Score every video with each of its K texts; its visual tokens are prefilled once.

    Args:
      model: Model with a head of two classes.
      params: Its parameters.
      prefix: f[B, Q, H], visual tokens.
      texts: ids and mask int32[B, K, L] of question and 是, prompt_length int32[B, K], and plain and plain_mask
        int32[B, K, L] of the raw titles.

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
    logits = within(model, params, lambda run: run.classify(*flat)).reshape(b, k, -1)  # [B, K, 2]
    return {"generation": generation, "head": jax.nn.softmax(logits, axis=-1)[..., 1]}


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGVideo, with a head of two classes."""
    data, keep, options = experiment.data, experiment.train.keep_logits, build(Options, experiment.options)
    model, tokenizer = passes.model_of(experiment)
    length = data.max_tokens
    passes.check_room(model, length)
    if model.classes != 2:
        raise ValueError(
            f"config.model.classes: {model.classes} classes, but matching has two, no and yes; set config.model.classes=2"
        )
    if experiment.train.accumulate > 1 or experiment.train.batch_size < 2:
        raise ValueError(
            "config.train: matching takes its negatives from the batch; set accumulate 1 and batch_size 2 or more"
        )
    group = pair_losses.group_of(experiment.train, options.group)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known, title = preprocess.given(tokenizer), clean_text(gallery.text_of(record), data.max_words)
        rows = [preprocess.encode_pair(known, prompt_of(title, length), answer, length) for answer in (NO, YES)]
        made = {key: np.stack([row[key] for row in rows]) for key in rows[0]}  # [2, L]: row 1 is the answer of a match
        plain = preprocess.encode(known, title, length)
        made |= {"plain": plain["ids"], "plain_mask": plain["mask"], "clip": preprocess.clip_id(record)}
        return {"video": preprocess.video_of(record, data, rng), **made}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        groups = len(batch["valid"]) // group
        videos, texts, others = (pick.reshape(-1, 3) for pick in rows(draw, groups, group, options))
        take = partial(pair_losses.take, group=group)
        same = take(batch["clip"], videos) == take(batch["clip"], others)  # another row of the same clip is a match
        labels = jnp.all(same, axis=-1).astype(jnp.int32)  # [3B]
        counts = take(batch["valid"], videos) & take(batch["valid"], texts)
        both = [take(batch[name], texts) for name in ("ids", "mask", "prompt_length")]  # [3B, 2, ...]
        ids, mask, lengths = (jnp.where(labels.reshape(-1, *[1] * (x.ndim - 2)), x[:, 1], x[:, 0]) for x in both)
        text = {"ids": ids, "mask": mask * counts[:, None], "prompt_length": lengths}
        text |= {name: take(batch[name], texts) for name in ("plain", "plain_mask")}
        words, votes = passes.words_and_votes(
            model,
            params,
            lambda run: take(passes.see(run, batch["video"])["prefix"], videos),
            text,
            key,
            keep_logits=keep,
        )
        return losses.words_and_head(words, votes, labels, counts)

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        row = {"ids": batch["ids"][:, 1], "mask": batch["mask"][:, 1], "prompt_length": batch["prompt_length"][:, 1]}
        row |= {name: batch[name] for name in ("plain", "plain_mask", "clip", "valid")}
        return {"prefix": passes.prefix_of(model, params, batch), **row}

    def rescore(params: Params, rows: list[Row], kept: KeptRows) -> list[Row]:
        return score_pairs(model, params, rows, kept, options)

    row, pair = preprocess.row_spec(length), jax.ShapeDtypeStruct((2, length), jnp.int32)
    spec = {"video": preprocess.video_spec(data), "ids": pair, "mask": pair, "prompt_length": preprocess.row_spec(2)}
    return passes.task_of(
        model,
        kinds=(*CAPTIONED, *TITLED),
        example=example,
        spec=spec | {"plain": row, "plain_mask": row, "clip": preprocess.row_spec(2)},
        loss=loss,
        predict=predict,
        rescore=rescore,
        kept=("prefix",),
        score=partial(pair_ranking.score, names=NAMES),
        scores=SCORES,
        page=example_pages.ranking("match_score", "text_match_score", "head_accuracy"),
        fresh=("head/.*",),
    )


def score_pairs(model: MPLUGVideo, params: Params, rows: list[Row], kept: KeptRows, options: Options) -> list[Row]:
    """Add the scores of a row's video with all titles, or with the best candidates of a retrieval index.

    Returns:
      The rows with generation and head, f32[texts], -inf where not scored; `scored`, bool[texts]; and `fallback`, f32[texts],
      the similarity that orders the unscored pairs.
    """
    clip, first = gallery.clips_of([row["clip"].tobytes().hex() for row in rows])
    count = len(rows)
    wanted, fallback = np.ones((len(first), count), bool), np.zeros((len(first), count), np.float32)
    if options.candidates:
        wanted, fallback = _from_index(options, [rows[i]["clip"] for i in first], clip)

    def score(params: Params, videos: Params, texts: Params) -> dict[str, jax.Array]:
        return pair_scores(model, params, videos["prefix"], texts)

    names = ("ids", "mask", "prompt_length", "plain", "plain_mask")
    texts = {name: np.stack([row[name] for row in rows]) for name in names}
    places = [int(row["index"]) for row in rows]
    sides = pair_scoring.Sides(("prefix",), [places[i] for i in first], (), places, texts)
    found = pair_scoring.scores(score, params, kept, sides, wanted, NAMES)
    lines = found | {"scored": wanted, "fallback": fallback}
    keep = ("index", "clip")
    return [
        {key: row[key] for key in keep} | {name: matrix[c] for name, matrix in lines.items()}
        for row, c in zip(rows, clip, strict=True)
    ]


def _from_index(options: Options, videos: list[np.ndarray], clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs to score, similarities), bool and f32[videos, texts], from the index of a retrieval run on the same split.

    Args:
      options: Options of the task.
      videos: `preprocess.clip_id` of each video, int32[2].
      clip: int[texts], the video of each text.

    Raises:
      Mistake: The index is of another split or holds a vector that is not finite.
    """
    file = f"config.options.candidates {options.candidates}"
    with np.load(options.candidates, allow_pickle=False) as index:
        known = {name: index[name] for name in ("video", "text", "video_id", "text_clip") if name in index}
    there, texts = known["video"], known["text"]
    if (len(there), len(texts)) != (len(videos), len(clip)):
        raise Mistake(
            f"{file}: has {len(there)} videos and {len(texts)} texts, this split "
            f"{len(videos)} and {len(clip)}; evaluate the retrieval run on the same split"
        )
    ours = [tuple(part.tolist()) for part in videos]
    theirs = [tuple(preprocess.hash_of(str(name)).tolist()) for name in known.get("video_id", ())]
    if (theirs and theirs != ours) or not np.array_equal(known.get("text_clip", clip), clip):
        raise Mistake(f"{file}: of other videos or texts than this split; evaluate the retrieval run on the same split")
    for name, part in (("video", there), ("text", texts)):
        task_metrics.check_finite(part, f"the vector in {file}", f"{name} {{}}".format)
    similarity = there @ texts.T
    return pair_scoring.best_of(similarity, options.best), similarity.astype(np.float32)
