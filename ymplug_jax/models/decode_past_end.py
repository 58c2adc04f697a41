"""Beam search in which a beam goes on after its end token: the search of the released mPLUG-2 code, to reproduce its outputs.

`decode_beam.search` is the one to use: there a beam that ends is taken out. Described in docs/models/mplug2.md, "Generation".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models.decode import State, advance
from ymplug_jax.models.decode_beam import length_term, without_end
from ymplug_jax.models.decode_sampling import top_k
from ymplug_jax.models.language_model import LanguageModel


class Hypotheses(NamedTuple):
    """The C best hypotheses of each row, best first."""

    ids: jax.Array  # int32[B, C, new_tokens]; end tokens may stand anywhere, and `lengths` says where a hypothesis ends
    lengths: jax.Array  # int32[B, C], number of tokens; 0 for a missing hypothesis
    values: jax.Array  # f32[B, C], -inf for a missing hypothesis


class _Beams(NamedTuple):
    """A search in progress."""

    step: jax.Array  # int32 scalar, number of tokens chosen so far
    state: State
    scores: jax.Array  # f32[B, C], summed log-probabilities of the beams
    rows: jax.Array  # int32[B, C, new_tokens]
    kept: Hypotheses
    done: jax.Array  # bool[B]


def search(
    lm: LanguageModel, params: dict, state: State, new_tokens: int, eos: int | jax.Array, *,
    length_power: float, length_offset: int, least_tokens: int,
) -> Hypotheses:  # fmt: skip
    """Continue C beams by the C best of all C * V continuations, until the best of them ends with the end token.

    A beam is finished if its newest token is the end token, or the last that fits. Where the best beam is finished, all beams become
    hypotheses and the row stops. Otherwise every finished beam becomes a hypothesis and goes on as well.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      state: of `decode.start`, with C branches; the vocabulary has at least C tokens.
      new_tokens: largest number of tokens.
      eos: the end token.
      length_power: see `decode_beam.length_term`, by which the log-probabilities of hypotheses are divided.
      length_offset: see `decode_beam.length_term`.
      least_tokens: tokens before the first end token, at the least.
    """
    b, beams, vocab = state.logits.shape
    rows = jnp.full((b, beams, new_tokens), eos, jnp.int32)
    state = state._replace(past=state.past._replace(origin=jnp.zeros_like(rows)))

    def body(loop: _Beams) -> _Beams:
        logs = without_end(jax.nn.log_softmax(loop.state.logits), eos, loop.step < least_tokens)
        scores, flat = top_k((logs + loop.scores[..., None]).reshape(b, -1), beams)  # [B, C]
        parents, tokens = flat // vocab, (flat % vocab).astype(jnp.int32)
        written = loop.step + 1
        rows = jnp.take_along_axis(loop.rows, parents[..., None], axis=1)
        rows = jax.lax.dynamic_update_slice(rows, tokens[..., None], (0, 0, loop.step))
        finished = (tokens == eos) | (written == new_tokens)  # [B, C]
        stop = finished[:, 0]
        values = jnp.where(
            finished | stop[:, None], scores / length_term(written, length_power, length_offset), -jnp.inf
        )
        kept = _best(loop.kept, Hypotheses(rows, jnp.where(jnp.isneginf(values), 0, written), values), beams)
        kept = jax.tree.map(
            lambda old, new: jnp.where(loop.done.reshape(b, *(1,) * (old.ndim - 1)), old, new), loop.kept, kept
        )
        state = advance(lm, params, loop.state, tokens, parents)
        return _Beams(written, state, scores, rows, kept, loop.done | stop)

    scores = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (b, beams))
    none = Hypotheses(rows, jnp.zeros((b, beams), jnp.int32), jnp.full((b, beams), -jnp.inf))
    loop = _Beams(jnp.int32(0), state, scores, rows, none, jnp.zeros(b, bool))
    loop = jax.lax.while_loop(lambda loop: ~jnp.all(loop.done) & (loop.step < new_tokens), body, loop)
    return loop.kept


def _best(kept: Hypotheses, more: Hypotheses, count: int) -> Hypotheses:
    """The `count` best of two lists; the first list wins ties."""
    values, order = jax.lax.top_k(jnp.concatenate([kept.values, more.values], axis=1), count)
    lengths = jnp.take_along_axis(jnp.concatenate([kept.lengths, more.lengths], axis=1), order, axis=1)
    ids = jnp.take_along_axis(jnp.concatenate([kept.ids, more.ids], axis=1), order[..., None], axis=1)
    return Hypotheses(ids, lengths, values)
