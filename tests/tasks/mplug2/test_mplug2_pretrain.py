"""Pre-training of mPLUG-2 on small models: examples, teacher and queue on any mesh, resume, and settings that are refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import shards
from task_rows import batch_of
from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Records
from ymplug_jax.models import mplug2
from ymplug_jax.models.bert import Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.models.universal import Fusion, Universal
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.common import pair_losses, preprocess
from ymplug_jax.tasks.mplug2 import inputs, joint
from ymplug_jax.training import loop, setup
from ymplug_jax.training import step as step_lib

SIZES = {"width": 16, "heads": 2, "hidden": 24}
SMALL = {"vocab": 64, "depth": 1, "max_positions": 24, "dropout": 0.0, **SIZES}
YOUKU = MPLUG2(
    vision=TimeSformer(image_size=16, patch_size=8, depth=1, width=16, heads=2, frames=2),
    text=Text(**SMALL),
    fusion=Fusion(depth=1, dropout=0.0, **SIZES),
    decoder=Decoder(**SMALL),
    contrastive_width=8,
    matching=True,
    masked=True,
    variant="mplug_youku",
)
RELEASED = YOUKU.clone(
    vision=VideoClipViT(image_size=16, patch_size=8, depth=1, width=16, heads=2, mlp=32),
    universal=Universal(queries=4, dropout=0.0, **SIZES),
    variant="mplug2",
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
    settings = {"batch_size": 8, "duration": "4 steps", "save_every": "2 steps", "frozen_dtype": "float32"}
    return Experiment(
        task="mplug2_pretrain",
        model=model,
        data=dataclasses.replace(data, eval_split=""),
        optim=Optim(lr=1e-2, warmup="0 steps"),
        train=Train(**settings | (train or {})),
        options=options,
    )


def perturbed(params: dict) -> dict:
    """At initialisation, videos hardly differ."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("model", [YOUKU, RELEASED], ids=lambda model: model.variant)
def test_examples_keep_their_spec_and_padding_does_not_count(model: MPLUG2, data: Data):
    task = task_lib.get(experiment(data, model, instruction="视频" if model is RELEASED else ""))
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items() if key != "valid"} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in task.spec.items()
    }
    params = perturbed(jax.jit(task.init)(jax.random.key(0)))
    batch["valid"][3] = False
    other = {key: value.copy() for key, value in batch.items()}
    for name in ("video", "ids", "mask", "prefix", "target", "clip"):
        other[name][3] = other[name][0]
    step = jax.jit(lambda batch: task.loss(params, batch, None)[1])
    first, second = step(batch), step(other)
    assert float(first["loss"].weight) == 7 and {"prefix_loss", "masked_loss", "matching_loss"} < set(first)
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


def test_negatives_teacher_and_queue_on_one_and_eight_devices(data: Data):
    """Indices of the negatives and the place in the queue are equal, the teacher and the queue within rounding."""
    found = []
    for devices, mesh in ((1, {}), (8, {"data": 4, "fsdp": 2})):
        made = experiment(data, **TAUGHT)
        run = setup.prepare(
            dataclasses.replace(made, mesh=dataclasses.replace(made.mesh, **mesh)), jax.devices()[:devices]
        )
        batch = batch_of(run.task, Records(data.path, "train"), np.random.default_rng(0), range(8))
        rows = sharding.local_rows(8, run.mesh)
        batch = sharding.put_batch({key: value[rows] for key, value in batch.items()}, rows, 8, run.mesh)
        now, _, _ = setup.fresh_state(run)
        key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))

        def drawn(params: dict, carried: dict, batch: dict, model: MPLUG2 = run.task and YOUKU) -> tuple:
            video = preprocess.normalize(batch["video"], "float32")
            seen = model.apply(
                {"params": joint.completed(carried["momentum"], params)}, video, batch, method=joint.taught
            )
            out = model.apply(
                {"params": params},
                video,
                batch,
                seen,
                carried["queue"],
                0.4,
                key=jax.random.key(7),
                group=8,
                method=joint.forward,
            )
            return out["negatives"]

        with run.tracing():
            negatives = jax.device_get(jax.jit(drawn)(now.trainable, now.carried, batch))
        step = step_lib.compile_step(run)
        for _ in range(3):
            now, metrics = step(now, {}, batch, key)
        assert metrics["skipped"].total == 0
        found.append((negatives, jax.device_get(now.carried)))
    (one, carried), (eight, other) = found
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    np.testing.assert_array_equal(carried["queue"]["next"], other["queue"]["next"])
    np.testing.assert_array_equal(carried["queue"]["clip"], other["queue"]["clip"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carried, other)


def test_a_run_learns_and_resumes_bit_for_bit(data: Data, tmp_path: Path):
    """A run of four steps equals one that stops after two and continues, teacher and queue included."""
    made = experiment(data, **TAUGHT)
    straight, halved = epath.Path(tmp_path / "straight"), epath.Path(tmp_path / "halved")
    loop.train(made, straight)
    cut = dataclasses.replace(
        made,
        train=dataclasses.replace(made.train, duration="2 steps"),
        optim=dataclasses.replace(made.optim, schedule="linear", min_lr=1e-2),
    )
    whole = dataclasses.replace(cut, train=made.train)
    loop.train(whole, epath.Path(tmp_path / "constant"))
    loop.train(cut, halved)
    loop.train(whole, halved)
    run = setup.prepare(whole)
    ends = [
        Checkpoints(str(folder)).restore(run.state, 4)[0] for folder in (tmp_path / "constant", tmp_path / "halved")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *ends)
    carried = ends[0].carried
    assert int(carried["updates"]) == 4 and int(carried["queue"]["next"]) == 0
    for path, leaf in state_lib.flatten(carried["momentum"]).items():
        assert np.isfinite(leaf).all(), path


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
