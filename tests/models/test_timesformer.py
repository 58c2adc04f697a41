"""Initial values and stochastic depth of the video encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.models import layers, timesformer
from ymplug_jax.models.timesformer import TimeSformer

MODEL = TimeSformer(image_size=16, patch_size=8, depth=2, width=16, heads=2, frames=3, clip=False)


def made(drop_path: float) -> tuple[TimeSformer, dict, np.ndarray]:
    rng = np.random.default_rng(0)
    video = rng.normal(size=(4, 3, 16, 16, 3)).astype(np.float32)
    params = jax.jit(MODEL.init)(jax.random.key(0), video)["params"]
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32), params)
    return MODEL.clone(drop_path=drop_path), params, video


def test_a_dropped_block_keeps_the_bias_of_temporal_fc() -> None:
    model, params, video = made(1 - 1e-6)
    out = model.apply({"params": params}, video, deterministic=False, rngs={"dropout": jax.random.key(1)})
    one = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    first = MODEL.clone(depth=1)
    _, kept = first.apply({"params": one}, video, capture_intermediates=True, mutable="intermediates")
    x, cls = (part[0] for part in kept["intermediates"]["blocks"]["__call__"][0][0])
    x = x + params["blocks"]["temporal_fc"]["bias"][1]
    tokens = jnp.concatenate([cls[:, None], x.reshape(4, -1, 16)], axis=1)
    norm = layers.norm(None, timesformer.EPS, "float32")
    np.testing.assert_allclose(out, norm.apply({"params": params["norm"]}, tokens), rtol=1e-4, atol=1e-4)


def test_evaluation_drops_nothing_and_keys_differ() -> None:
    model, params, video = made(0.5)
    plain = MODEL.apply({"params": params}, video)
    np.testing.assert_array_equal(model.apply({"params": params}, video), plain)
    drawn = [
        model.apply({"params": params}, video, deterministic=False, rngs={"dropout": jax.random.key(k)})
        for k in (1, 1, 2)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2]) and not np.allclose(drawn[0], plain)


def test_initial_values_follow_std_and_table_std() -> None:
    """For a tower without image weights: std 0.1 for weights and 0.3 for tables; output kernels shrink with depth."""
    model = TimeSformer(image_size=64, patch_size=8, depth=4, width=64, heads=4, frames=16, std=0.1, table_std=0.3)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 64, 64, 3)))["params"]
    blocks = params["blocks"]
    for leaf in (
        params["patch"]["kernel"],
        blocks["attn"]["q"]["kernel"],
        blocks["temporal_attn"]["o"]["kernel"],
        blocks["mlp"]["up"]["kernel"],
    ):
        assert float(leaf.std()) == pytest.approx(0.1, rel=0.05)
    for leaf in (params["pos_embed"], params["temporal_embed"]):
        assert float(leaf.std()) == pytest.approx(0.3, rel=0.05)
    by_layer = blocks["mlp"]["down"]["kernel"].reshape(4, -1).std(axis=1)
    np.testing.assert_allclose(by_layer, 0.1 / np.sqrt([2, 4, 6, 8]), rtol=0.05)
    assert not blocks["temporal_fc"]["kernel"].any()
