"""Ranks a closed list of answers by their probability under a decoder (docs/models/mplug2.md, "Ranking answers")."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.models import decode
from ymplug_jax.models.language_model import LanguageModel, Memory


class Ranked(NamedTuple):
    """The k answers of each question, best first."""

    answers: jax.Array  # int32[B, k], rows of the list
    probabilities: jax.Array  # f32[B, k], which sum up to 1


def rank(lm: LanguageModel, params: dict, memory: Memory, ids: jax.Array, mask: jax.Array, best: int) -> Ranked:
    """Choose the answers whose first token is likeliest, and rank them by all their tokens.

    An answer's value is log p(first token) + log p(answer), in which the first token counts twice, as in the reference.

    Args:
      lm: a decoder with cross-attention, unbound.
      params: its parameters.
      memory: of B questions.
      ids: int32[A, L], the answers: a start token, the same for all, then at least one token; padded on the right.
      mask: int or bool[A, L], 1 at tokens.
      best: k, at most A.
    """
    rows = memory.states.shape[0]
    start = jnp.broadcast_to(lm.apply({"params": params}, ids[:1, :1], method="embed"), (rows, 1, lm.width))
    state = decode.start(lm, params, start, jnp.ones((rows, 1), bool), ids.shape[1] - 1, memory=memory)
    first = jax.nn.log_softmax(state.logits[:, 0])[:, ids[:, 1]]  # [B, A]
    first, chosen = jax.lax.top_k(first, best)
    rest, told = ids[chosen, 1:], mask.astype(bool)[chosen, 1:]  # [B, k, L - 1]
    values = 2 * first + decode.branch_scores(lm, params, state.past, rest, told)
    values, order = jax.lax.top_k(values, best)
    return Ranked(jnp.take_along_axis(chosen, order, axis=1), jax.nn.softmax(values, axis=1))
