"""State that a task carries beside its parameters, with a small task that has a teacher and a queue."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ymplug_jax.analysis import estimate
from ymplug_jax.core import checkpoint_files, sharding, state, stored_params
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean
from ymplug_jax.models import layers
from ymplug_jax.tasks.carried import Carried
from ymplug_jax.tasks.common import losses, momentum
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import parameter_table, setup
from ymplug_jax.training import step as step_lib

COEFFICIENT, QUEUE, WIDTH = 0.9, 24, 4
TEACHER = ("video/.*", "text/.*")


def embedded(params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    return tuple(layers.unit(jnp.tanh(batch[name] @ params[name]["kernel"])) for name in ("video", "text"))


def init(key: jax.Array) -> dict:
    kernels = {
        name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), (6, WIDTH))}
        for i, name in enumerate(("video", "text"))
    }
    return {**kernels, "temperature": jnp.float32(0.07)}


def begin(params: dict, key: jax.Array) -> dict:
    return {
        "momentum": momentum.teacher_of(params, TEACHER),
        "queue": momentum.empty_queue(key, QUEUE, WIDTH),
        "updates": jnp.int32(0),
    }


def loss(params: dict, carried: dict, batch: dict, key: jax.Array | None) -> tuple:
    teacher = embedded(carried["momentum"], batch)
    share = momentum.ramp(0.4, carried["updates"], 4)
    pair = momentum.contrastive(
        *embedded(params, batch), *teacher, carried["queue"], params["temperature"], share, clip=batch["clip"],
        valid=batch["valid"],
    )  # fmt: skip
    mean = Mean(pair.total, pair.weight)
    rows = {"video": teacher[0], "text": teacher[1], "clip": batch["clip"], "valid": batch["valid"]}
    return losses.ratio(mean), {"loss": mean}, rows


def alone(params: dict, batch: dict, key: jax.Array | None) -> tuple:
    video, text = embedded(params, batch)
    mean = Mean(*losses.retrieval(video, text, params["temperature"], batch["clip"], valid=batch["valid"]))
    return losses.ratio(mean), {"loss": mean}


def update(params: dict, carried: dict, rows: dict) -> dict:
    return {
        "momentum": momentum.moved(carried["momentum"], params, COEFFICIENT),
        "queue": momentum.enqueue(carried["queue"], **rows),
        "updates": carried["updates"] + 1,
    }


AXES = (("(video|text)/kernel", "embed proj"), ("temperature", ""))
CARRIED_AXES = (
    ("momentum/(video|text)/kernel", "embed proj"),
    *((f"queue/{path}", words) for path, words in momentum.QUEUE_AXES),
    ("updates", ""),
)
CARRIED = Carried(CARRIED_AXES, begin, loss, update)
FEATURES = jax.ShapeDtypeStruct((6,), jnp.float32)
TASK = Task(
    kinds=("pretrain",),
    axes=AXES,
    frozen=(),
    init=init,
    example=lambda record, rng: {},
    spec={"video": FEATURES, "text": FEATURES, "clip": jax.ShapeDtypeStruct((2,), jnp.int32)},
    loss=alone,
    carried=CARRIED,
)


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch):
    def prepared(devices: int = 1, task: Task = TASK, **changes) -> setup.Run:
        monkeypatch.setattr(setup.task_lib, "get", lambda experiment: task)
        changes["optim"] = {"no_decay": ()} | changes.get("optim", {})
        return tiny.prepare(devices, **changes)

    return prepared


def batch_of(run: setup.Run, seed: int, **changes) -> dict[str, jax.Array]:
    rng, size = np.random.default_rng(seed), run.experiment.train.batch_size
    local = {name: rng.normal(size=(size, 6)).astype(np.float32) for name in ("video", "text")}
    local |= {"clip": rng.integers(0, 50, (size, 2), dtype=np.int32), "valid": np.ones(size, bool)} | changes
    rows = sharding.local_rows(size, run.mesh)
    return sharding.put_batch({key: value[rows] for key, value in local.items()}, rows, size, run.mesh)


def trained(run: setup.Run, steps: int, now: state.TrainState | None = None) -> state.TrainState:
    """The state after `steps` more steps on batches numbered by the state's own count."""
    step = step_lib.compile_step(run)
    now = setup.fresh_state(run)[0] if now is None else now
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    for _ in range(steps):
        now, metrics = step(now, {}, batch_of(run, int(now.step)), key)
        assert metrics["skipped"].total == 0
    return now


