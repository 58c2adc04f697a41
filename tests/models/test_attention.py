"""Attention against independent computations."""

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.models import attention


def qkv(seed: int, batch: int, length: int, keys: int, heads: int, size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, n, heads, size)).astype(np.float32) for n in (length, keys, keys)]


def test_attention_agrees_with_jax() -> None:
    q, k, v = qkv(0, 2, 5, 7, 3, 4)
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(attention.attend(q, k, v), expected, atol=1e-6)
    mask = np.random.default_rng(1).random((2, 1, 5, 7)) < 0.7
    mask[..., 0] = True
    expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask))
    np.testing.assert_allclose(attention.attend(q, k, v, mask=mask), expected, atol=1e-6)


def test_causal_attention_does_not_see_what_follows() -> None:
    q, k, v = qkv(0, 2, 6, 6, 2, 4)
    out = attention.attend(q, k, v, causal=True)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
    k[:, 4:], v[:, 4:] = 9, -9
    np.testing.assert_array_equal(attention.attend(q, k, v, causal=True)[:, :4], out[:, :4])


def test_dropout_drops_at_its_rate_and_keeps_the_mean() -> None:
    heads = 500
    q, k = np.zeros((1, 8, heads, 2), np.float32), np.zeros((1, 8, heads, 2), np.float32)
    v = np.ones((1, 8, heads, 2), np.float32)
    out = attention.attend(q, k, v, dropout=0.25, key=jax.random.key(0))
    assert abs(out.mean() - 1) < 0.02
    kept = np.asarray(out) * 8 * 0.75  # how many of 8 equal keys stayed
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    assert abs(kept.mean() / 8 - 0.75) < 0.02
    np.testing.assert_allclose(attention.attend(q, k, v, dropout=0.25), v, rtol=1e-6)  # no key: no dropout
