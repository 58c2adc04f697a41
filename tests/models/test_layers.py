"""Layers and position tables against independent computations."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ymplug_jax.models import attention, layers


def test_what_remat_keeps_are_products_with_their_biases() -> None:
    """Of an attention and an MLP in a stack: q, k, v, o and up; the MLP's result is the next block's to keep."""

    class Block(nn.Module):
        flat: bool

        @nn.compact
        def __call__(self, x: jax.Array, _: jax.Array) -> tuple[jax.Array, None]:
            init = nn.initializers.normal(1.0)
            attn = layers.Attention(8, 2, init, init, flat=self.flat, name="attn")
            q, k, v = attn.project(x)
            y = attention.attend_frames(q, k, v, 2) if self.flat else attention.attend(q, k, v)
            x = x + attn.output(y)
            return x + layers.Mlp(24, init, init, name="mlp")(x), None

    for flat, shape in ((True, (6, 5, 7, 8)), (False, (6, 7, 8))):
        found, kept = {}, {}
        for remat in ("none", "dots", "full"):
            blocks = layers.stack(Block, 3, remat=remat, in_axes=0)(flat)
            x = jax.random.normal(jax.random.key(1), shape)
            params = blocks.init(jax.random.key(0), x, jnp.zeros(3))
            y, back = jax.vjp(lambda *given, blocks=blocks: blocks.apply(*given, jnp.zeros(3))[0], params, x)
            found[remat] = y, back(jnp.ones_like(y))
            kept[remat] = sorted(
                a.shape for a in jax.tree.leaves(back) if a.shape[:2] == (3, 6)
            )  # [layers, batch, ...]
        for remat in ("dots", "full"):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found[remat], found["none"])
        rows = (3, *shape[:-1])
        heads = (*rows, 8) if flat else (*rows, 2, 4)
        assert kept["dots"] == sorted([(*rows, 8)] * 2 + [heads] * 3 + [(*rows, 24)])  # the carry and o; q, k, v; up
        assert kept["full"] == [(*rows, 8)]
        assert len(kept["none"]) > len(kept["dots"])


def test_gelu_and_its_derivatives_are_exact() -> None:
    x = jnp.linspace(-9, 9, 4001)
    below = np.array([0.5 * math.erfc(-t / math.sqrt(2)) for t in np.asarray(x, np.float64)])
    np.testing.assert_allclose(layers.gelu(x), x * below, rtol=1e-6, atol=1e-6)
    expected = below + x * np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(jax.vmap(jax.grad(layers.gelu))(x), expected, rtol=1e-6, atol=1e-6)
    y, tangent = jax.jvp(layers.gelu, (x,), (2 * jnp.ones_like(x),))
    np.testing.assert_array_equal(y, layers.gelu(x))
    np.testing.assert_allclose(tangent, 2 * expected, rtol=1e-6, atol=2e-6)


def test_gelu_by_tanh_is_the_one_of_jax() -> None:
    x = jnp.linspace(-9, 9, 4001)
    theirs = partial(jax.nn.gelu, approximate=True)
    np.testing.assert_allclose(layers.gelu(x, True), theirs(x), rtol=1e-6, atol=1e-6)
    slope = jax.vmap(jax.grad(partial(layers.gelu, tanh=True)))(x)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(theirs))(x), rtol=1e-5, atol=1e-5)


def test_gelu_of_half_precision_is_rounded_once() -> None:
    x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    exact = layers.gelu(x.astype(jnp.float32))
    np.testing.assert_array_equal(layers.gelu(x), exact.astype(jnp.bfloat16))  # 1 + erf in bfloat16 is 0 below -3
    assert layers.gelu(x).dtype == jax.grad(lambda x: layers.gelu(x).sum())(x).dtype == jnp.bfloat16


def test_resize_keeps_equal_sizes_and_lines() -> None:
    table = np.random.default_rng(0).normal(size=(1 + 16, 5)).astype(np.float32)
    np.testing.assert_allclose(layers.resize_pos_embed(table, 16), table, atol=1e-6)
    np.testing.assert_allclose(layers.resize_temporal_embed(table, 17), table, atol=1e-6)
    # Half-pixel centres: new frame i of 8 lies at old position (i + 0.5) / 2 - 0.5, clamped to the ends.
    line = np.arange(4, dtype=np.float32)[:, None]
    expected = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(layers.resize_temporal_embed(line, 8)[:, 0], expected, atol=1e-6)
    # No antialiasing: on the way down only the two neighbours count.
    halved = layers.resize_temporal_embed(np.eye(8, 1), 2)
    np.testing.assert_allclose(halved[:, 0], [0, 0], atol=1e-6)


def test_resize_is_separable_over_rows_and_columns() -> None:
    grid = np.arange(4)[:, None] * 10 + np.arange(4)
    table = np.concatenate([[7], grid.ravel()]).astype(np.float32)[:, None]
    at = np.clip((np.arange(6) + 0.5) * 4 / 6 - 0.5, 0, 3)
    resized = np.asarray(layers.resize_pos_embed(table, 36))[:, 0]
    assert resized[0] == 7
    np.testing.assert_allclose(resized[1:].reshape(6, 6), at[:, None] * 10 + at, atol=1e-4)


def test_resize_refuses_what_is_no_square() -> None:
    with pytest.raises(ValueError, match="squares"):
        layers.resize_pos_embed(np.zeros((1 + 12, 4), np.float32), 16)
