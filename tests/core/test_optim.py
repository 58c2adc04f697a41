"""Parameter groups, schedules and the AdamW update of trainable parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.core import optim
from ymplug_jax.core.config import Optim

SETTINGS = Optim(
    lr=1e-2, min_lr=1e-4, weight_decay=0.1, clip=1e9, no_decay=(".*/bias",), lr_scales=(("vision/.*", 0.1),)
)
PARAMS = {"vision": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.full((3,), 2.0)}}


def test_groups():
    groups = optim.param_groups(["vision/kernel", "vision/bias", "head/kernel"], SETTINGS)
    assert groups == {"vision/kernel": (0.1, 0.1), "vision/bias": (0.1, 0.0), "head/kernel": (1.0, 0.1)}


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError, match=r"no_decay.*'nothing/.*' matches no parameter"):
        optim.param_groups(["head/kernel"], Optim(no_decay=("nothing/.*",)))


def test_one_update_by_hand():
    tx = optim.make(SETTINGS, PARAMS)
    grads = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    adam = 0.5 / (0.5 + SETTINGS.eps)  # first step: bias-corrected moments are g and g^2
    np.testing.assert_allclose(updates["vision"]["kernel"], 0.1 * (adam + 0.1 * 1.0), rtol=1e-5)
    np.testing.assert_allclose(updates["vision"]["bias"], 0.1 * adam, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"], adam + 0.1 * 2.0, rtol=1e-5)


def test_clipping_uses_the_global_norm_of_trainable_parameters():
    tx = optim.make(Optim(clip=1.0, weight_decay=0.0), {"a": jnp.zeros(1), "b": jnp.zeros(1)})
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, opt_state = tx.update(
        grads, tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}), {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    )
    np.testing.assert_allclose(opt_state[1].mu["a"], 0.1 * 0.6, rtol=1e-5)


def test_schedule_ends():
    rate = optim.schedule(SETTINGS, warmup=5, total=20)
    assert rate(jnp.int32(0)) == 0
    np.testing.assert_allclose([rate(jnp.int32(4)), rate(jnp.int32(5))], 1e-2, rtol=1e-6)
    assert SETTINGS.min_lr < rate(jnp.int32(19)) < 3e-4
    assert rate(jnp.int32(500)) == rate(jnp.int32(19))


def test_warmup_longer_than_the_run():
    with pytest.raises(ValueError, match="warmup: 30 steps, but the run has 20"):
        optim.schedule(SETTINGS, warmup=30, total=20)
