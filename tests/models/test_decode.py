"""Generation with a cache against computing everything again for each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.models import decode
from ymplug_jax.models.gpt3 import GPT3

LM = GPT3(vocab=40, width=32, depth=2, heads=4, max_positions=32)


@pytest.fixture(scope="module")
def params() -> dict:
    shapes = jax.eval_shape(lambda: LM.init(jax.random.key(0), jnp.zeros((1, 1, LM.width))))["params"]
    rng = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        spread = {"scale": 0.1, "bias": 0.1}.get(kind, 0.5)  # lively enough for the tokens to differ
        return (float(kind == "scale") + rng.normal(0, spread, leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


@partial(jax.jit, static_argnames="queries")
def logits_without_cache(params: dict, prefix: jax.Array, ids: jax.Array, queries: int) -> jax.Array:
    embeds = LM.apply({"params": params}, ids, method="embed")
    hidden = LM.apply({"params": params}, jnp.concatenate([prefix, embeds], axis=1))
    return LM.apply({"params": params}, hidden[:, queries:], method="logits")


def recompute(params: dict, prefix: np.ndarray | None, prompt: np.ndarray, new_tokens: int, eos: int) -> list[int]:
    """Greedy continuation of one row, computing everything again for each token, up to but without `eos`."""
    prefix = np.zeros((0, LM.width), np.float32) if prefix is None else prefix
    row = np.zeros((1, 16), np.int32)  # what stands behind the last token is not seen
    row[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + new_tokens):
        token = int(logits_without_cache(params, prefix[None], row, len(prefix))[0, end - 1].argmax())
        if token == eos:
            break
        row[0, end] = token
    else:
        end += 1
    return row[0, len(prompt) : end].tolist()


@pytest.mark.parametrize("queries", [0, 5])
def test_cached_greedy_equals_recomputation(params: dict, queries: int) -> None:
    rng = np.random.default_rng(queries)
    prefix = rng.normal(size=(3, queries, LM.width)).astype(np.float32) if queries else None
    ids, lengths, new = rng.integers(1, LM.vocab, (3, 4)).astype(np.int32), np.array([4, 1, 3]), 9
    rows = [(None if prefix is None else prefix[b], ids[b, : lengths[b]]) for b in range(3)]
    free = [recompute(params, *row, new, eos=-1) for row in rows]
    eos = free[0][4]  # so that the first row stops early
    expected = [recompute(params, *row, new, eos=eos) for row in rows]
    run = jax.jit(partial(decode.greedy, LM, new_tokens=new, eos=eos))
    out = run(params, prefix, ids, lengths)
    assert out.ids.shape == (3, new)
    assert out.lengths.tolist() == [len(row) for row in expected]
    for b, row in enumerate(expected):
        assert out.ids[b].tolist() == row + [eos] * (new - len(row))
    assert min(out.lengths) < max(out.lengths)


def test_extend_by_several_tokens_equals_one_pass(params: dict) -> None:
    embeds = np.random.default_rng(0).normal(size=(2, 9, LM.width)).astype(np.float32)
    whole = jax.jit(lambda: LM.apply({"params": params}, embeds))()
    first, cache = jax.jit(lambda: LM.apply({"params": params}, embeds[:, :4], 12, method="prefill"))()
    assert cache.k.shape == (2, LM.depth, 12, LM.heads, LM.width // LM.heads)
    # The second row goes back by one: what the cache holds at and after its position must not be seen.
    start = np.array([4, 3], np.int32)
    rest = np.stack([embeds[0, 4:9], embeds[1, 3:8]])
    second, _ = jax.jit(lambda cache: LM.apply({"params": params}, rest, cache, start, method="extend"))(cache)
    np.testing.assert_allclose(first, whole[:, :4], atol=2e-5)
    np.testing.assert_allclose(second[0], whole[0, 4:9], atol=2e-5)
    np.testing.assert_allclose(second[1], whole[1, 3:8], atol=2e-5)


def test_what_does_not_fit_is_refused(params: dict) -> None:
    with pytest.raises(ValueError, match="cache length 33"):
        decode.greedy(LM, params, None, np.ones((1, 3), np.int32), np.array([3]), new_tokens=30, eos=0)
