"""Generation and scoring with any decoder that implements the `LanguageModel` protocol.

A prompt is a pair of embeddings f[B, S, D] and a mask bool[B, S]. Padding may stand on either side, and vectors of videos or
images anywhere between the tokens: `prompt_of` puts them in front, `language_model.with_media` anywhere else. Each function
reads the prompt once and continues it in as many branches as it needs. All shapes are fixed; call the functions under
`jax.jit`. `decode_sampling` holds the rules that choose a token, `decode_beam` beam search, and `decode_stream` generation token
by token for a conversation.

Described in docs/models/language_models.md, "Branches" and "Greedy search and sampling".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models import decode_sampling
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.language_model import Cache, LanguageModel, Memory, Past, check_positions, last_state


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
    memory: Memory | None = None,
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
      memory: f[B, M, D], for a decoder with cross-attention.

    Raises:
      ValueError: the model has fewer positions.
    """
    needed = positions or embeds.shape[1] + new_tokens
    check_positions(needed, lm.max_positions, "prefix, prompt and new tokens", memory=memory is not None)
    given = {} if memory is None else {"memory": memory}
    hidden, past = lm.apply({"params": params}, embeds, mask, **given, method="prefill")
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


def generate(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, rules: Rules, key: jax.Array | None = None, *,
    new_tokens: int, eos: int | jax.Array,
) -> Generated:  # fmt: skip
    """Generate one token at a time, until every row has produced `eos` or `new_tokens` tokens.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      embeds: f[B, S, D], the prompt, as for `start`.
      mask: int or bool[B, S].
      rules: how tokens are chosen.
      key: of the draws, see `decode_sampling.choose`.
      new_tokens: largest number of tokens.
      eos: the end token.
    """
    state = start(lm, params, embeds, mask, new_tokens)
    said = jnp.full((embeds.shape[0], new_tokens), eos, jnp.int32)

    def choose(step: jax.Array, state: State, said: jax.Array) -> jax.Array:
        return decode_sampling.choose(state.logits[:, 0], rules, said, step, eos, key)[:, None]  # [B, 1]

    token = choose(jnp.int32(0), state, said)
    said = said.at[:, :1].set(token)

    def unfinished(loop: tuple) -> jax.Array:
        step, _, _, done, _ = loop
        return (step < new_tokens) & ~jnp.all(done)

    def body(loop: tuple) -> tuple:  # finished rows continue until all are finished; callers cut at `eos`
        step, state, token, done, said = loop
        state = advance(lm, params, state, token)
        token = choose(step, state, said)
        said = jax.lax.dynamic_update_slice(said, token, (0, step))
        return step + 1, state, token, done | (token == eos), said

    *_, said = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state, token, token == eos, said))
    return Generated(said, length(said, eos))


def greedy(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, *, new_tokens: int, eos: int | jax.Array
) -> Generated:
    """`generate` with the likeliest token at each step."""
    return generate(lm, params, embeds, mask, Rules(), new_tokens=new_tokens, eos=eos)


def length(ids: jax.Array, eos: int | jax.Array) -> jax.Array:
    """Number of entries of each row before its first `eos`, int32[B]."""
    return jnp.sum(jnp.cumsum(ids == eos, axis=1) == 0, axis=1, dtype=jnp.int32)
