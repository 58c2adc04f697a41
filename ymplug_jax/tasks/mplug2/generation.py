"""Beam search of mPLUG-2's decoder and the texts that come out of it, shared by captioning and question answering.

See docs/models/mplug2.md, "Generation".
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import Params
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import decode, decode_beam
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.language_model import Memory
from ymplug_jax.tasks.common import preprocess

POWER, OFFSET = 0.6, 5  # a hypothesis of n tokens is divided by ((OFFSET + n) / (OFFSET + 1)) ** POWER
_WIDE = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0002fa1f"
_BESIDE_WIDE = re.compile(rf"(?<=[{_WIDE}]) +| +(?=[{_WIDE}])")


def check(decoder: Decoder, *, beams: int, least_tokens: int, new_tokens: int, prompt: int = 0) -> None:
    """Check that a search is possible.

    Args:
      decoder: The decoder.
      beams: Number of beams.
      least_tokens: Tokens of a text without its end token, at the least.
      new_tokens: Largest number of tokens, end token included.
      prompt: Number of tokens between the start token and the text.

    Raises:
      Mistake: The settings contradict each other or exceed the decoder; the message names the one to change.
    """
    if least_tokens >= new_tokens:
        raise Mistake(
            f"config.options.least_tokens: {least_tokens} tokens and an end token exceed config.options.new_tokens {new_tokens}; raise that"
        )
    needed = 1 + prompt + new_tokens
    if needed > decoder.max_positions:
        raise Mistake(
            f"config.options.new_tokens: {needed} positions with the start token and the prompt exceed "
            f"config.model.decoder.max_positions {decoder.max_positions}; lower it"
        )
    if 2 * beams > decoder.vocab:
        raise Mistake(
            f"config.options.beams: {beams} beams need {2 * beams} words, but config.model.decoder.vocab is {decoder.vocab}; lower it"
        )


def generate(
    decoder: Decoder,
    params: Params,
    memory: Memory,
    begin: Sequence[int],
    eos: int,
    *,
    beams: int,
    least_tokens: int,
    new_tokens: int,
) -> dict[str, jax.Array]:
    """The best text of a beam search for each row, without the tokens it begins with.

    Args:
      decoder: The decoder, unbound.
      params: Its parameters.
      memory: f[B, M, C], what it reads.
      begin: Start token and prompt, the same for all rows.
      eos: The end token; ignore what follows the first one of a row.
      beams: As for `check`, like the other two.
      least_tokens: See `check`.
      new_tokens: See `check`.

    Returns:
      generated int32[B, new_tokens], and its value f32[B], which is not finite if the model computes such numbers.
    """
    rows = memory.states.shape[0]
    ids = jnp.broadcast_to(jnp.asarray(begin, jnp.int32), (rows, len(begin)))
    embeds: Any = decoder.apply({"params": params}, ids, method="embed")
    state = decode.start(decoder, params, embeds, jnp.ones(ids.shape, bool), new_tokens, beams, memory=memory)
    found = decode_beam.search(
        decoder, params, state, jnp.full(rows, new_tokens), Rules(), new_tokens, eos, length_power=POWER,
        length_offset=OFFSET, least_tokens=least_tokens,
    )  # fmt: skip
    assert found.scores is not None
    return {"generated": found.ids, "value": found.scores}


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of generated ids, int[N]: word pieces joined, without control tokens and what follows the end token."""
    return joined(preprocess.decode(tokenizer, ids))


def joined(text: str) -> str:
    """The text without the spaces that a WordPiece tokenizer puts around Chinese characters and around hyphens in words."""
    return re.sub(r"(?<=\w) ?([-/']) ?(?=\w)", r"\1", _BESIDE_WIDE.sub("", text)).strip()


def as_generated(tokenizer: Tokenizer, text: str) -> str:
    """A given text in the form in which the model would write it, for comparison with generated texts.

    Lower case, accents and the spacing of punctuation become the tokenizer's. A text with words that the tokenizer does not know could not
    be generated; it keeps them.
    """
    ids = tokenizer.encode(text)
    return joined(text if getattr(tokenizer, "unk", None) in ids else tokenizer.decode(ids))
