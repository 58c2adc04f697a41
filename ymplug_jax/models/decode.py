"""Generation and scoring with any decoder that follows the `LanguageModel` protocol.

A prompt is what a decoder is fed: embeddings f[B, S, D] and a mask bool[B, S]. Padding may stand on either side, and vectors of
videos or images anywhere between the tokens. `prompt_of` makes one with a visual prefix; for other places embed the ids and use
`language_model.with_media`. The prompt is read once; greedy search, sampling, beam search and the scoring of candidates then go
on from that past in as many branches as they need. Fixed shapes throughout, to be run under `jax.jit`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models.language_model import Cache, LanguageModel, Past, check_positions, last_state

LOWEST = -1e9  # of a beam that does not exist


class State(NamedTuple):
    """Where each of C branches stands."""

    past: Past
    own: Cache
    logits: jax.Array  # f32[B, C, V]: of the next token


class Generated(NamedTuple):
    """What was generated, without the prompt."""

    ids: jax.Array  # int32[B, new_tokens]; what follows the first `eos` of a row means nothing
    lengths: jax.Array  # int32[B]: tokens before the first `eos`
    scores: jax.Array | None = None  # f32[B], of a beam search


def prompt_of(
    lm: LanguageModel, params: dict, prefix: jax.Array | None, ids: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A prompt of a visual prefix and text, padded on the right.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      prefix: f[B, Q, D] or None.
      ids: int32[B, L], padded on the right; begins with the start token.
      lengths: int32[B], how many of `ids` count, at least 1 (no end token among them).

    Returns:
      embeddings f[B, Q + L, D] and mask bool[B, Q + L].
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
    """Read a prompt and open `branches` with room for `new_tokens` each.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      embeds: f[B, S, D], the prompt.
      mask: int or bool[B, S], 1 where there is a token; at least one in each row.
      new_tokens: at most so many are fed to each branch.
      branches: C.
      positions: most that a row takes, prompt and new tokens; 0: S + new_tokens.

    Raises:
      ValueError: the model has not so many positions.
    """
    check_positions(positions or embeds.shape[1] + new_tokens, lm.max_positions, "prefix, prompt and new tokens")
    hidden, past = lm.apply({"params": params}, embeds, mask, method="prefill")
    logits = lm.apply({"params": params}, last_state(hidden, mask), method="logits")  # [B, V]
    own = lm.apply({"params": params}, embeds.shape[0], branches, new_tokens, method="open_branches")
    return State(past, own, jnp.broadcast_to(logits[:, None], (embeds.shape[0], branches, logits.shape[-1])))


def advance(lm: LanguageModel, params: dict, state: State, token: jax.Array, parents: jax.Array | None = None) -> State:
    """Feed one token a branch, int32[B, C]; with `parents`, int32[B, C], branch c first becomes a copy of branch parents[c].

    With `parents` the past has an `origin`; the keys and values stay where they are.
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
    """Log-probability of what each branch says after the past: f32[B, C], summed over the targets.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      past: what all branches continue, from `prefill`.
      ids: int32[B, C, W], padded on the right.
      targets: bool[B, C, W], which of `ids` count.
      last: f[B, D], hidden state at the end of the past, which predicts the first of `ids`; None: no first one counts.
    """
    b, branches, width = ids.shape
    embeds = lm.apply(
        {"params": params}, ids[..., :-1], method="embed"
    )  # [B, C, W - 1, D]: what is last predicts nothing
    own = lm.apply({"params": params}, b, branches, width - 1, method="open_branches")
    hidden, _ = lm.apply({"params": params}, embeds, past, own, method="branch")

    def one(branch: tuple[jax.Array, jax.Array]) -> jax.Array:  # a branch at a time: the vocabulary is wide
        hidden, ids = branch
        logits = lm.apply({"params": params}, hidden, method="logits")  # [B, W - 1, V]
        picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)  # [B, W - 1]

    logs = jax.lax.map(one, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(ids[..., 1:], 1, 0)))  # [C, B, W - 1]
    total = jnp.sum(jnp.where(targets[..., 1:], jnp.moveaxis(logs, 0, 1), 0), axis=-1)
    if last is None:
        return total
    first = jax.nn.log_softmax(lm.apply({"params": params}, last, method="logits"))  # [B, V], the same for all branches
    return total + jnp.where(targets[..., 0], jnp.take_along_axis(first, ids[..., 0], axis=1), 0)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of f[..., V]: (values, indices) [..., k], the lower index first where values are equal.

    XLA may sort the whole axis for it; here only the largest of every 128 and the k groups that they name are sorted.
    """
    size, wide = x.shape[-1], 128
    groups = -(-size // wide)
    if groups <= 2 * k:
        return jax.lax.top_k(x, k)
    ends = [(0, 0)] * (x.ndim - 1) + [(0, groups * wide - size)]
    cut = jnp.pad(x, ends, constant_values=-jnp.inf).reshape(*x.shape[:-1], groups, wide)  # [..., groups, 128]
    chosen = jnp.sort(jax.lax.top_k(cut.max(axis=-1), k)[1], axis=-1)  # [..., k], in order, so that ties keep theirs
    few = jnp.take_along_axis(cut, chosen[..., None], axis=-2).reshape(*x.shape[:-1], k * wide)
    values, place = jax.lax.top_k(few, k)
    return values, jnp.take_along_axis(chosen, place // wide, axis=-1) * wide + place % wide


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """bool like `logits`: the k largest of the last axis, with all that equal the k-th."""
    return logits >= top_k(logits, k)[0][..., -1:]


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """bool like `logits`: the most probable tokens until their sum passes `p`, the one that passes it included."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    kept = jnp.concatenate([jnp.ones_like(total[..., :1], bool), total[..., :-1] <= p], axis=-1)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def greedy(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, *, new_tokens: int, eos: int
) -> Generated:
    """Most probable token at each step, until every row has met `eos` or `new_tokens` are out. Prompt as for `start`."""
    state = start(lm, params, embeds, mask, new_tokens)
    return _generate(lm, params, state, new_tokens, eos, lambda step, logits: jnp.argmax(logits, -1))


