"""Generation token by token, for a conversation: a cache of fixed length that is read in chunks and continued turn after turn.

The host counts how many positions are filled. Keys behind them are never seen, so a chunk may be padded on the right, a token too
many does no harm, and going back is a smaller count. Few programs serve any conversation: one for each length of a chunk, and one for
a token. Described in docs/models/language_models.md, "Conversations".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models import decode, decode_beam, decode_sampling
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.language_model import Cache, LanguageModel, Past


class Stream(NamedTuple):
    """State of B rows between two calls."""

    cache: Cache  # f[B, 1, layers, K, W, H]
    logits: jax.Array  # f32[B, V], of the token behind the last one that was read
    said: jax.Array  # int32[B, N], tokens of the answer that is being generated


def begin(lm: LanguageModel, params: dict, rows: int, positions: int, new_tokens: int) -> Stream:
    """An empty stream.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      rows: B.
      positions: W, the longest conversation and the padding of its last chunk together.
      new_tokens: N, largest number of tokens of an answer.
    """
    cache: Cache = lm.apply({"params": params}, rows, 1, positions, method="open_branches")
    return Stream(cache, jnp.zeros((rows, lm.vocab), jnp.float32), jnp.zeros((rows, new_tokens), jnp.int32))


def read(lm: LanguageModel, params: dict, stream: Stream, at: jax.Array, embeds: jax.Array, count: jax.Array) -> Stream:
    """Read a chunk.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      stream: before the chunk.
      at: int32 scalar, positions read before. `at` + L is at most W.
      embeds: f[B, L, D], padded on the right.
      count: int32 scalar, positions of the chunk that are not padding, at least 1.
    """
    hidden, cache = lm.apply(
        {"params": params}, embeds[:, None], _past(stream.cache, at), stream.cache, method="branch"
    )
    last = jax.lax.dynamic_index_in_dim(hidden[:, 0], count - 1, axis=1, keepdims=False)  # [B, D]
    return stream._replace(cache=cache, logits=lm.apply({"params": params}, last, method="logits"))


def step(
    lm: LanguageModel, params: dict, stream: Stream, at: jax.Array, rules: Rules, count: jax.Array, eos: int | jax.Array,
    key: jax.Array,
) -> tuple[Stream, jax.Array]:  # fmt: skip
    """Choose the next token of each row and read it.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      stream: after the prompt and the first `count` tokens of the answer.
      at: int32 scalar, positions read before.
      rules: how the token is chosen.
      count: int32 scalar, tokens of the answer so far, less than N.
      eos: the end token.
      key: of the answer's draws, see `decode_sampling.choose`.

    Returns:
      The stream, and int32[B]: the tokens, or -1 where logits are not finite.
    """
    token = decode_sampling.choose(stream.logits, rules, stream.said, count, eos, key)
    said = jax.lax.dynamic_update_slice(stream.said, token[:, None], (0, count))
    embeds = lm.apply({"params": params}, token[:, None], method="embed")  # [B, 1, D]
    shown = jnp.where(jnp.all(jnp.isfinite(stream.logits), axis=-1), token, -1)
    return read(lm, params, stream._replace(said=said), at, embeds, jnp.int32(1)), shown


def beams(
    lm: LanguageModel, params: dict, stream: Stream, at: jax.Array, rules: Rules, count: int, new_tokens: int, room: jax.Array,
    eos: int | jax.Array, length_power: float = 1.0,
) -> decode.Generated:  # fmt: skip
    """The answer of a beam search after the prompt. The stream does not change: `read` the answer to go on.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      stream: after the prompt.
      at: int32 scalar, positions read before.
      rules: penalties, see `decode_beam.search`.
      count: C, the number of beams.
      new_tokens: largest number of tokens.
      room: int32 scalar, tokens that still fit, from 1 to `new_tokens`.
      eos: the end token.
      length_power: see `decode_beam.beam`.
    """
    rows, width = stream.cache.k.shape[0], stream.cache.k.shape[-2]
    seen = jnp.broadcast_to(jnp.arange(width) < at, (rows, width))
    past = Past(Cache(stream.cache.k[:, 0], stream.cache.v[:, 0]), seen, jnp.int32(0))
    own = lm.apply({"params": params}, rows, count, new_tokens, method="open_branches")
    logits = jnp.broadcast_to(stream.logits[:, None], (rows, count, lm.vocab))
    state, rooms = decode.State(past, own, logits), jnp.broadcast_to(room, (rows,))
    return decode_beam.search(lm, params, state, rooms, rules, new_tokens, eos, length_power=length_power)


def _past(cache: Cache, at: jax.Array) -> Past:
    """A past of no positions after which the branch has read `at`: the whole conversation is the branch's own."""
    none = Cache(cache.k[:, 0, :, :, :0], cache.v[:, 0, :, :, :0])
    return Past(none, jnp.zeros((cache.k.shape[0], 0), bool), at)