def same(found, want) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, want)


def test_the_rule_of_a_step(prepare):
    """Teacher and queue after a step, from the parameters before and after it."""
    run = prepare()
    now = setup.fresh_state(run)[0]
    same(now.carried["momentum"], {name: now.trainable[name] for name in ("video", "text")})
    now = trained(run, 2, now)
    before, batch = jax.tree.map(np.array, now), batch_of(run, 2)
    after = trained(run, 1, now)
    for name in ("video", "text"):
        old, new = before.carried["momentum"][name]["kernel"], np.asarray(after.trainable[name]["kernel"])
        want = COEFFICIENT * old + (1 - COEFFICIENT) * new
        np.testing.assert_allclose(after.carried["momentum"][name]["kernel"], want, rtol=1e-6)
        want = before.carried["queue"][name].copy()
        want[16:] = layers.unit(jnp.tanh(batch[name] @ old))  # the third batch, by the teacher that the step began with
        np.testing.assert_allclose(after.carried["queue"][name], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.carried["queue"]["clip"][16:], batch["clip"])
    assert int(after.carried["queue"]["next"]) == 0 and int(after.carried["updates"]) == 3


@pytest.mark.parametrize("poisoned", ["loss", "rows"])
def test_a_skipped_step_leaves_it_untouched(prepare, poisoned: str):
    def bad(params: dict, carried: dict, batch: dict, key: jax.Array) -> tuple:
        value, metrics, rows = loss(params, carried, batch, key)
        if poisoned == "loss":
            return value * jnp.nan, metrics, rows
        return value, metrics, rows | {"video": rows["video"].at[3, 1].set(jnp.nan)}

    run = prepare(task=dataclasses.replace(TASK, carried=dataclasses.replace(CARRIED, loss=bad)))
    now = setup.fresh_state(run)[0]
    before = jax.tree.map(np.array, now)
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    now, metrics = step_lib.compile_step(run)(now, {}, batch_of(run, 0), key)
    assert metrics["skipped"].total == 1 and int(now.step) == 1
    same((now.trainable, now.opt_state, now.carried), (before.trainable, before.opt_state, before.carried))


def test_accumulation_follows_its_rule(prepare):
    """All micro-batches see teacher and queue as they were; the teacher moves once; rows are queued in the order of the batch."""
    run = prepare(train={"accumulate": 4})
    now = setup.fresh_state(run)[0]
    before, batch = jax.tree.map(jnp.copy, now), batch_of(run, 0)
    total, weight = 0.0, 0.0
    loss_of = jax.jit(lambda batch: loss(before.trainable, before.carried, batch, None))
    for part in range(4):
        value, metrics, _ = loss_of({k: v[part::4] for k, v in batch.items()})
        total, weight = total + value * metrics["loss"].weight, weight + metrics["loss"].weight
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    after, metrics = step_lib.compile_step(run)(now, {}, batch, key)
    np.testing.assert_allclose(metrics["loss"].value(), total / weight, rtol=1e-5)
    rows = loss_of(batch)[2]
    want = update(after.trainable, before.carried, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.carried, want)
    np.testing.assert_array_equal(after.carried["queue"]["clip"][:8], batch["clip"])


def test_eight_devices_carry_what_one_does(prepare):
    """The teacher is sharded like the parameters it follows, the queue over the axis that the rules name."""
    one = trained(prepare(), 4)
    rules = (("embed", "fsdp"), ("queue", "fsdp"))
    run = prepare(8, mesh={"data": 4, "fsdp": 2, "rules": rules})
    kernel, queue = run.state.carried["momentum"]["video"]["kernel"], run.state.carried["queue"]["video"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, WIDTH)
    assert queue.sharding.shard_shape(queue.shape) == (QUEUE // 2, WIDTH)
    many = trained(run, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), many.carried, one.carried)
    np.testing.assert_array_equal(many.carried["queue"]["next"], one.carried["queue"]["next"])


