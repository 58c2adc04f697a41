"""Generation and scoring with any decoder that implements the `LanguageModel` protocol.

A prompt is a pair of embeddings f[B, S, D] and a mask bool[B, S]. Padding may stand on either side, and vectors of videos or
images anywhere between the tokens: `prompt_of` puts them in front, `language_model.with_media` anywhere else. Each function
reads the prompt once and continues it in as many branches as it needs. All shapes are fixed; call the functions under
`jax.jit`.

Described in docs/models/language_models.md, "Branches", "Greedy search and sampling" and "Beam search".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models.language_model import Cache, LanguageModel, Past, check_positions, last_state

LOWEST = -1e9  # score of a beam that does not exist


class State(NamedTuple):
    """State of C branches."""

    past: Past
    own: Cache
    logits: jax.Array  # f32[B, C, V], of the next token


class Generated(NamedTuple):
    """Generated tokens, without the prompt."""

    ids: jax.Array  # int32[B, new_tokens]; ignore what follows the first `eos` of a row
    lengths: jax.Array  # int32[B], number of tokens before the first `eos`
    scores: jax.Array | None = None  # f32[B], values of the hypotheses of a beam search


def prompt_of(
    lm: LanguageModel, params: dict, prefix: jax.Array | None, ids: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Build a prompt from a visual prefix and text, padded on the right.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      prefix: f[B, Q, D] or None.
      ids: int32[B, L], the start token first, padded on the right.
      lengths: int32[B], number of `ids` in the prompt, at least 1; the end token is not one of them.

    Returns:
      Embeddings f[B, Q + L, D] and mask bool[B, Q + L].
    """
    embeds = lm.apply({"params": params}, ids, method="embed")  # [B, L, D]
    mask = jnp.arange(ids.shape[1]) < lengths[:, None]
    if prefix is None:
        return embeds, mask
    embeds = jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1)  # [B, Q + L, D]
    return embeds, jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], axis=1)


def start(
    lm: LanguageModel,
    params: dict,
    embeds: jax.Array,
    mask: jax.Array,
    new_tokens: int,
    branches: int = 1,
    positions: int = 0,
) -> State:
    """Read a prompt and open branches.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      embeds: f[B, S, D], the prompt.
      mask: int or bool[B, S], 1 at tokens; each row has at least one.
      new_tokens: largest number of tokens fed to each branch.
      branches: C.
      positions: largest number of positions of a row, prompt and new tokens together. 0 means S + new_tokens.

    Raises:
      ValueError: the model has fewer positions.
    """
    check_positions(positions or embeds.shape[1] + new_tokens, lm.max_positions, "prefix, prompt and new tokens")
    hidden, past = lm.apply({"params": params}, embeds, mask, method="prefill")
    logits = lm.apply({"params": params}, last_state(hidden, mask), method="logits")  # [B, V]
    own = lm.apply({"params": params}, embeds.shape[0], branches, new_tokens, method="open_branches")
    return State(past, own, jnp.broadcast_to(logits[:, None], (embeds.shape[0], branches, logits.shape[-1])))


def advance(lm: LanguageModel, params: dict, state: State, token: jax.Array, parents: jax.Array | None = None) -> State:
    """Feed one token to each branch.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      state: of the branches.
      token: int32[B, C].
      parents: int32[B, C]; branch c first becomes a copy of branch parents[c]. The past must have an `origin`, which is
        updated instead of copying keys and values.
    """
    past = state.past
    if parents is not None and past.origin is not None:
        origin = jnp.take_along_axis(past.origin, parents[..., None], axis=1)  # [B, C, W]
        here = jnp.broadcast_to(jnp.arange(parents.shape[1])[:, None], (*parents.shape, 1))
        past = past._replace(origin=jax.lax.dynamic_update_slice(origin, here, (0, 0, past.read)))
    embeds = lm.apply({"params": params}, token[..., None], method="embed")  # [B, C, 1, D]
    hidden, own = lm.apply({"params": params}, embeds, past, state.own, method="branch")
    past = past._replace(read=past.read + 1)
    return State(past, own, lm.apply({"params": params}, hidden[:, :, 0], method="logits"))


def branch_scores(
    lm: LanguageModel, params: dict, past: Past, ids: jax.Array, targets: jax.Array, last: jax.Array | None = None
) -> jax.Array:
    """Log-probability of each branch's tokens after the past, summed over the targets: f32[B, C].

    Args:
      lm: the language model, unbound.
      params: its parameters.
      past: of `prefill`, which all branches continue.
      ids: int32[B, C, W], padded on the right.
      targets: bool[B, C, W], the tokens that are scored.
      last: f[B, D], hidden state at the end of the past, which predicts the first of `ids`. None leaves out the first.
    """
    b, branches, width = ids.shape
    embeds = lm.apply({"params": params}, ids[..., :-1], method="embed")  # [B, C, W - 1, D]; the last predicts nothing
    own = lm.apply({"params": params}, b, branches, width - 1, method="open_branches")
    hidden, _ = lm.apply({"params": params}, embeds, past, own, method="branch")

    def one(branch: tuple[jax.Array, jax.Array]) -> jax.Array:  # one branch at a time, because V is large
        hidden, ids = branch
        logits = lm.apply({"params": params}, hidden, method="logits")  # [B, W - 1, V]
        picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)  # [B, W - 1]

    logs = jax.lax.map(one, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(ids[..., 1:], 1, 0)))  # [C, B, W - 1]
    total = jnp.sum(jnp.where(targets[..., 1:], jnp.moveaxis(logs, 0, 1), 0), axis=-1)
    if last is None:
        return total
    first = jax.nn.log_softmax(lm.apply({"params": params}, last, method="logits"))  # [B, V], equal in all branches
    return total + jnp.where(targets[..., 0], jnp.take_along_axis(first, ids[..., 0], axis=1), 0)


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


