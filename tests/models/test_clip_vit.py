"""mPLUG-2's vision tower: what a fresh one computes, its sizes and its axes. Stored outputs are compared in tests/parity."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.core import sharding, state
from ymplug_jax.models import clip_vit, temporal
from ymplug_jax.models.clip_vit import VideoClipViT

SMALL = VideoClipViT(image_size=8, patch_size=4, depth=2, width=16, heads=2, mlp=32, std=0.2)


def clip_of(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).normal(size=(2, frames, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("size", ["b16", "l14"])
def test_the_sizes_are_those_of_the_release(size):
    model = clip_vit.VIDEO_SIZES[size]
    shape = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
    tokens, made = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), shape)
    params = made["params"]
    adapters = {path: leaf for path, leaf in state.flatten(params).items() if "temporal" in path}
    assert tokens.shape == (1, {"b16": 3137, "l14": 4097}[size], model.width)
    assert state.count(params) == {"b16": 100_056_576, "l14": 353_781_760}[size]
    assert state.count(adapters) == {"b16": 14_257_152, "l14": 50_601_984}[size]
    mesh = sharding.make_mesh()
    for path, leaf in state.flatten(params).items():
        sharding.spec_of(path, leaf.shape, clip_vit.VIDEO_AXES, {}, mesh)


def test_a_fresh_tower_sees_each_frame_alone():
    clip = clip_of(3)
    params = SMALL.init(jax.random.key(0), clip)
    run = jax.jit(SMALL.apply, static_argnames="merged")
    apart = run(params, clip, merged=False)  # [B, T, 1 + P, D]
    alone = run(params, clip.reshape(6, 1, 8, 8, 3), merged=False)
    np.testing.assert_allclose(apart.reshape(alone.shape), alone, atol=1e-5)
    merged = run(params, clip)
    np.testing.assert_allclose(merged[:, 1:], apart[:, :, 1:].reshape(2, 12, 16), atol=1e-6)


def test_a_kernel_of_one_frame_becomes_one_of_three():
    clip = clip_of(5)
    params = SMALL.init(jax.random.key(0), clip)["params"]
    short = SMALL.clone(temporal_stride=2)
    kernel = temporal.resize_patch(params["patch"]["kernel"], (3, 4, 4, 3, 16))
    inflated = params | {"patch": {"kernel": kernel}}
    tokens = short.apply({"params": inflated}, clip)
    assert short.frames_out(5) == 3 and tokens.shape == (2, 1 + 3 * 4, 16)
    np.testing.assert_allclose(tokens, SMALL.apply({"params": params}, clip[:, ::2]), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"a kernel over 3 frames cannot become one over 1; set config.model.vision.temporal_stride"
    ):
        temporal.inflate(kernel, 1)
    with pytest.raises(
        ValueError, match=r"patch/kernel: .* the model's \(3, 8, 8, 3, 16\); set config.model.vision.patch_size"
    ):
        temporal.resize_patch(params["patch"]["kernel"], (3, 8, 8, 3, 16))


def test_adapters_that_cannot_be_built_are_refused():
    for fields, message in ({"adapters": 3}, "1 or 2 adapters, not 3"), ({"reduction": 17.0}, "no width of 16"):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(SMALL.clone(**fields).init, jax.random.key(0), clip_of(1))
    with pytest.raises(ValueError, match=r"config.data.image_size: the frames have shape"):
        jax.eval_shape(SMALL.clone(image_size=16).init, jax.random.key(0), clip_of(1))


def test_still_images_pass_the_temporal_modules() -> None:
    """With `stills`, a clip of one frame sees no adapter and a longer one sees all; the parameters are the same."""
    still = SMALL.clone(stills=True)
    video = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 3))
    params = SMALL.init(jax.random.key(1), video[:, :1])["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, still.init(jax.random.key(1), video[:, :1])["params"]
    )
    flat = flatten_dict(params, sep="/")
    loud = {
        k: jax.random.normal(jax.random.key(2), v.shape) if re.search("temporal_./up/", k) else v
        for k, v in flat.items()
    }
    mute = {k: jnp.zeros_like(v) if re.search("temporal_./up/", k) else v for k, v in flat.items()}
    loud, mute = ({"params": unflatten_dict(tree, sep="/")} for tree in (loud, mute))
    np.testing.assert_allclose(still.apply(loud, video[:, :1]), SMALL.apply(mute, video[:, :1]), rtol=1e-5, atol=1e-5)
    assert not np.allclose(SMALL.apply(loud, video[:, :1]), SMALL.apply(mute, video[:, :1]), atol=1e-2)
    np.testing.assert_array_equal(still.apply(loud, video), SMALL.apply(loud, video))
