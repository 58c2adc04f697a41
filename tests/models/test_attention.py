"""`attention.attend` equals independent computations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.models import attention, plain_attention


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


def test_causal_attention_does_not_see_later_keys() -> None:
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
    kept = np.asarray(out) * 8 * 0.75  # number of kept keys out of 8 equal ones
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    assert abs(kept.mean() / 8 - 0.75) < 0.02
    np.testing.assert_allclose(attention.attend(q, k, v, dropout=0.25), v, rtol=1e-6)  # no key: no dropout


def by_hand(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, seen: np.ndarray, slopes: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """Attention in float64, one query and one head at a time. A query that sees no key gets the mean of all values."""
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        group = n // (q.shape[2] // k.shape[2])
        keys = [s for s in range(k.shape[1]) if seen[b, s] and (s <= i or not causal)]
        if not keys:
            out[b, i, n] = v[b, :, group].mean(axis=0, dtype=np.float64)
            continue
        logits = k[b, keys, group].astype(np.float64) @ q[b, i, n] / math.sqrt(q.shape[3])
        logits += float(slopes[n]) * at[b, keys]
        weights = np.exp(logits - logits.max())
        out[b, i, n] = weights @ v[b, keys, group] / weights.sum()
    return out


def padded(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Key mask bool[B, L] and positions int[B, L]: rows padded left, right and in the middle, and an all-padding row."""
    seen = np.ones((batch, length), bool)
    seen[0, :3], seen[1, -2:], seen[2, 2:4], seen[3] = False, False, False, False
    return seen, np.where(seen, seen.cumsum(axis=1) - 1, 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_groups_padding_and_alibi_equal_float64_loops(causal: bool, groups: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, 9, n, 8)).astype(np.float32) for n in (4, groups, groups))
    seen, at = padded(4, 9)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    expected = by_hand(q, k, v, causal, seen, slopes, at)
    given = {"key_mask": jnp.asarray(seen), "slopes": jnp.asarray(slopes), "key_positions": jnp.asarray(at)}
    np.testing.assert_allclose(
        attention.attend(*map(jnp.asarray, (q, k, v)), causal=causal, **given), expected, atol=1e-5
    )
    columns = attention.with_columns(*map(jnp.asarray, (q, k, v)), causal, *given.values(), implementation="xla")
    np.testing.assert_allclose(columns, expected, atol=1e-4)
    alone = attention.attend(*map(jnp.asarray, (q, k, v)), causal=causal)
    np.testing.assert_allclose(alone, by_hand(q, k, v, causal, seen | True, 0 * slopes, at), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_fused_attention_gets_even_numbers_of_queries_and_keys(
    causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN has no gradient for odd ones; the added query and key change nothing."""
    real, lengths = jax.nn.dot_product_attention, []

    def seen_by_kernel(q: jax.Array, k: jax.Array, *rest: jax.Array, **settings: Any) -> jax.Array:
        lengths.append((q.shape[1], k.shape[1]))
        return real(q, k, *rest, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", seen_by_kernel)
    q, k, v = (x.astype(np.float32) for x in qkv(4, 2, 9, 9 if causal else 11, 4, 8))
    mask = jnp.arange(k.shape[1]) >= jnp.asarray([2, 0])[:, None] if masked else None
    plain = lambda *x: attention.attend(*x, causal=causal, key_mask=mask)  # noqa: E731
    fused = lambda *x: attention.with_columns(*x, causal, mask, None, None, "xla")  # noqa: E731
    expected, back = jax.vjp(plain, q, k, v)
    made, made_back = jax.vjp(fused, q, k, v)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    for ours, right in zip(made_back(q + 1), back(q + 1), strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-4)
    assert lengths == [(10, 10 if causal else 12)]


def test_columns_have_the_gradients_of_plain_attention() -> None:
    q, k, v = (x.astype(np.float32) for x in qkv(2, 4, 9, 9, 4, 8))
    seen, at = map(jnp.asarray, padded(4, 9))
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
    plain = lambda *x: attention.attend(*x, causal=True, key_mask=seen, slopes=slopes, key_positions=at)  # noqa: E731
    columns = lambda *x: attention.with_columns(*x, True, seen, slopes, at, "xla")  # noqa: E731
    grad = np.random.default_rng(3).normal(size=q.shape).astype(np.float32)
    for made, right in zip(jax.vjp(columns, q, k, v)[1](grad), jax.vjp(plain, q, k, v)[1](grad), strict=True):
        np.testing.assert_allclose(made, right, atol=1e-4)


def test_columns_represent_far_positions_in_half_precision() -> None:
    """With bfloat16 operands slope times position stays exact to float32; rounding them would shift logits by whole units."""
    positions = jnp.asarray([[*range(2040, 2047), 65535]])
    q, k = jnp.zeros((1, 8, 1, 8), jnp.bfloat16), jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    v = jnp.eye(8, dtype=jnp.bfloat16)[None, :, None]
    seen = jnp.asarray([[True] * 7 + [False]])
    slope = 0.8408964
    made = attention.with_columns(q, k, v, False, seen, jnp.asarray([slope]), positions, "xla")[0, 0, 0]
    weights = np.exp(slope * np.arange(7))
    np.testing.assert_allclose(made.astype(jnp.float32), [*(weights / weights.sum()), 0], atol=0.004)


def test_inconsistent_inputs_raise() -> None:
    q = jnp.zeros((1, 4, 3, 8))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention.attend(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match="give both or neither"):
        attention.attend(q, q, q, slopes=jnp.ones(3))


def test_long_rows_in_a_loop_equal_whole_rows() -> None:
    """More queries than one program computes at once, in blocks that do not divide their number; with a bias and padding."""
    rng = np.random.default_rng(9)
    length, keys = plain_attention.WHOLE + 7, 11
    q = rng.normal(size=(2, length, 2, 4)).astype(np.float32)
    k, v = (rng.normal(size=(2, keys, 2, 4)).astype(np.float32) for _ in "kv")
    bias, seen = rng.normal(size=(2, 1, 1, keys)).astype(np.float32), rng.random((2, keys)) < 0.7
    weights = rng.normal(size=q.shape).astype(np.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = attention.attend(q, k, v, bias=bias, key_mask=seen)
        return jnp.sum(y * weights), y

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    blocks = jax.jit(run)
    assert "while" in blocks.lower(q, k, v).as_text()
    (_, found), grads = blocks(q, k, v)
    with plain_attention.undivided():
        (_, wanted), expected = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected)
    size = -(-length // -(-length // plain_attention.BLOCK))
    equal = jnp.broadcast_to(q[:, :1], q.shape)  # so that only the draws of two blocks can differ
    dropped = jax.jit(lambda q: attention.attend(q, k, v, dropout=0.5, key=jax.random.key(0)))(equal)
    assert not np.allclose(dropped[:, :size], dropped[:, size : 2 * size])
