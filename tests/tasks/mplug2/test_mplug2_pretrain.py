"""Pre-training of mPLUG-2 on small models: examples, teacher and queue on any mesh, resume, and settings that are refused."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shards
import small_mplug2
from task_rows import batch_of
from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Records
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.common import pair_losses, preprocess
from ymplug_jax.tasks.mplug2 import inputs
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib

YOUKU, RELEASED = (
    model.clone(contrastive_width=8, matching=True, masked=True)
    for model in (small_mplug2.YOUKU, small_mplug2.RELEASED)
)
TAUGHT = {"momentum": True, "queue": 16, "soft_ramp": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("mplug2")
    shards.write(folder / "data", (17,))
    tokenizer = shards.vocabulary(folder / "vocab.txt")
    return Data(
        path=str(folder / "data"), tokenizer=str(tokenizer), frames=2, image_size=16, max_tokens=12, augment=False
    )


def experiment(data: Data, model: MPLUG2 = YOUKU, train: dict | None = None, **options) -> Experiment:
    settings = {"batch_size": 8, "duration": "8 steps", "frozen_dtype": "float32"}
    return Experiment(
        task="mplug2_pretrain",
        model=model,
        data=dataclasses.replace(data, eval_split=""),
        optim=Optim(lr=1e-2, warmup="0 steps"),
        train=Train(**settings | (train or {})),
        options=options,
    )


def batch_on(run: setup.Run) -> dict[str, jax.Array]:
    made = batch_of(run.task, Records(run.experiment.data.path, "train"), np.random.default_rng(0), range(8))
    rows = sharding.local_rows(8, run.mesh)
    return sharding.put_batch({key: value[rows] for key, value in made.items()}, rows, 8, run.mesh)


@pytest.mark.parametrize("model", [YOUKU, RELEASED], ids=lambda model: model.variant)
def test_examples_keep_their_spec(model: MPLUG2, data: Data):
    task = task_lib.get(experiment(data, model, instruction="视频" if model is RELEASED else ""))
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items() if key != "valid"} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in task.spec.items()
    }
    losses = {"contrastive_loss", "matching_loss", "masked_loss", "prefix_loss", "loss"}
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert losses < set(jax.eval_shape(lambda params: task.loss(params, batch, None)[1], params))


def test_padding_does_not_count(data: Data):
    task = task_lib.get(experiment(data))
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), jax.eval_shape(task.init, jax.random.key(0))
    )
    params["temperature"] = np.float32(0.07)
    batch["valid"][3] = False
    other = {key: value.copy() for key, value in batch.items()}
    for name in ("video", "ids", "mask", "prefix", "target", "clip"):
        other[name][3] = other[name][0]
    step = jax.jit(lambda batch: task.loss(params, batch, None)[1])
    first, second = step(batch), step(other)
    assert float(first["loss"].weight) == 7
    for name in first:
        assert first[name].value() == pytest.approx(second[name].value(), rel=1e-5), name


def test_titles_are_cut_between_tokens(data: Data):
    known = preprocess.given(inputs.tokenizer_of(data, YOUKU))
    words, seen = [20, 21, 22], set()
    for seed in range(40):
        row = inputs.continuation(known, words, 12, np.random.default_rng(seed), "")
        before, after = int(row["prefix_mask"].sum()), int(row["target_mask"].sum())
        assert row["prefix"][:before].tolist() == [known.bos, *words[: before - 1]]
        assert row["target"][:after].tolist() == [known.bos, *words[before - 1 :], known.eos]
        seen.add(before - 1)
    assert seen == {0, 1, 2}
    order = known.encode("红色")
    rows = [inputs.continuation(known, words, 12, np.random.default_rng(seed), "红色") for seed in range(40)]
    told = [row["prefix"][1 : 1 + len(order)].tolist() == order for row in rows]
    assert 10 < sum(told) < 30
    assert all(
        row["target"][: len(words) + 2].tolist() == [known.bos, *words, known.eos]
        for row, is_told in zip(rows, told, strict=True)
        if is_told
    )


@pytest.fixture(scope="module")
def one(data: Data) -> tuple[setup.Run, step_lib.Step]:
    run = setup.prepare(experiment(data, **TAUGHT), jax.devices()[:1])
    return run, step_lib.compile_step(run)


def stepped(run: setup.Run, step: step_lib.Step, count: int, now: state_lib.TrainState | None = None):
    """The state after `count` more steps, and the losses."""
    batch, losses = batch_on(run), []
    now = setup.fresh_state(run)[0] if now is None else now
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    for _ in range(count):
        now, metrics = step(now, {}, batch, key)
        assert metrics["skipped"].total == 0
        losses.append(metrics["loss"].value())
    return now, losses


@pytest.mark.slow
def test_a_run_resumes_teacher_and_queue_bit_for_bit(one, tmp_path: Path):
    run, step = one
    straight, losses = stepped(run, step, 8)
    assert losses[-1] < 0.9 * losses[0]
    half, _ = stepped(run, step, 3)
    with contextlib.closing(Checkpoints(str(tmp_path))) as saved:
        saved.save(half, 3, 24)
    resumed, _ = Checkpoints(str(tmp_path)).restore(run.state, 3)
    end, again = stepped(run, step, 5, resumed)
    assert again == losses[3:]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), end, straight)
    moved = [np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(end.carried["momentum"])]
    assert np.isfinite(moved).all() and int(end.carried["updates"]) == 8 and int(end.carried["queue"]["next"]) == 0
    assert set(end.carried["momentum"]) == {"vision", "text", "vision_proj", "text_proj", "fusion", "mlm"}


@pytest.mark.slow
def test_teacher_and_queue_on_eight_devices(one, data: Data):
    """A wrong negative on any device would change the loss by far more than rounding."""
    made = experiment(data, **TAUGHT)
    run = setup.prepare(dataclasses.replace(made, mesh=dataclasses.replace(made.mesh, data=4, fsdp=2)), jax.devices())
    (now, losses), (other, spread) = stepped(*one, 3), stepped(run, step_lib.compile_step(run), 3)
    np.testing.assert_allclose(spread, losses, rtol=1e-4)
    carried, far = jax.device_get((now.carried, other.carried))
    np.testing.assert_array_equal(carried["queue"]["next"], far["queue"]["next"])
    np.testing.assert_array_equal(carried["queue"]["clip"], far["queue"]["clip"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carried, far)


def test_negatives_from_the_teachers_keys_are_equal_on_any_mesh():
    rng = np.random.default_rng(0)
    to_video, to_text = rng.normal(size=(2, 16, 16)).astype(np.float32)
    clip = np.arange(16)[:, None] // 2  # pairs of rows of one clip
    draws = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = jax.device_put((to_video, to_text), sharding.batch_sharding(mesh))
            free = pair_losses.allowed(jnp.ones(16, bool), clip, 8)
            draws.append(jax.device_get(jax.jit(pair_losses.choose_among)(jax.random.key(5), *placed, free)))
    jax.tree.map(np.testing.assert_array_equal, *draws)
    videos = draws[0].videos + np.repeat([0, 8], 8)  # numbers within the group -> rows
    assert (clip[videos] != clip).all()
    # With one far likelier row in each group, all others draw it.
    to_video[:, [3, 12]] = 90
    drawn = pair_losses.choose_among(jax.random.key(5), to_video, to_text, free)
    assert (np.delete(drawn.videos, [2, 3, 12, 13]) == np.delete(np.repeat([3, 4], 8), [2, 3, 12, 13])).all()


def test_settings_that_do_not_fit_are_refused(data: Data):
    cases = [
        (
            {"queue": 16},
            YOUKU,
            r"config\.options\.queue: holds features of a momentum teacher; set config\.options\.momentum=True",
        ),
        ({"momentum": True, "queue": 4}, YOUKU, r"config\.options\.queue: 4 rows are fewer than a batch"),
        ({}, YOUKU.clone(masked=False), r"config\.model: pre-training needs contrastive_width, matching, masked"),
        ({}, YOUKU.clone(variant="mplug2"), r"config\.model\.variant: 'mplug2' has a VideoClipViT as video encoder"),
        (
            {},
            RELEASED.clone(vision=RELEASED.vision.clone(image_size=32)),
            r"config\.data\.image_size: 16 px, but .* is 32",
        ),
    ]
    for options, model, message in cases:
        with pytest.raises(Mistake, match=message):
            task_lib.get(experiment(data, model, **options))
