"""The choice of the next token from logits: penalties, filters, and a draw or the maximum.

Described in docs/models/language_models.md, "Choice of a token". The rules are applied in the order in which `Rules` lists them,
which is that of Hugging Face's generation.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the next token is chosen. The defaults choose the likeliest token.

    Penalties look at the tokens generated so far, not at the prompt. If they forbid every token, the end token is chosen.

    Raises:
      ValueError: a value is out of range.
    """

    # Divides positive and multiplies negative scores of generated tokens; 1 changes nothing, more than 1 avoids repetition.
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0  # Tokens N of the sequences that may not occur twice in an answer; 0: no limit.
    temperature: float = 0.0  # Divisor of the logits before a draw; 0: no draw, the likeliest token.
    top_k: int = 0  # Draws from the k likeliest tokens and all that equal the k-th; 0: no limit.
    top_p: float = 1.0  # Draws from the likeliest of the tokens left whose probabilities sum up to p; 1: no limit.

    def __post_init__(self) -> None:
        for name, (good, wanted) in {
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "more than 0"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
        }.items():
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r} is out of range; give {wanted}")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0


def choose(
    logits: jax.Array, rules: Rules, said: jax.Array, count: jax.Array, eos: int | jax.Array, key: jax.Array | None = None
) -> jax.Array:  # fmt: skip
    """Choose one token for each row; the lower id wins a tie.

    Args:
      logits: f32[B, V].
      rules: for all rows.
      said: int32[B, W], tokens that the rows have generated; what follows the first `count` of them is ignored.
      count: int32 scalar.
      eos: the end token.
      key: one key for all rows, or key[B]: then a row's draws do not depend on its place in the batch. It is not read if the rules
        draw nothing. Step `count` uses `fold_in(key, count)`.

    Returns:
      int32[B].
    """
    logits = penalised(logits, rules, said, count, eos)
    if not rules.draws:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None
    logits = filtered(logits, rules)
    if not key.ndim:
        return jax.random.categorical(jax.random.fold_in(key, count), logits).astype(jnp.int32)
    drawn = jax.vmap(lambda own, row: jax.random.categorical(jax.random.fold_in(own, count), row))(key, logits)
    return drawn.astype(jnp.int32)


def penalised(scores: jax.Array, rules: Rules, said: jax.Array, count: jax.Array, eos: int | jax.Array) -> jax.Array:
    """Scores after the repetition penalty and the limit on repeated sequences.

    Args:
      scores: f32[B, V], logits or log-probabilities.
      rules: as for `choose`.
      said: as for `choose`.
      count: as for `choose`.
      eos: the end token.

    Returns:
      f32[B, V]; -inf at forbidden tokens. If all are forbidden, the end token alone keeps a finite score.
    """
    if rules.repetition_penalty != 1:
        seen = _marked(scores, said, jnp.broadcast_to(jnp.arange(said.shape[1]) < count, said.shape))
        weaker = jnp.where(scores < 0, scores * rules.repetition_penalty, scores / rules.repetition_penalty)
        scores = jnp.where(seen, weaker, scores)
    if 0 < rules.no_repeat_ngram <= said.shape[1]:
        allowed = jnp.where(_repeats(scores, said, count, rules.no_repeat_ngram), -jnp.inf, scores)
        none = jnp.all(jnp.isneginf(allowed), axis=-1, keepdims=True)
        scores = jnp.where(none & (jnp.arange(scores.shape[-1]) == eos), jnp.maximum(scores, -1e9), allowed)
    return scores


def filtered(logits: jax.Array, rules: Rules) -> jax.Array:
    """Logits less their maximum, divided by the temperature; -inf where `top_k`, then `top_p`, leaves a token out: f32[..., V] -> f32[..., V]."""
    largest = jnp.max(logits, axis=-1, keepdims=True)  # subtracted, so that a tiny temperature gives no infinity
    logits = (logits - jnp.where(jnp.isneginf(largest), 0, largest)) / rules.temperature
    if 0 < rules.top_k < logits.shape[-1]:
        logits = jnp.where(keep_top_k(logits, rules.top_k), logits, -jnp.inf)
    if rules.top_p < 1:
        logits = jnp.where(keep_top_p(logits, rules.top_p), logits, -jnp.inf)
    return logits


def _marked(scores: jax.Array, tokens: jax.Array, chosen: jax.Array) -> jax.Array:
    """Mask of the chosen tokens of each row: int32[B, W], bool[B, W] -> bool[B, V]; ids outside the vocabulary mark nothing."""
    empty = jnp.zeros(scores.shape, bool)
    inside = chosen & (tokens >= 0)
    return jax.vmap(lambda row, ids, on: row.at[ids].max(on, mode="drop"))(empty, jnp.maximum(tokens, 0), inside)


def _repeats(scores: jax.Array, said: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """Mask of the tokens that would complete a sequence of `size` tokens which is already there: bool[B, V]."""
    windows = said.shape[1] - size + 1
    last = jax.lax.dynamic_slice_in_dim(said, jnp.maximum(count - size + 1, 0), size - 1, axis=1)  # [B, size - 1]
    complete = jnp.arange(windows) + size <= count  # windows that hold generated tokens only
    equal = jnp.broadcast_to(complete, (said.shape[0], windows))
    for i in range(size - 1):
        equal &= said[:, i : i + windows] == last[:, i : i + 1]
    return _marked(scores, said[:, size - 1 :], equal)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of f[..., V]: (values, indices) [..., k]; of equal values the lower index comes first.

    XLA may sort the whole axis. This function sorts the maxima of groups of 128, then only the k groups that win.
    """
    size, wide = x.shape[-1], 128
    groups = -(-size // wide)
    if groups <= 2 * k:
        return jax.lax.top_k(x, k)
    ends = [(0, 0)] * (x.ndim - 1) + [(0, groups * wide - size)]
    cut = jnp.pad(x, ends, constant_values=-jnp.inf).reshape(*x.shape[:-1], groups, wide)  # [..., groups, 128]
    chosen = jnp.sort(jax.lax.top_k(cut.max(axis=-1), k)[1], axis=-1)  # [..., k], sorted, so that ties keep their order
    few = jnp.take_along_axis(cut, chosen[..., None], axis=-2).reshape(*x.shape[:-1], k * wide)
    values, place = jax.lax.top_k(few, k)
    return values, jnp.take_along_axis(chosen, place // wide, axis=-1) * wide + place % wide


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Mask of the k largest logits of the last axis, with all that equal the k-th: f[..., V] -> bool[..., V]."""
    return logits >= top_k(logits, k)[0][..., -1:]


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Mask of the likeliest tokens until their sum exceeds `p`, the one that exceeds it included: f[..., V] -> bool[..., V]."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    kept = jnp.concatenate([jnp.ones_like(total[..., :1], bool), total[..., :-1] <= p], axis=-1)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
