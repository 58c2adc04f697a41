"""A conversation read in chunks gives the tokens of one prompt, for every decoder."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import LMS, params_of, recompute, rows_of

from ymplug_jax.models import decode, decode_beam, decode_stream
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.decode_stream import Stream
from ymplug_jax.models.language_model import LanguageModel

CHUNK = 4
DRAWS = Rules(temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram=2)


@partial(jax.jit, static_argnums=0)
def read(lm: LanguageModel, params: dict, stream: Stream, at: int, embeds: jax.Array, count: int) -> Stream:
    return decode_stream.read(lm, params, stream, at, embeds, count)


@partial(jax.jit, static_argnums=(0, 4))
def step(lm: LanguageModel, params: dict, stream: Stream, at: int, rules: Rules, count: int, key: jax.Array) -> tuple:
    return decode_stream.step(lm, params, stream, at, rules, count, -1, key)


def in_chunks(name: str, stream: Stream, at: int, row: np.ndarray) -> tuple[Stream, int]:
    for start in range(0, len(row), CHUNK):
        part = row[start : start + CHUNK]
        padded = np.full((1, CHUNK, row.shape[1]), 50, np.float32)
        padded[0, : len(part)] = part
        stream = read(LMS[name], params_of(name), stream, at, padded, len(part))
        at += len(part)
    return stream, at


def answer(
    name: str, stream: Stream, at: int, rules: Rules, count: int, key: jax.Array
) -> tuple[Stream, int, list[int]]:
    tokens = []
    for i in range(count):
        stream, token = step(LMS[name], params_of(name), stream, at + i, rules, i, key)
        tokens.append(int(token[0]))
    return stream, at + count, tokens


@pytest.mark.parametrize("name", LMS)
def test_two_turns_equal_one_prompt(name: str) -> None:
    lm, params, key = LMS[name], params_of(name), jax.random.key(3)
    first, second = rows_of(name, "middle")[0], rows_of(name, "start")[2]
    stream, at = in_chunks(name, decode_stream.begin(lm, params, 1, 32, 5), 0, first)
    stream, at, said = answer(name, stream, at, Rules(), 4, key)
    assert said == recompute(name, first, 4, -1)
    # A token too many was read, as in a loop that runs ahead of the host: the count leaves it out.
    words = np.asarray(lm.apply({"params": params}, np.array(said[:3]), method="embed"))
    stream, at = in_chunks(name, stream, at - 1, second)
    whole = np.concatenate([first, words, second])
    assert answer(name, stream, at, Rules(), 5, key)[2] == recompute(name, whole, 5, -1)
    if name != "bloom":  # what follows does not depend on the decoder
        return
    run = partial(decode.generate, lm, rules=DRAWS, new_tokens=5, eos=-1)
    expected = jax.jit(run)(params, whole[None], np.ones((1, len(whole)), bool), key=key)
    assert answer(name, stream, at, DRAWS, 5, key)[2] == expected.ids[0].tolist()
    search = jax.jit(partial(decode_stream.beams, lm, rules=Rules(), count=3, new_tokens=5, room=jnp.int32(5), eos=7))
    by_stream = search(params, stream, at)
    run = partial(decode_beam.beam, lm, new_tokens=5, eos=7, beams=3)
    expected = jax.jit(run)(params, whole[None], np.ones((1, len(whole)), bool))
    assert by_stream.ids[0].tolist() == expected.ids[0].tolist()
    np.testing.assert_allclose(by_stream.scores, expected.scores, rtol=1e-5)


def test_logits_that_are_not_finite_give_no_token() -> None:
    lm = LMS["gpt3"]
    params = jax.tree.map(np.copy, params_of("gpt3"))
    params["norm"]["bias"][0] = np.nan
    stream = read(
        lm, params, decode_stream.begin(lm, params, 1, 16, 2), 0, np.zeros((1, CHUNK, lm.width), np.float32), 2
    )
    assert int(step(lm, params, stream, 2, Rules(), 0, jax.random.key(0))[1][0]) == -1
