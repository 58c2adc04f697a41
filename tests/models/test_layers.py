"""Layers and position tables equal independent computations."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ymplug_jax.models import attention, layers, position_tables


def test_what_remat_keeps() -> None:
    """Remat "dots" keeps q, k, v, o and up of a block, with their biases; the carry holds the MLP's output."""

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
        for remat in ("none", *layers.REMAT):
            blocks = layers.stack(Block, 3, remat=remat, in_axes=0)(flat)
            x = jax.random.normal(jax.random.key(1), shape)
            params = blocks.init(jax.random.key(0), x, jnp.zeros(3))
            y, back = jax.vjp(lambda *given, blocks=blocks: blocks.apply(*given, jnp.zeros(3))[0], params, x)
            found[remat] = y, back(jnp.ones_like(y))
            kept[remat] = sorted(
                a.shape for a in jax.tree.leaves(back) if a.shape[:2] == (3, 6)
            )  # [layers, batch, ...]
        for remat in layers.REMAT:
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


def test_tanh_gelu_equals_jax() -> None:
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
    np.testing.assert_allclose(position_tables.resize_pos_embed(table, 16), table, atol=1e-6)
    np.testing.assert_allclose(position_tables.resize_temporal_embed(table, 17), table, atol=1e-6)
    # Half-pixel centres: new frame i of 8 lies at old position (i + 0.5) / 2 - 0.5, clamped to the ends.
    line = np.arange(4, dtype=np.float32)[:, None]
    expected = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(position_tables.resize_temporal_embed(line, 8)[:, 0], expected, atol=1e-6)
    # Without antialiasing, downsampling reads the two nearest entries only.
    halved = position_tables.resize_temporal_embed(np.eye(8, 1), 2)
    np.testing.assert_allclose(halved[:, 0], [0, 0], atol=1e-6)


def test_resize_is_separable_over_rows_and_columns() -> None:
    grid = np.arange(4)[:, None] * 10 + np.arange(4)
    table = np.concatenate([[7], grid.ravel()]).astype(np.float32)[:, None]
    at = np.clip((np.arange(6) + 0.5) * 4 / 6 - 0.5, 0, 3)
    resized = np.asarray(position_tables.resize_pos_embed(table, 36))[:, 0]
    assert resized[0] == 7
    np.testing.assert_allclose(resized[1:].reshape(6, 6), at[:, None] * 10 + at, atol=1e-4)


def test_resize_of_a_non_square_grid_raises() -> None:
    with pytest.raises(ValueError, match="squares"):
        position_tables.resize_pos_embed(np.zeros((1 + 12, 4), np.float32), 16)


def test_rms_norm_equals_float64() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 4
    scale = np.arange(1, 6, dtype=np.float32)
    expected = scale * x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 0.5)
    params = {"params": {"scale": scale}}
    np.testing.assert_allclose(layers.rms_norm(None, 0.5, "float32").apply(params, x), expected, rtol=1e-6)
    low = layers.rms_norm(None, 0.5, "bfloat16").apply(params, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), expected, rtol=0.02)


def test_rotary_positions_equal_complex_rotation() -> None:
    rng, theta = np.random.default_rng(0), 100.0
    x, at = rng.normal(size=(2, 3, 4, 6)).astype(np.float32), np.array([[0, 1, 700], [5, 5, 31]])
    pairs = x[..., :3] + 1j * x[..., 3:]
    speeds = theta ** (-np.array([0, 2, 4]) / 6)
    turned = pairs * np.exp(1j * at[:, :, None, None] * speeds)
    rotation = layers.rotation_of(jnp.asarray(at), 6, theta)
    found = layers.rotate(x, rotation)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-4)
    np.testing.assert_array_equal(found[0, 0], x[0, 0])  # position 0 is the identity
    assert layers.rotate(x.astype(jnp.bfloat16), rotation).dtype == jnp.bfloat16


def test_gated_mlp_equals_float64() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5)).astype(np.float32)
    kernels = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in (("gate", (5, 7)), ("up", (5, 7)), ("down", (7, 5)))
    }
    mlp = layers.GatedMlp(7, nn.initializers.zeros)
    params = {name: {"kernel": value} for name, value in kernels.items()}
    assert jax.tree.map(np.shape, mlp.init(jax.random.key(0), x)["params"]) == jax.tree.map(np.shape, params)
    gate = (x @ kernels["gate"]).astype(np.float64)
    expected = (gate / (1 + np.exp(-gate)) * (x @ kernels["up"])) @ kernels["down"]
    np.testing.assert_allclose(mlp.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_attention_with_fewer_key_heads_norms_and_no_biases() -> None:
    normal = nn.initializers.normal(1.0)
    attn = layers.Attention(
        10, 4, normal, normal, kv_heads=2, head_dim=3, qkv_bias=False, out_bias=False, qk_norm_eps=1e-6
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
    start = jax.jit(attn.init_with_output, static_argnames="method")
    (q, k, v), params = start(jax.random.key(0), x, method="project")
    shapes = {"/".join(p.key for p in path[1:]): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    assert shapes == {
        "q/kernel": (10, 4, 3), "k/kernel": (10, 2, 3), "v/kernel": (10, 2, 3), "q_norm/scale": (3,), "k_norm/scale": (3,)
    }  # fmt: skip
    assert (q.shape, k.shape, v.shape) == ((2, 5, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3))
    np.testing.assert_allclose((q**2).mean(axis=-1), 1, rtol=1e-4)
    np.testing.assert_allclose((k**2).mean(axis=-1), 1, rtol=1e-4)
    np.testing.assert_allclose(v, np.einsum("bld,dkh->blkh", x, params["params"]["v"]["kernel"]), rtol=1e-5, atol=1e-5)
    out, params = start(jax.random.key(0), q, method="output")
    assert out.shape == x.shape and set(params["params"]["o"]) == {"kernel"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_layers_give_the_same_and_still_recompute(remat: str) -> None:
    """All layers in one pass have the results and gradients of a loop, and remat still computes every layer again."""

    class Block(nn.Module):
        """A layer with one product."""

        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(nn.Dense(8)(x)), None

    x = jax.random.normal(jax.random.key(0), (4, 8))
    stacked = layers.stack(Block, 3, remat=remat, in_axes=())
    params = stacked().init(jax.random.key(1), x)["params"]

    def loss(params: dict) -> jax.Array:
        return jnp.sum(layers.stack(Block, 3, remat=remat, in_axes=())().apply({"params": params}, x)[0] ** 2)

    found, barriers = {}, {}
    for together in (1, 2, 9):
        with layers.unrolled(together):
            # A function of its own, because JAX remembers what it traced.
            lowered = jax.jit(lambda params: jax.value_and_grad(loss)(params)).lower(params)
        found[together] = lowered.compile()(params)
        barriers[together] = "optimization_barrier" in lowered.as_text()
    for together in (2, 9):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found[1], found[together])
    # The barriers keep XLA from merging the second computation with the first.
    assert barriers == {1: False, 2: remat == "full", 9: remat == "full"}
    with layers.unrolled(0):  # these tests have no GPU
        assert "unroll=1" in str(jax.make_jaxpr(lambda params: loss(params))(params))
