"""Beam search with any decoder. Described in docs/models/language_models.md, "Beam search"."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models import decode_sampling
from ymplug_jax.models.decode import Generated, State, advance, length, start
from ymplug_jax.models.decode_sampling import Rules, top_k
from ymplug_jax.models.language_model import LanguageModel

LOWEST = -1e9  # score of a beam that does not exist


class _Beams(NamedTuple):
    """A beam search in progress."""

    step: jax.Array  # int32 scalar, number of tokens chosen so far
    state: State
    scores: jax.Array  # f32[B, C], summed log-probabilities of the open beams
    rows: jax.Array  # int32[B, C, new_tokens], tokens of the open beams
    values: jax.Array  # f32[B, C], values of the finished hypotheses, best first, -inf for missing ones
    finished: jax.Array  # int32[B, C, new_tokens], tokens of the finished hypotheses
    done: jax.Array  # bool[B], rows whose search has ended


def beam(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, *, new_tokens: int, eos: int | jax.Array,
    beams: int = 5, row_length: int = 0, visual: int = 0, length_power: float = 1.0,
) -> Generated:  # fmt: skip
    """Beam search with the reference's rule for ranking and stopping, or with a length-normalised rule.

    Of the 2C best continuations, an end token among the first C finishes its beam, and the first C others stay open.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      embeds: f[B, S, D], the prompt, as for `start`.
      mask: int or bool[B, S].
      new_tokens: largest number of tokens.
      eos: the end token.
      beams: C; the vocabulary has at least 2C tokens.
      row_length: above 0 selects the reference's rule. The value of every hypothesis is its log-probability divided by this
        number, the length of the prompt's text row and the new tokens together. A row stops once C hypotheses are finished
        and the worst of them is at least the best continuation divided by its current length. Prompt and new tokens take
        at most `row_length` positions. 0 selects the second rule: the value is the log-probability divided by the number of
        tokens, end token included, to the power `length_power`, and a row stops when no open beam can beat the worst of its
        C finished hypotheses.
      visual: number of visual vectors in each prompt, which `row_length` does not count.
      length_power: exponent of the second rule; 0 compares plain log-probabilities.

    Returns:
      The best hypothesis of each row.
    """
    state = start(lm, params, embeds, mask, new_tokens, beams, visual + row_length if row_length else 0)
    room = jnp.full(embeds.shape[0], new_tokens)
    if row_length:
        room = jnp.minimum(row_length - (state.past.length - visual), new_tokens)
    return search(lm, params, state, room, Rules(), new_tokens, eos, row_length=row_length, length_power=length_power)


def search(
    lm: LanguageModel, params: dict, state: State, room: jax.Array, rules: Rules, new_tokens: int, eos: int | jax.Array, *,
    row_length: int = 0, length_power: float = 1.0, length_offset: int = 0, least_tokens: int = 0,
) -> Generated:  # fmt: skip
    """The search of `beam` from an open state of C branches.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      state: of `decode.start`.
      room: int32[B], new tokens that each row may get, at most `new_tokens`.
      rules: penalties on log-probabilities; a search draws nothing, so the other rules do not apply.
      new_tokens: largest number of tokens.
      eos: the end token.
      row_length: see `beam`.
      length_power: see `beam`.
      length_offset: o in the divisor of the second rule, ((o + tokens) / (o + 1)) ** length_power; see `length_term`.
      least_tokens: tokens of a hypothesis without its end token, at the least.
    """
    b, beams, vocab = state.logits.shape
    rows = jnp.full((b, beams, new_tokens), eos, jnp.int32)
    state = state._replace(past=state.past._replace(origin=jnp.zeros_like(rows)))

    def value(scores: jax.Array, tokens: jax.Array) -> jax.Array:
        return scores / row_length if row_length else scores / length_term(tokens, length_power, length_offset)

    def bound(best: jax.Array, tokens: jax.Array) -> jax.Array:
        return best / tokens if row_length else best / length_term(room, length_power, length_offset)

    def body(loop: _Beams) -> _Beams:
        logs = jax.nn.log_softmax(loop.state.logits).reshape(b * beams, vocab)
        said = loop.rows.reshape(b * beams, new_tokens)
        logs = decode_sampling.penalised(logs, rules, said, loop.step, eos).reshape(b, beams, vocab)
        logs = without_end(logs, eos, loop.step < least_tokens) if least_tokens else logs
        total = logs + loop.scores[..., None]  # [B, C, V]
        scores, flat = top_k(total.reshape(b, -1), 2 * beams)  # [B, 2C]
        parents, tokens = flat // vocab, (flat % vocab).astype(jnp.int32)
        stops = tokens == eos
        written = loop.step + 1
        of = jnp.take_along_axis(loop.rows, parents[..., None], axis=1)  # [B, 2C, new_tokens]

        ends = stops[:, :beams] & (scores[:, :beams] > LOWEST / 2)
        ended = jnp.where(ends, value(scores[:, :beams], written), -jnp.inf)  # [B, C]
        values, finished = _best(loop.values, loop.finished, ended, of[:, :beams], beams)
        stop = jnp.isfinite(values[:, -1]) & (values[:, -1] >= bound(scores[:, 0], written))

        stay = jnp.argsort(stops, axis=1, stable=True)[:, :beams]  # the first C that do not end
        parents, tokens, scores = (jnp.take_along_axis(x, stay, axis=1) for x in (parents, tokens, scores))
        rows = jnp.take_along_axis(of, stay[..., None], axis=1)
        rows = jax.lax.dynamic_update_slice(rows, tokens[..., None], (0, 0, loop.step))
        full = ~stop & (written >= room)  # out of room: open beams count as they are
        open_values = jnp.where(full[:, None], value(scores, written), -jnp.inf)
        values, finished = _best(values, finished, open_values, rows, beams)

        done = loop.done
        kept, kept_rows = (
            jnp.where(done[:, None], loop.values, values),
            jnp.where(done[:, None, None], loop.finished, finished),
        )
        state = advance(lm, params, loop.state, tokens, parents)
        return _Beams(written, state, scores, rows, kept, kept_rows, done | stop | full)

    scores = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, LOWEST), (b, beams))
    loop = _Beams(jnp.int32(0), state, scores, rows, jnp.full((b, beams), -jnp.inf), rows, jnp.zeros(b, bool))
    loop = jax.lax.while_loop(lambda loop: ~jnp.all(loop.done) & (loop.step < new_tokens), body, loop)
    return Generated(loop.finished[:, 0], length(loop.finished[:, 0], eos), loop.values[:, 0])


def length_term(tokens: jax.Array, power: float, offset: int) -> jax.Array:
    """Divisor of a hypothesis's log-probability, ((offset + tokens) / (offset + 1)) ** power (Wu et al., 2016, with offset 5)."""
    count = tokens.astype(jnp.float32)
    return ((offset + count) / (offset + 1) if offset else count) ** power


def without_end(logs: jax.Array, eos: int | jax.Array, early: jax.Array) -> jax.Array:
    """Log-probabilities f32[..., V] in which the end token has no chance where `early`, a bool scalar, is True."""
    return jnp.where(early & (jnp.arange(logs.shape[-1]) == eos), LOWEST, logs)


def _best(
    values: jax.Array, rows: jax.Array, more: jax.Array, more_rows: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` best of two lists of values f32[B, *] with rows int32[B, *, new_tokens]; the first list wins ties."""
    values, order = jax.lax.top_k(jnp.concatenate([values, more], axis=1), count)
    rows = jnp.concatenate([rows, more_rows], axis=1)
    return values, jnp.take_along_axis(rows, order[..., None], axis=1)
