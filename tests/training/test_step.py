"""The training step: frozen parameters, gradient accumulation, results on different meshes, and non-finite steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ymplug_jax.core import sharding, state
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.setup import Run


def start(run: Run):
    """Return (state, frozen, key) of a fresh run."""
    now, frozen, _ = setup.fresh_state(run)
    key = jax.device_put(jax.random.key(run.experiment.train.seed), sharding.replicated(run.mesh))
    return now, frozen, key


def losses_of(run: Run, steps: int = 4) -> tuple[list[float], state.TrainState]:
    step = step_lib.compile_step(run)
    now, frozen, key = start(run)
    losses = []
    for i in range(steps):
        now, metrics = step(now, frozen, tiny.batch(run, seed=i), key)
        losses.append(metrics["loss"].value())
    return losses, now


def test_no_frozen_leaf_in_state_or_gradient():
    run = tiny.prepare()
    trainable = state.flatten(run.state.trainable)
    assert trainable and not any(path.startswith("llm/") for path in trainable)
    assert all(path.startswith("llm/") for path in state.flatten(run.frozen))
    moments = run.state.opt_state[1].mu
    assert set(state.flatten(moments)) == set(trainable)


def test_frozen_parameters_are_unchanged_after_ten_steps():
    run = tiny.prepare()
    step = step_lib.compile_step(run)
    now, frozen, key = start(run)
    before = {path: np.array(leaf).tobytes() for path, leaf in state.flatten(frozen).items()}
    queries = np.array(now.trainable["abstractor"]["queries"])
    for i in range(10):
        now, _ = step(now, frozen, tiny.batch(run, seed=i), key)
    assert {path: np.array(leaf).tobytes() for path, leaf in state.flatten(frozen).items()} == before
    assert not np.array_equal(queries, np.array(now.trainable["abstractor"]["queries"]))
    assert int(now.step) == 10


def test_loss_falls_on_one_batch():
    run = tiny.prepare(train={"frozen": ()})  # with a frozen random decoder the loss would not fall
    step = step_lib.compile_step(run)
    now, frozen, key = start(run)
    values = []
    for _ in range(30):
        now, metrics = step(now, frozen, tiny.batch(run), key)
        values.append(metrics["loss"].value())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_losses_are_the_same_on_every_mesh(mesh: dict[str, int]):
    single, end = losses_of(tiny.prepare())
    spread, spread_end = losses_of(tiny.prepare(8, mesh=mesh))
    np.testing.assert_allclose(spread, single, rtol=2e-5)
    for path, leaf in state.flatten(end.trainable).items():
        np.testing.assert_allclose(state.flatten(spread_end.trainable)[path], leaf, atol=2e-4, err_msg=path)


def test_the_contrastive_loss_uses_the_global_batch():
    model = tiny.MODEL.clone(contrastive_width=8)
    single, _ = losses_of(tiny.prepare(model=model))
    spread, _ = losses_of(tiny.prepare(8, model=model, mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_allclose(spread, single, rtol=2e-5)


def test_fsdp_shards_the_parameters():
    run = tiny.prepare(8, mesh={"fsdp": 8})
    up = state.flatten(run.state.trainable)["vision/blocks/mlp/up/kernel"]
    assert up.sharding.shard_shape(up.shape)[1] == up.shape[1] // 8


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts: int):
    """The rows have different lengths, so an unweighted mean over micro-batches would differ."""
    whole, end = losses_of(tiny.prepare())
    cut, cut_end = losses_of(tiny.prepare(train={"accumulate": parts}))
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    for path, leaf in state.flatten(end.trainable).items():
        np.testing.assert_allclose(state.flatten(cut_end.trainable)[path], leaf, atol=1e-4, err_msg=path)


def test_invalid_rows_do_not_count():
    run = tiny.prepare()
    params, _ = setup.fresh_params(run)
    loss = jax.jit(lambda params, batch: run.task.loss(params, batch, None)[1])
    valid = np.arange(8) < 5
    some = loss(params, tiny.batch(run, valid=valid))
    changed = {
        key: np.where(valid.reshape(-1, *[1] * (value.ndim - 1)), value, 1).astype(value.dtype)
        for key, value in jax.device_get(tiny.batch(run)).items()
        if key in ("ids", "video")
    }
    other = loss(params, tiny.batch(run, valid=valid, **changed))
    assert some["loss"].value() == other["loss"].value()
    assert some["loss"].weight == jnp.sum(tiny.batch(run)["mask"][:5, 1:])


def test_a_non_finite_step_changes_nothing_but_the_count():
    run = tiny.prepare()
    step = step_lib.compile_step(run)
    now, frozen, key = start(run)
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, frozen)
    before = jax.tree.map(np.array, (now.trainable, now.opt_state))
    now, metrics = step(now, poisoned, tiny.batch(run), key)
    assert metrics["skipped"].total == 1 and int(now.step) == 1
    jax.tree.map(np.testing.assert_array_equal, (now.trainable, now.opt_state), before)
    now, metrics = step(now, frozen, tiny.batch(run), key)
    assert metrics["skipped"].total == 0 and np.isfinite(metrics["loss"].value())


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"batch_size: 8 is not a multiple of .* = 3 x 1 x 1; change one of them"):
        tiny.prepare(train={"accumulate": 3})
    with pytest.raises(ValueError, match="make them equal"):
        tiny.prepare(data={"frames": 3})
    with pytest.raises(ValueError, match="max_positions 32"):
        tiny.prepare(data={"max_tokens": 30})
    with pytest.raises(ValueError, match="matches no parameter"):
        tiny.prepare(train={"frozen": ("lm/.*",)})
    with pytest.raises(ValueError, match="larger than the training split"):
        tiny.prepare(train={"batch_size": 128})
