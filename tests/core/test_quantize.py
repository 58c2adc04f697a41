"""Frozen matrices in eight bits: how exact they are, where they are, and that training and checkpoints do not notice."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from tests import tiny
from ymplug_jax.analysis import aot
from ymplug_jax.core import quantize, state
from ymplug_jax.training import parameter_table, setup
from ymplug_jax.training import step as step_lib


def ready(devices: int = 1, dtype: str = "int8", **mesh: int):
    run = tiny.prepare(devices, train={"frozen_dtype": dtype}, mesh=mesh)
    params, _ = setup.fresh_params(run)
    trainable, frozen = state.split(params, run.frozen_patterns)
    opt_state = jax.device_put(run.tx.init(trainable), jax.tree.map(lambda leaf: leaf.sharding, run.state.opt_state))
    step = jax.device_put(jnp.int32(0), run.state.step.sharding)
    return run, state.TrainState(step, trainable, opt_state), frozen


def test_every_value_is_within_half_a_step_of_its_channel() -> None:
    run, _, frozen = ready()
    stored, held = state.flatten(frozen), state.flatten(setup.hold(run, frozen))
    eight = {path for path, leaf in held.items() if isinstance(leaf, quantize.Quantized)}
    kernels = {"attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down"}
    assert eight == {f"llm/blocks/{name}/kernel" for name in kernels}
    for path in eight:
        exact, leaf = np.asarray(stored[path], np.float32), held[path]
        assert leaf.values.dtype == jnp.int8 and leaf.shape == exact.shape
        scale = np.asarray(leaf.scale, np.float32)
        error = np.abs(np.asarray(leaf.values, np.float32) * scale - exact)
        assert (error <= 0.51 * scale + 0.005 * np.abs(exact)).all(), path  # the scale itself is rounded to bfloat16
        channels = exact.size // leaf.scale.size
        assert (
            channels in (32, 128) and leaf.scale.shape[0] == 2
        )  # inputs of a product; one scale for each of its outputs
    for path in stored.keys() - eight:
        np.testing.assert_array_equal(held[path], stored[path])


def test_a_channel_of_zeros_stays_zero() -> None:
    made = quantize._quantize(jnp.zeros((2, 4, 3), jnp.bfloat16), (1,))
    np.testing.assert_array_equal(jnp.asarray(made), 0)


def test_abstract_and_held_trees_agree() -> None:
    run, _, frozen = ready(8, fsdp=2, tensor=2)
    held = setup.hold(run, frozen)
    for wanted, made in zip(jax.tree.leaves(run.held), jax.tree.leaves(held), strict=True):
        assert (wanted.shape, wanted.dtype) == (made.shape, made.dtype)
        assert wanted.sharding.is_equivalent_to(made.sharding, made.ndim)


def test_the_step_is_that_of_the_rounded_weights() -> None:
    """Loss and gradients are those of the product values * scale put in by hand, but for its rounding to bfloat16, which XLA may
    leave out; and near to those of the exact weights."""
    run, now, frozen = ready()
    plain = tiny.prepare(1, train={"frozen_dtype": "bfloat16"})
    held = setup.hold(run, frozen)
    flat = state.flatten(held)
    by_hand = state.unflatten({k: jnp.asarray(v) if isinstance(v, quantize.Quantized) else v for k, v in flat.items()})
    batch, losses, grads = tiny.batch(run), [], []
    for which, tree in ((run, held), (plain, by_hand), (plain, frozen)):

        def loss(trainable, which=which, tree=tree):
            return which.task.loss(state.merge(trainable, tree), batch, None)[0]

        value, grad = jax.jit(jax.value_and_grad(loss))(now.trainable)
        losses.append(float(value))
        grads.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad)]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(grads[0], grads[1], atol=5e-3 * np.abs(grads[1]).max())
    np.testing.assert_allclose(losses[0], losses[2], rtol=2e-2)
    assert np.dot(grads[0], grads[2]) > 0.99 * np.linalg.norm(grads[0]) * np.linalg.norm(grads[2])


def test_eight_devices_equal_one() -> None:
    found = []
    for devices, mesh in ((1, {}), (8, {"fsdp": 2, "tensor": 2})):
        run, now, frozen = ready(devices, **mesh)
        key = jax.device_put(jax.random.key(0), jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec()))
        step = step_lib.compile_step(run)
        for seed in range(3):
            now, metrics = step(now, setup.hold(run, frozen), tiny.batch(run, seed), key)
        found.append(metrics["loss"].value())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_plan_counts_bytes_and_parameters() -> None:
    eight, half = (tiny.prepare(1, train={"frozen_dtype": dtype}) for dtype in ("int8", "bfloat16"))
    one, two = parameter_table.estimate(eight), parameter_table.estimate(half)
    assert one["frozen_params"] == two["frozen_params"]
    assert one["checkpoint_bytes"] == two["checkpoint_bytes"]
    kernels = sum(
        leaf.size for path, leaf in state.flatten(half.frozen).items() if "blocks" in path and "kernel" in path
    )
    saved = two["bytes_per_device"]["frozen"] - one["bytes_per_device"]["frozen"]
    assert 0.9 * kernels < saved < kernels  # a byte each, less the scales
    assert "int8" in parameter_table.table(eight)
    assert aot.model_flops(eight) == aot.model_flops(half)


def test_a_run_in_eight_bits_resumes_and_is_scored(tmp_path: Path) -> None:
    """Checkpoints hold bfloat16; a run that goes on from one ends where it ended before, to the bit."""
    data, folder = runs.make_data(tmp_path), tmp_path / "run"
    settings = ["--config.train.frozen_dtype=int8", "--config.data.eval_split=", "--config.train.duration=10 steps"]
    runs.run(folder, data, *settings)
    kernel = runs.saved(folder)["llm/blocks/mlp/up/kernel"]
    assert kernel.dtype == jnp.bfloat16 and len(np.unique(kernel)) > 256
    before = runs.losses(folder)
    shutil.rmtree(folder / "checkpoints" / "steps" / "10")
    runs.run(folder, data, *settings)
    assert (folder / "metrics.jsonl").read_text().count('"loss"') == 10 + 5  # five steps were taken again
    assert len(before) == 10 and runs.losses(folder) == before
    done = runs.run(folder, data, *settings[:1], "--config.data.eval_split=validation", "--mode=eval", "--examples=4")
    assert '"examples": 4' in done.stdout
