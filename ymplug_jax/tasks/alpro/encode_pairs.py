"""Inputs and forward pass of ALPRO over a batch of pairs, shared by its tasks. See docs/models/alpro.md."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Data, Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data import text
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.tasks.common import losses, pair_losses, preprocess
from ymplug_jax.tasks.common.pair_losses import Negatives
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.task import Batch, Example, Task, build

# Special tokens of bert-base-chinese, used for planning without a tokenizer.
SPECIALS = {"pad": 0, "unk": 100, "bos": 101, "eos": 102, "mask": 103}


def model_of(experiment: Experiment) -> ALPRO:
    """Make the model and check that it fits the data.

    Raises:
      ValueError: Model and data disagree; the message names the setting to change.
    """
    data, model = experiment.data, build(ALPRO, experiment.model)
    if model.variant not in alpro.VARIANTS:
        raise ValueError(
            f"config.model.variant: unknown variant {model.variant!r}; choose one of {', '.join(alpro.VARIANTS)}"
        )
    preprocess.check_video(data, model.vision)
    if data.max_tokens > model.text.max_positions:
        raise ValueError(
            f"config.data.max_tokens: {data.max_tokens} exceeds config.model.text.max_positions {model.text.max_positions}; lower it"
        )
    return model


def tokenizer_of(data: Data, model: ALPRO) -> Tokenizer | None:
    """Load the WordPiece tokenizer of the settings; None if they name none, as planning needs none.

    Raises:
      ValueError: The tokenizer has more tokens than the model's vocabulary, or no [MASK] token.
    """
    tokenizer = preprocess.tokenizer_for(data, model.text.vocab, "config.model.text.vocab")
    if tokenizer is not None and getattr(tokenizer, "mask", None) is None:
        raise ValueError(f"{data.tokenizer} has no [MASK] token; give a BERT vocab.txt or tokenizer.json")
    return tokenizer


def specials_of(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Ids of the special tokens by name."""
    return SPECIALS if tokenizer is None else {name: getattr(tokenizer, name) for name in SPECIALS}


def encode(tokenizer: Tokenizer | None, words: str, length: int, model: ALPRO) -> Example:
    """{"ids": int32[L], "mask": int32[L]} of a cleaned text: start token, text, end token (variant "salesforce" only), padding."""
    known = preprocess.given(tokenizer)
    end = known.eos if model.variant == "salesforce" else None
    ids, mask = text.encode_words(known.encode(words), length, bos=known.bos, eos=end, pad=known.pad)
    return {"ids": ids, "mask": mask}