def sample(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, key: jax.Array, *,
    new_tokens: int, eos: int, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0,
) -> Generated:  # fmt: skip
    """Draws each token; `top_k` > 0 draws among the k most probable, else `top_p` > 0 among those that make up p (0: all).

    Prompt as for `start`. `key` is one for all rows, or key[B]: with a key of its own a row's draws do not depend on its place in
    the batch.
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
    """One branch a row, token by token. Rows that are done go on until all are, as in the reference; readers cut at `eos`."""

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
    """int32[B]: entries of each row before its first `eos`."""
    return jnp.sum(jnp.cumsum(ids == eos, axis=1) == 0, axis=1, dtype=jnp.int32)


class _Beams(NamedTuple):
    """A beam search in progress."""

    step: jax.Array  # int32 scalar: tokens chosen so far
    state: State
    scores: jax.Array  # f32[B, C]: summed log-probabilities of the open beams
    rows: jax.Array  # int32[B, C, new_tokens]
    values: jax.Array  # f32[B, C]: of the finished ones, best first, -inf where there is none yet
    finished: jax.Array  # int32[B, C, new_tokens]
    done: jax.Array  # bool[B]


def beam(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, *, new_tokens: int, eos: int, beams: int = 5,
    row_length: int = 0, visual: int = 0, length_power: float = 1.0,
) -> Generated:  # fmt: skip
    """Beam search, with the stop and ranking rule of the reference or with a length-normalised one.

    Of the 2C best continuations, an end token among the first C finishes its beam; the first C others stay open.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      embeds: f[B, S, D], the prompt, as for `start`.
      mask: int or bool[B, S].
      new_tokens: at most so many tokens.
      eos: the end token.
      beams: C; the vocabulary has at least 2C tokens.
      row_length: > 0: the reference's rule. Every hypothesis counts its log-probability divided by this
        one number (the prompt's row of text and new tokens together), a row ends once C are finished and the worst of them is
        no worse than the best continuation divided by its current length; a row takes `row_length` tokens with its prompt's.
        0: log-probability divided by the number of tokens, end token included, to the power `length_power`, and a row
        ends when no open beam can become better than the worst of its C finished ones.
      visual: vectors in each prompt that `row_length` does not count, since they are no text.
      length_power: of the second rule; 0 compares plain log-probabilities.

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

        stay = jnp.argsort(stops, axis=1, stable=True)[:, :beams]  # the first C that go on
        parents, tokens, scores = (jnp.take_along_axis(x, stay, axis=1) for x in (parents, tokens, scores))
        rows = jnp.take_along_axis(of, stay[..., None], axis=1)
        rows = jax.lax.dynamic_update_slice(rows, tokens[..., None], (0, 0, loop.step))
        full = ~stop & (written >= room)  # out of room: what is open counts as it stands
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
    """The `count` best of two lists f32[B, *] with rows int32[B, *, new_tokens]; the first list wins ties."""
    values, order = jax.lax.top_k(jnp.concatenate([values, more], axis=1), count)
    rows = jnp.concatenate([rows, more_rows], axis=1)
    return values, jnp.take_along_axis(rows, order[..., None], axis=1)