def greedy(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, *, new_tokens: int, eos: int
) -> Generated:
    """Generate the likeliest token at each step, until every row has produced `eos` or `new_tokens` tokens.

    The prompt is that of `start`.
    """
    state = start(lm, params, embeds, mask, new_tokens)
    return _generate(lm, params, state, new_tokens, eos, lambda step, logits: jnp.argmax(logits, -1))


def sample(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, key: jax.Array, *,
    new_tokens: int, eos: int, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0,
) -> Generated:  # fmt: skip
    """Draw each token at random.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      embeds: f[B, S, D], the prompt, as for `start`.
      mask: int or bool[B, S].
      key: one key for all rows, or key[B]: then a row's draws do not depend on its place in the batch.
      new_tokens: largest number of tokens.
      eos: the end token.
      top_k: draws among the k likeliest tokens; 0 does not limit them.
      top_p: with `top_k` 0, draws among the likeliest tokens that make up this probability; 0 does not limit them.
      temperature: divides the logits.
    """

    def pick(step: jax.Array, logits: jax.Array) -> jax.Array:
        logits = logits / temperature
        kept = keep_top_k(logits, top_k) if top_k else keep_top_p(logits, top_p) if top_p else True
        logits = jnp.where(kept, logits, -jnp.inf)
        if not key.ndim:
            return jax.random.categorical(jax.random.fold_in(key, step), logits)
        return jax.vmap(lambda own, row: jax.random.categorical(jax.random.fold_in(own, step), row))(key, logits)

    return _generate(lm, params, start(lm, params, embeds, mask, new_tokens), new_tokens, eos, pick)


def _generate(
    lm: LanguageModel,
    params: dict,
    state: State,
    new_tokens: int,
    eos: int,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
) -> Generated:
    """Generate one branch for each row. Finished rows continue until all are finished; callers cut at `eos`."""

    def choose(step: jax.Array, state: State) -> jax.Array:
        return pick(step, state.logits).astype(jnp.int32)  # [B, 1]

    token = choose(jnp.int32(0), state)
    out = jnp.full((token.shape[0], new_tokens), eos, jnp.int32).at[:, :1].set(token)

    def unfinished(loop: tuple) -> jax.Array:
        step, _, _, done, _ = loop
        return (step < new_tokens) & ~jnp.all(done)

    def body(loop: tuple) -> tuple:
        step, state, token, done, out = loop
        state = advance(lm, params, state, token)
        token = choose(step, state)
        out = jax.lax.dynamic_update_slice(out, token, (0, step))
        return step + 1, state, token, done | (token == eos), out

    *_, out = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state, token, token == eos, out))
    return Generated(out, _length(out, eos))


def _length(ids: jax.Array, eos: int) -> jax.Array:
    """Number of entries of each row before its first `eos`, int32[B]."""
    return jnp.sum(jnp.cumsum(ids == eos, axis=1) == 0, axis=1, dtype=jnp.int32)


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
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, *, new_tokens: int, eos: int, beams: int = 5,
    row_length: int = 0, visual: int = 0, length_power: float = 1.0,
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
    rows, b = jnp.full((embeds.shape[0], beams, new_tokens), eos, jnp.int32), embeds.shape[0]
    room = jnp.full(b, new_tokens)
    if row_length:
        room = jnp.minimum(row_length - (state.past.length - visual), new_tokens)
    state = state._replace(past=state.past._replace(origin=jnp.zeros_like(rows)))

    def value(scores: jax.Array, tokens: jax.Array) -> jax.Array:
        return scores / row_length if row_length else scores / tokens.astype(jnp.float32) ** length_power

    def bound(best: jax.Array, tokens: jax.Array) -> jax.Array:
        return best / tokens if row_length else best / room.astype(jnp.float32) ** length_power

    def body(loop: _Beams) -> _Beams:
        vocab = loop.state.logits.shape[-1]
        total = jax.nn.log_softmax(loop.state.logits) + loop.scores[..., None]  # [B, C, V]
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
    return Generated(loop.finished[:, 0], _length(loop.finished[:, 0], eos), loop.values[:, 0])


def _best(
    values: jax.Array, rows: jax.Array, more: jax.Array, more_rows: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` best of two lists of values f32[B, *] with rows int32[B, *, new_tokens]; the first list wins ties."""
    values, order = jax.lax.top_k(jnp.concatenate([values, more], axis=1), count)
    rows = jnp.concatenate([rows, more_rows], axis=1)
    return values, jnp.take_along_axis(rows, order[..., None], axis=1)