def seen(run: ALPRO, batch: Batch, *, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
    """Encode a stored batch with both encoders, inside `passes.within`: video tokens f[B, 1 + P, C], text states f[B, L, C]."""
    video = preprocess.normalize(batch["video"], run.vision.dtype)
    tokens = run.encode_video(video, deterministic=deterministic)
    return tokens, run.encode_text(batch["ids"], batch["mask"], deterministic=deterministic)


def vectors(model: ALPRO, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Predictions of a task that `embeds`: unit vectors video and text, f32[B, E], and valid."""
    out = within(model, params, lambda run: contrast(run, *seen(run, batch)))
    return {"video": out["video"], "text": out["text"], "valid": batch["valid"]}


def task_of(model: ALPRO, **own: Any) -> Task:
    """The `Task` record of a task on this model; `own` holds its other fields."""
    fields: dict[str, Any] = {"frozen": (), "init": lambda key: alpro.init(model, key), "resize": alpro.RESIZE, **own}
    return Task(axes=alpro.AXES, **fields)


def forward(
    run: ALPRO,
    video: jax.Array,
    batch: dict[str, jax.Array],
    *,
    key: jax.Array | None,
    group: int,
    clip: jax.Array | None = None,
    negatives: Negatives | None = None,
    shown: jax.Array | None = None,
    deterministic: bool = True,
) -> dict[str, Any]:
    """Encode videos and texts, draw negatives and fuse all pairs in one pass of the fusion encoder.

    Args:
      run: Bound model inside `passes.within`, with contrastive and matching heads.
      video: Normalised video, f[B, T, S, S, 3].
      batch: ids and mask int32[B, L], valid bool[B].
      key: PRNG key for drawing the negatives; None if `negatives` are given.
      group: Number of neighbouring rows that share negatives.
      clip: int32[B, I], equal for rows that must not be negatives of each other; None: no such rows.
      negatives: Negatives to use instead of drawing them.
      shown: int32[B, L], the text with masked tokens, fused with its own video as a fourth pair.
      deterministic: False applies dropout.

    Returns:
      tokens f[B, 1 + P, C], states f[B, L, C], video and text f32[B, E] (unit vectors), temperature (clipped to its limits),
      negatives, fused f[B, 3 or 4, L + 1 + P, C] (in the order of `pair_losses.pairs`), match f32[B, 3, 2].
    """
    quiet = {"deterministic": deterministic}
    mask, valid = batch["mask"], batch["valid"]
    tokens, states = run.encode_video(video, **quiet), run.encode_text(batch["ids"], mask, **quiet)
    out = contrast(run, tokens, states)
    free = pair_losses.allowed(valid, clip, group)
    if negatives is None:
        assert key is not None
        negatives = pair_losses.choose_negatives(key, out["video"], out["text"], out["temperature"], free)
    texts, masks, videos = pair_losses.pairs(states, mask, tokens, negatives, group)  # [B, 3, ...] each
    if shown is not None:
        told = run.encode_text(shown, mask, **quiet)
        texts, masks, videos = (
            jnp.concatenate([three, one[:, None]], axis=1)
            for three, one in ((texts, told), (masks, mask), (videos, tokens))
        )
    flat = [
        x.reshape(-1, *x.shape[2:]) for x in (texts, masks, videos)
    ]  # grouped by row, so that pairs stay on their row's device
    fused = run.fuse(*flat, deterministic=deterministic)
    fused = fused.reshape(*texts.shape[:2], *fused.shape[1:])  # [B, 3 or 4, L + 1 + P, C]
    return out | {"negatives": negatives, "fused": fused, "match": run.match_logits(fused[:, :3])}


def contrast(run: ALPRO, tokens: jax.Array, states: jax.Array) -> dict[str, jax.Array]:
    """Encodings with the unit vectors and temperature of the contrastive loss."""
    return {
        "tokens": tokens,
        "states": states,
        "video": run.embed_video(tokens),
        "text": run.embed_text(states),
        "temperature": losses.bounded(run.temperature.astype(jnp.float32), *alpro.TEMPERATURE),
    }


def pair_metrics(out: dict[str, Any], valid: jax.Array, ids: jax.Array) -> tuple[jax.Array, Metrics]:
    """Sum of the mean contrastive and the mean matching loss, and the metrics.

    Args:
      out: Result of `forward`.
      valid: bool[B].
      ids: int32[B, I], equal for rows of the same clip.
    """
    contrastive = Mean(*losses.retrieval(out["video"], out["text"], out["temperature"], ids, valid=valid))
    total, count, right = pair_losses.matching(out["match"], valid, out["negatives"].found)
    match = Mean(total, count)
    metrics = {"contrastive_loss": contrastive, "matching_loss": match, "matching_accuracy": Mean(right, count)}
    return losses.ratio(contrastive) + losses.ratio(match), metrics


def with_loss(total: jax.Array, metrics: Metrics, valid: jax.Array) -> tuple[jax.Array, Metrics]:
    """Add the total loss to the metrics, weighted by the number of valid rows."""
    count = jnp.sum(valid, dtype=jnp.float32)
    return total, metrics | {"loss": Mean(total * count, count)}


def choose_box(size: int, patch: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a region of a square image: int32[4] top, left, height, width in patches.

    The region covers 0.3 to 0.5 of the area with an aspect ratio of 0.3 to 1 / 0.3. All four numbers are rounded down to whole
    patches; regions that leave the image are drawn again.
    """
    while True:
        area, aspect = rng.uniform(0.3, 0.5) * size**2, rng.uniform(0.3, 1 / 0.3)
        width, height = int(np.sqrt(area / aspect)) // patch, int(np.sqrt(area * aspect)) // patch
        top, left = (int(place) // patch for place in rng.integers(size, size=2))
        if width and height and (top + height) * patch <= size and (left + width) * patch <= size:
            return np.array([top, left, height, width], np.int32)