def test_it_is_saved_and_restored_bit_for_bit(prepare, tmp_path: Path):
    run = prepare()
    straight = trained(run, 5)
    half = trained(run, 3)
    with contextlib.closing(Checkpoints(str(tmp_path))) as saved:
        saved.save(half, 3, 24)
    with contextlib.closing(Checkpoints(str(tmp_path))) as opened:
        resumed, _, seen, origin = setup.initialise(run, opened)
    assert seen == 24 and set(origin) == set(state.flatten(run.state.trainable))
    same(resumed.carried, half.carried)
    end = trained(run, 2, resumed)
    same((end.trainable, end.opt_state, end.carried), (straight.trainable, straight.opt_state, straight.carried))
    # Evaluation and `init_from` read the parameters alone.
    assert set(stored_params.load_params(str(tmp_path), run.state.trainable)) == set(origin)


def test_a_step_that_does_not_fit_is_refused(prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = prepare()
    with contextlib.closing(Checkpoints(str(tmp_path))) as saved:
        saved.save(setup.fresh_state(run)[0], 1, 8)
    monkeypatch.setattr(f"{__name__}.QUEUE", 16)
    other = prepare()
    plain = prepare(task=dataclasses.replace(TASK, carried=None))
    opened = Checkpoints(str(tmp_path))
    with pytest.raises(
        checkpoint_files.CheckpointError, match=r"carried does not fit .* queue/video is \(24, 4\), wanted \(16, 4\)"
    ):
        opened.restore(other.state, 1)
    with pytest.raises(
        checkpoint_files.CheckpointError, match=r"carried does not fit .* not in the model: momentum/text/kernel"
    ):
        opened.restore(plain.state, 1)
    folder = tmp_path / "checkpoints" / "steps" / "1"
    sums = folder / "checksums" / "metadata"
    facts = json.loads(sums.read_text())
    kept = facts["carried"]["queue/video"]
    sums.write_text(json.dumps(facts).replace(kept, "float32[24,4]+0123456789abcdef"))
    with pytest.raises(
        checkpoint_files.CheckpointError, match=r"step 1: queue/video is damaged: differs from what was saved"
    ):
        opened.restore(run.state, 1)
    shutil.rmtree(folder / "carried")
    with pytest.raises(checkpoint_files.CheckpointError, match=r"step 1: .* is damaged"):
        opened.restore(run.state, 1)
    del facts["carried"]
    sums.write_text(json.dumps(facts))
    with pytest.raises(
        checkpoint_files.CheckpointError, match=r"carried does not fit the model of this config; missing: "
    ):
        opened.restore(run.state, 1)
    same(opened.restore(plain.state, 1)[0].trainable, setup.fresh_state(run)[0].trainable)


def test_the_plan_lists_it_under_keys_of_its_own(prepare):
    facts = estimate.estimate(prepare())
    assert facts["trainable_params"] == 2 * 6 * WIDTH + 1
    assert facts["carried"] == {"momentum": 48, "queue": 2 * QUEUE * WIDTH + 2 * QUEUE + 1, "updates": 1}
    assert facts["bytes_per_device"]["carried"] == 4 * sum(facts["carried"].values())
    plain = estimate.estimate(prepare(task=dataclasses.replace(TASK, carried=None)))
    assert "carried" not in plain and "carried" not in plain["bytes_per_device"]
    added = facts["checkpoint_bytes"]["each_step"] - plain["checkpoint_bytes"]["each_step"]
    assert added == facts["bytes_per_device"]["carried"]
    assert "momentum 48" in estimate.render(facts) and "carried" in parameter_table.table(prepare())


def test_eight_bits_and_short_queues_are_refused(prepare):
    with pytest.raises(Mistake, match=r"config.train.frozen_dtype: .* which int8 does not support; use bfloat16"):
        prepare(train={"frozen_dtype": "int8"})
    with pytest.raises(Mistake, match=r"config.options.queue: 4 rows are fewer than a batch; give .* = 8 or more"):
        momentum.check_queue(4, tiny.experiment().train)


def test_padding_is_not_queued():
    queue = momentum.empty_queue(jax.random.key(0), 6, 2)
    rows, clip = jnp.ones((4, 2)), jnp.full((4, 2), 7)
    full = momentum.enqueue(queue, rows, rows, clip, jnp.array([True, False, True, True]))
    np.testing.assert_array_equal(full["clip"][:, 0], [7, -100, 7, 7, -100, -100])
    np.testing.assert_array_equal(full["video"][1], queue["video"][1])
    again = momentum.enqueue(full, 2 * rows, rows, clip, jnp.ones(4, bool))  # wraps
    np.testing.assert_array_equal(again["video"][:, 0] == 2, [True, True, False, False, True, True])
    assert int(again["next"]) == 2
