"""Generation over any language model with `embed`, `prefill`, `extend` and `logits`: fixed shapes, to be run under `jax.jit`.

`start` reads what is given and returns the state of generation, `advance` feeds one token a row; a search is a loop over the two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models.gpt3 import Cache


class State(NamedTuple):
    """Where each row stands."""

    cache: Cache
    position: jax.Array  # int32[B]: positions read so far, visual tokens included
    logits: jax.Array  # f32[B, V]: of the next token


class Generated(NamedTuple):
    """What was generated, without the prompt."""

    ids: jax.Array  # int32[B, new_tokens], `eos` from the end of each row on
    lengths: jax.Array  # int32[B]: tokens before `eos`


def start(
    lm: nn.Module, params: dict, prefix: jax.Array | None, ids: jax.Array, lengths: jax.Array, new_tokens: int
) -> State:
    """Read the visual prefix and the prompt, with room for `new_tokens` more.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      prefix: f[B, Q, D] or None.
      ids: int32[B, L], padded on the right; begins with the start token.
      lengths: int32[B], how many of `ids` count, at least 1 (no end token among them).
      new_tokens: how many tokens may follow.

    Raises:
      ValueError: prefix, prompt and new tokens do not fit the position table.
    """
    embeds = lm.apply({"params": params}, ids, method="embed")  # [B, L, D]
    visual = 0
    if prefix is not None:
        visual = prefix.shape[1]
        embeds = jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1)  # [B, Q + L, D]
    hidden, cache = lm.apply({"params": params}, embeds, embeds.shape[1] + new_tokens, method="prefill")
    position = visual + lengths.astype(jnp.int32)
    last = jnp.take_along_axis(hidden, position[:, None, None] - 1, axis=1)[:, 0]  # [B, D]
    return State(cache, position, lm.apply({"params": params}, last, method="logits"))


def advance(lm: nn.Module, params: dict, state: State, token: jax.Array) -> State:
    """Feed one token a row, int32[B]."""
    embeds = lm.apply({"params": params}, token[:, None], method="embed")  # [B, 1, D]
    hidden, cache = lm.apply({"params": params}, embeds, state.cache, state.position, method="extend")
    return State(cache, state.position + 1, lm.apply({"params": params}, hidden[:, 0], method="logits"))


def greedy(
    lm: nn.Module,
    params: dict,
    prefix: jax.Array | None,
    ids: jax.Array,
    lengths: jax.Array,
    *,
    new_tokens: int,
    eos: int,
) -> Generated:
    """Most probable token at each step, until every row has met `eos` or `new_tokens` are out. Arguments as for `start`."""
    state = start(lm, params, prefix, ids, lengths, new_tokens)

    def pick(logits: jax.Array, done: jax.Array) -> jax.Array:
        return jnp.where(done, eos, jnp.argmax(logits, axis=-1).astype(jnp.int32))  # [B]

    none_done = jnp.zeros(ids.shape[0], bool)
    token = pick(state.logits, none_done)
    out = jnp.full((ids.shape[0], new_tokens), eos, jnp.int32).at[:, 0].set(token)

    def unfinished(loop: tuple) -> jax.Array:
        step, _, _, done, _ = loop
        return (step < new_tokens) & ~jnp.all(done)

    def body(loop: tuple) -> tuple:
        step, state, token, done, out = loop
        state = advance(lm, params, state, token)
        token = pick(state.logits, done)
        return step + 1, state, token, done | (token == eos), out.at[:, step].set(token)

    *_, out = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state, token, token == eos, out))
    ended = jnp.cumsum(out == eos, axis=1) > 0
    return Generated(out, jnp.sum(~ended, axis=1, dtype=jnp.int32))
