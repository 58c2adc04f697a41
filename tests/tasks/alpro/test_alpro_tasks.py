"""The ALPRO tasks from shards to scores on a tiny model: examples, losses on any mesh, both stages of retrieval."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import shards
from task_rows import batch_of, kept_of, rows_of
from ymplug_jax.core import checkpoint, checkpoint_files, sharding, stored_params
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.core.metrics import read_metrics
from ymplug_jax.data import loader
from ymplug_jax.data.records import Records
from ymplug_jax.data.source import open_split
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.models.bert import Fusion, Text
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.alpro import encode_pairs, pretrain
from ymplug_jax.tasks.common import losses, pair_losses, pair_scoring, task_metrics
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import loop, mixing, setup
from ymplug_jax.training import step as step_lib

BASE = ALPRO(
    vision=TimeSformer(image_size=32, patch_size=8, depth=1, width=16, heads=2, frames=2, clip=False),
    text=Text(vocab=64, width=32, depth=1, heads=2, hidden=48, max_positions=24),
    fusion=Fusion(depth=1, heads=2, hidden=48),
    contrastive_width=8,
)
ALONE = {"contrastive_width": 0, "matching": False, "masked": False}
MODELS = {
    "alpro_pretrain": BASE.clone(entities=3, variant="salesforce"),
    "alpro_prompter": alpro.prompter_of(BASE),
    "alpro_classify": BASE.clone(**ALONE, classes=45),
    "alpro_retrieve": BASE.clone(masked=False),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("alpro")
    shards.write(folder / "data", (17,))
    shards.write(folder / "data", (10,), split="validation", first=40)
    tokenizer = shards.vocabulary(folder / "vocab.txt")
    prompts = {"entities": ["圆形", "方形", "红色"], "templates": ["{}的视频", "第0个{}"]}
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    of_images = prompts | {"templates": ["第0个{}"]}
    (folder / "images.json").write_text(json.dumps(of_images), encoding="utf-8")
    rng = np.random.default_rng(0)
    np.savez(folder / "entities.npz", entity_features=rng.normal(size=(3, 8)).astype(np.float32))
    return Data(
        path=str(folder / "data"), tokenizer=str(tokenizer), frames=2, image_size=32, max_tokens=16, augment=False
    )


def options_of(name: str, data: Data) -> dict:
    folder = Path(data.path).parent
    return {
        "alpro_pretrain": {"entities": str(folder / "entities.npz")},
        "alpro_prompter": {"prompts": str(folder / "prompts.json")},
    }.get(name, {})


def experiment(name: str, data: Data, model: ALPRO | None = None, **options) -> Experiment:
    return Experiment(
        task=name,
        model=model or MODELS[name],
        data=data,
        optim=Optim(warmup="1 steps"),
        train=Train(batch_size=8, duration="2 steps", frozen_dtype="float32"),
        options=options_of(name, data) | options,
    )


def prepared(name: str, data: Data, **options) -> tuple[Task, dict]:
    """The task with perturbed parameters: at initialisation, videos hardly differ."""
    task = task_lib.get(experiment(name, data, **options))
    params, rng = jax.jit(task.init)(jax.random.key(0)), np.random.default_rng(0)
    return task, jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("name", MODELS)
def test_examples_keep_their_spec_and_padding_is_ignored(name: str, data: Data) -> None:
    task, params = prepared(name, data)
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items() if key != "valid"} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in task.spec.items()
    }
    step = jax.jit(task.loss)
    total, found = step(params, batch, jax.random.key(1))
    assert np.isfinite(total) and float(found["loss"].weight) == 8
    batch["valid"][3] = False
    other = {key: value.copy() for key, value in batch.items()}
    other["video"][3], other["ids"][3] = 0, other["ids"][0]
    values = [step(params, b, None)[1]["loss"] for b in (batch, other)]
    assert float(values[0].weight) == 7
    assert values[0].value() == pytest.approx(values[1].value(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_equal_one(name: str, data: Data) -> None:
    """Losses, drawn negatives and gradients of a sharded batch equal those on one device."""
    group = {"group": 4} if name == "alpro_retrieve" else {}
    task, params = prepared(name, data, **group)
    batch = batch_of(task, Records(data.path, "validation"), None, range(8))
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(fsdp=devices // 2 or 1, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(mesh))
            whole = jax.device_put(params, sharding.replicated(mesh))
            step = jax.value_and_grad(lambda p, b: task.loss(p, b, jax.random.key(3)), has_aux=True)
            if name == "alpro_pretrain":  # has all losses, so compare its gradients as well
                (_, means), grads = jax.jit(step)(whole, placed)
            else:
                (_, means), grads = jax.jit(task.loss)(whole, placed, jax.random.key(3)), {}
            found.append(jax.device_get((means, grads)))
    (means, slopes), (others, other_slopes) = found
    for key, mean in means.items():
        assert others[key].value() == pytest.approx(mean.value(), rel=1e-5, abs=1e-6), key
    for path, value in state_lib.flatten(slopes).items():
        other = state_lib.flatten(other_slopes)[path]
        np.testing.assert_allclose(other, value, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=path)


def test_the_same_negatives_on_any_mesh() -> None:
    rng = np.random.default_rng(0)
    video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 16, 8)).astype(np.float32))
    free = pair_losses.allowed(jnp.ones(16, bool), None, 8)
    draws = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            place = sharding.batch_sharding(mesh)
            rows = jax.device_put(video, place), jax.device_put(text, place)
            draws.append(jax.jit(pair_losses.choose_negatives)(jax.random.key(5), *rows, jnp.float32(0.07), free))
    for one, eight in zip(*draws, strict=True):
        np.testing.assert_array_equal(one, eight)


def test_negatives_are_drawn_by_similarity_and_never_match() -> None:
    rng = np.random.default_rng(0)
    video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 6, 4)).astype(np.float32))
    clip, valid = np.array([[0], [1], [0], [2], [3], [4]]), np.array([True] * 5 + [False])
    free = pair_losses.allowed(valid, clip, 6)
    draw = jax.jit(lambda key: pair_losses.choose_negatives(key, video, text, jnp.float32(0.5), free))
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
    assert drawn.found[0].tolist() == [True] * 5 + [False]
    scores = text @ video.T / 0.5
    for b in range(5):
        weights = np.exp(scores[b]) * np.asarray(free[0, b])
        shares = np.bincount(drawn.videos[:, b], minlength=6) / 4000
        np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.03)
        assert shares[b] == shares[5] == 0
    assert not (drawn.texts[:, 0] == 2).any() and not (drawn.texts[:, 2] == 0).any()
    in_groups = pair_losses.allowed(np.ones(6, bool), None, 3)
    assert in_groups.shape == (2, 3, 3)
    np.testing.assert_array_equal(pair_losses.take(np.arange(6), np.array([1, 2, 0, 2, 0, 1]), 3), [1, 2, 0, 5, 3, 4])


def test_masking_shares_and_excluded_tokens() -> None:
    ids = np.tile(np.r_[2, 5:60, 3, [0] * 7], (200, 1))
    draws = pair_losses.draw_masking(jax.random.key(0), ids.shape, 64, 0.15)
    shown, told = pair_losses.mask_words(ids, draws, (0, 2, 3), 4)
    words = ids >= 5
    assert not (np.asarray(told) & ~words).any() and (shown[~words] == ids[~words]).all()
    assert float(told[:, 1:56].mean()) == pytest.approx(0.15, abs=0.01)
    share = float((np.asarray(shown) == 4)[np.asarray(told)].mean())
    kept = float((np.asarray(shown) == ids)[np.asarray(told)].mean())
    assert share == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)


def test_boxes_are_inside_the_image_with_the_right_area() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([encode_pairs.choose_box(224, 16, rng) for _ in range(300)])
    assert (boxes[:, :2] + boxes[:, 2:] <= 14).all() and (boxes >= [0, 0, 1, 1]).all()
    share = boxes[:, 2] * boxes[:, 3] / 196
    assert share.min() > 0.15 and share.max() <= 0.5
    inside = pair_losses.inside_of(jnp.asarray(boxes), 14)
    np.testing.assert_array_equal(inside.sum(axis=(1, 2)), boxes[:, 2] * boxes[:, 3])
    top, left, height, width = boxes[0]
    assert inside[0, top : top + height, left : left + width].all()


def test_rows_with_an_uncertain_teacher_are_excluded() -> None:
    targets = jnp.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.15, 0.7, 0.15]])
    many = jnp.full((1, 10), 0.1)
    logits, valid = jnp.zeros((3, 3)), jnp.ones(3, bool)
    assert pair_losses.entity(logits, targets, valid) == (pytest.approx(3 * np.log(3)), 3)
    assert pair_losses.entity(jnp.zeros((1, 10)), many, jnp.ones(1, bool)) == (0, 0)
    assert pair_losses.entity(logits, targets, valid, reference_rule=True)[1] == 2  # the row of entity 0


def test_the_teacher_is_frozen_and_its_entities_come_from_the_file(data: Data, tmp_path: Path) -> None:
    run = setup.prepare(experiment("alpro_pretrain", data), jax.devices()[:1])
    assert set(run.frozen) == {"prompter"} and "prompter" not in run.state.trainable
    params, _ = setup.fresh_params(run)
    stored = np.load(Path(data.path).parent / "entities.npz")["entity_features"]
    np.testing.assert_array_equal(params["prompter"]["entities"], stored)
    with pytest.raises(ValueError, match=r"config\.options\.entities: empty"):
        task_lib.get(experiment("alpro_pretrain", data, entities=""))
    np.savez(tmp_path / "other.npz", entity_features=stored[:2])
    with pytest.raises(ValueError, match=r"has 2 entities of width 8; config\.model\.entities is 3"):
        task_lib.get(experiment("alpro_pretrain", data, entities=str(tmp_path / "other.npz")))
    np.savez(tmp_path / "index.npz", video=stored)
    with pytest.raises(ValueError, match="has no entity_features"):
        task_lib.get(experiment("alpro_pretrain", data, entities=str(tmp_path / "index.npz")))


@pytest.fixture(scope="module")
def stills(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Pre-training on a folder of images and one of clips, each drawn with probability 1/2."""
    home = tmp_path_factory.mktemp("stills")
    images = [shards.example(i, frames=1) for i in range(300, 311)]
    shards.write_talks(home / "images", images)
    shards.call(home / "images", "pretrain")
    tables = {
        f"{kind}entity_features": np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
        for seed, kind in enumerate(("", "image_"))
    }
    np.savez(home / "entities.npz", **tables)
    mixed = dataclasses.replace(data, path=f"{home / 'images'},{data.path}", weights=(1.0, 1.0))
    made = experiment(
        "alpro_pretrain", mixed, MODELS["alpro_pretrain"].clone(stills=True), entities=str(home / "entities.npz")
    )
    return dataclasses.replace(made, train=dataclasses.replace(made.train, duration="8 steps"))


def test_a_batch_holds_still_images_or_clips_with_the_drawn_shares(stills: Experiment, tmp_path: Path) -> None:
    run = setup.prepare(stills, jax.devices()[:1])
    begun = mixing.begin(run.mixture, epath.Path(tmp_path), 0)
    assert begun and run.examples == 28 and run.steps_per_epoch == 3
    records = open_split(stills.data.path, "train")

    def batches(start: int, count: int) -> list[dict[str, np.ndarray]]:
        stream = loader.batches(
            records, run.task.example, seed=stills.train.seed, batch_size=8, rows=range(8), start=start, shuffle=True, threads=2,
            order=begun.plan.order(begun.changes),
        )  # fmt: skip
        found = [next(stream) for _ in range(count)]
        stream.close()
        assert {key: (value.shape[1:], value.dtype) for key, value in found[0].items() if key != "valid"} == {
            key: (leaf.shape, leaf.dtype) for key, leaf in run.task.spec.items()
        }
        for batch in found:
            same = (batch["video"] == batch["video"][:, :1]).reshape(8, -1).all(axis=1)
            np.testing.assert_array_equal(same, batch["still"])
        return found

    whole = batches(0, 8)
    kinds = np.stack([batch["still"] for batch in whole])
    assert (kinds == kinds[:, :1]).all() and 0 < kinds[:, 0].sum() < 8
    for batch, again in zip(whole[5:], batches(5 * 8, 3), strict=True):
        assert all((batch[key] == again[key]).all() for key in batch)
    drawn = np.array([begun.order(8 * b)[0] < 11 for b in range(2000)])
    np.testing.assert_array_equal(drawn[:8], kinds[:, 0])
    assert drawn.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_a_run_on_still_images_and_clips_resumes_bit_for_bit(
    stills: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)  # a step for one device compiles in a fraction of the time
    saving = dataclasses.replace(stills.train, duration="6 steps", save_every="3 steps", log_every="1 steps")
    made = dataclasses.replace(stills, train=saving, data=dataclasses.replace(stills.data, eval_split=""))
    loop.train(made, epath.Path(tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "steps" / "6")
    loop.train(made, epath.Path(tmp_path / "resumed"))
    lines = [read_metrics(tmp_path / name) for name in ("straight", "resumed")]
    want, got = ([(line["step"], line["loss"], line["entity_loss"]) for line in one] for one in lines)
    assert got == want and [step for step, *_ in want] == [1, 2, 3, 4, 5, 6]
    run = setup.prepare(made)
    trained = [stored_params.load_params(str(tmp_path / name), run.state.trainable) for name in ("straight", "resumed")]
    assert all(
        np.asarray(leaf).tobytes() == np.asarray(trained[1][path]).tobytes() for path, leaf in trained[0].items()
    )


def test_still_images_have_entities_of_their_own(stills: Experiment, data: Data, tmp_path: Path) -> None:
    task = task_lib.get(stills)
    params = jax.jit(task.init)(jax.random.key(0))
    stored = np.load(stills.options["entities"])
    np.testing.assert_array_equal(params["prompter"]["entities"], stored["entity_features"])
    np.testing.assert_array_equal(params["prompter"]["image_entities"], stored["image_entity_features"])
    augmented = dataclasses.replace(stills, data=dataclasses.replace(stills.data, augment=True))
    image = open_split(stills.data.path, "train")[0]
    videos = [task_lib.get(augmented).one(image, np.random.default_rng(seed))["video"] for seed in range(4)]
    assert all((video == video[:1]).all() for video in videos) and (videos[0] != videos[1]).any()
    with pytest.raises(
        ValueError, match=r"has no image_entity_features; give the index\.npz .* config\.options\.image_prompts"
    ):
        task_lib.get(experiment("alpro_pretrain", data, MODELS["alpro_pretrain"].clone(stills=True)))
    with pytest.raises(ValueError, match=r"config\.model\.stills: needs config\.model\.entities"):
        task_lib.get(experiment("alpro_pretrain", data, BASE.clone(stills=True)))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"entities": ["蓝色"], "templates": ["{}的照片"]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json: its entities are not those of"):
        task_lib.get(experiment("alpro_prompter", data, image_prompts=str(other)))


def test_the_teacher_sees_only_the_region(data: Data) -> None:
    task, params = prepared("alpro_pretrain", data)
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(2))
    box = np.array([[1, 0, 2, 3]] * 2, np.int32)
    model = MODELS["alpro_pretrain"]
    found = pretrain.teach(model, params["prompter"], batch["video"], box)
    outside = batch["video"].copy()
    outside[:, :, :8] = 255
    np.testing.assert_array_equal(pretrain.teach(model, params["prompter"], outside, box), found)
    outside[:, :, 8:] = 255
    assert not np.allclose(pretrain.teach(model, params["prompter"], outside, box), found)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_the_prompter_writes_a_table_of_entities(data: Data) -> None:
    images = str(Path(data.path).parent / "images.json")
    task, params = prepared("alpro_prompter", data, image_prompts=images)
    records = Records(data.path, "validation")
    report = task.score(task.rescore(params, rows := rows_of(task, params, records), kept_of(task, rows)), records)
    assert report.arrays["entity"].tolist() == ["圆形", "方形", "红色"] and report.scores["entities"] == 3
    table, run = report.arrays["entity_features"], MODELS["alpro_prompter"].bind({"params": params})
    tokenizer = encode_pairs.tokenizer_of(data, BASE)
    units = []
    for prompt in ("方形的视频", "第0个方形"):
        row = encode_pairs.encode(tokenizer, prompt, 10, BASE)
        units.append(run.embed_text(run.encode_text(row["ids"][None], row["mask"][None]))[0])
    np.testing.assert_allclose(table[1], np.mean(units, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(report.arrays["image_entity_features"][1], units[1], rtol=1e-5, atol=1e-6)
    assert "v2t_r1" in report.scores


def test_retrieval_matches_all_pairs_or_the_best(data: Data) -> None:
    task, params = prepared("alpro_retrieve", data, best=0)
    records = Records(data.path, "validation")
    rows = rows_of(task, params, records)
    full = task.rescore(params, rows, kept_of(task, rows))
    matrix = np.stack([row["match"] for row in full])
    assert matrix.shape == (10, 10) and np.isfinite(matrix).all()
    run = MODELS["alpro_retrieve"].bind({"params": params})  # one pair in a separate forward pass
    pair = run.fuse(rows[7]["states"][None], rows[7]["mask"][None], rows[2]["tokens"][None])
    logits = run.match_logits(pair)[0]
    assert matrix[2, 7] == pytest.approx(float(logits[1] - logits[0]), rel=1e-4, abs=1e-5)
    report = task.score(full, records)
    right = np.eye(10, dtype=bool)
    expected = task_metrics.recalls(task_metrics.ranks_in(matrix, right), task_metrics.ranks_in(matrix.T, right))
    assert {key: report.scores[f"match/{key}"] for key in expected} == expected
    assert {"t2v_r1", "v2t_r10", "r_mean"} <= set(report.scores) and report.arrays["video"].shape == (10, 8)
    row = report.rows[4]
    assert row["t2v_rank"] == 1 + int((matrix[:, 4] > matrix[4, 4]).sum()) and "similarity_rank" in row

    few, _ = prepared("alpro_retrieve", data, best=2)
    some = np.stack([r["match"] for r in few.rescore(params, rows, kept_of(few, rows))])
    scored = np.isfinite(some)
    assert 20 <= scored.sum() < 100
    np.testing.assert_allclose(some[scored], matrix[scored], rtol=1e-4, atol=1e-5)
    similarity = np.stack([r["video"] for r in rows]) @ np.stack([r["text"] for r in rows]).T
    np.testing.assert_array_equal(scored, pair_scoring.best_of(similarity, 2))
    assert few.score(few.rescore(params, rows, kept_of(few, rows)), records).scores["videos"] == 10


def test_classification_by_the_head(data: Data) -> None:
    task, params = prepared("alpro_classify", data)
    records = Records(data.path, "validation")
    report = task.score(rows_of(task, params, records), records)
    assert report.scores["labelled"] == 10
    assert {f"{m}/head_top{k}" for m in ("both", "video", "title") for k in (1, 5)} <= set(report.scores)
    assert not any("likelihood" in key for key in report.scores)
    assert report.rows[0]["label"] == "宠物" and len(report.rows[0]["top5"]) == 5
    assert len({tuple(row["head"][m]) for row in rows_of(task, params, records)[:1] for m in range(3)}) == 3


def test_questions_are_answered_from_a_list(data: Data, tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("猫\n宠物\n狗\n", encoding="utf-8")
    model = BASE.clone(**ALONE, classes=8, variant="salesforce")
    settings = experiment("alpro_classify", data, model, answers=str(tmp_path / "answers.txt"))
    task = task_lib.get(settings)
    params = jax.jit(task.init)(jax.random.key(0))
    assert params["head"]["hidden"]["kernel"].shape == (32, 64)
    records = [r._replace(label_text="鱼" if i < 4 else "宠物") for i, r in enumerate(Records(data.path, "validation"))]
    rows = rows_of(task, params, records)
    assert [int(row["label"]) for row in rows] == [-1] * 4 + [1] * 6
    for row in rows:
        row["head"] = np.eye(3, dtype=np.float32)[[1, 1, 0]]  # correct, correct, wrong
    scores = task.score(rows, records).scores
    assert (scores["labelled"], scores["unlisted"]) == (10, 4)  # unlisted answers count as missed
    assert (scores["both/head_top1"], scores["title/head_top1"]) == (60, 0)
    (tmp_path / "answers.txt").write_text("猫\n猫\n", encoding="utf-8")
    with pytest.raises(ValueError, match="answer '猫' repeats line 1"):
        task_lib.get(settings)
    with pytest.raises(ValueError, match=r"config\.options\.answers nowhere\.txt: no such file"):
        task_lib.get(experiment("alpro_classify", data, model, answers="nowhere.txt"))


def test_the_temperature_stays_within_its_limits(data: Data) -> None:
    """The train step clips it when the gradient moves it out."""
    run = setup.prepare(experiment("alpro_retrieve", data), jax.devices()[:1])
    params, _ = setup.fresh_params(run)
    batch = batch_of(run.task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    for start, wanted in ((0.0012, 0.001), (0.499, 0.5), (0.07, None)):
        params["temperature"] = jnp.float32(start)
        state = state_lib.TrainState(jnp.int32(1), params, run.tx.init(params))
        grow = jnp.where(start < 0.01, 1.0, -1.0)  # the sign of the gradient
        task = dataclasses.replace(
            run.task, loss=lambda p, b, k, g=grow: (g * p["temperature"], {"loss": run.task.loss(p, b, k)[1]["loss"]})
        )
        step = jax.jit(step_lib.make_train_step(task, run.tx, lambda step: 0.01))
        after = float(step(state, {}, batch, jax.random.key(0))[0].trainable["temperature"])
        assert after == pytest.approx(wanted) if wanted else 0.05 < after < 0.09
    assert float(losses.bounded(jnp.float32(0.73), *alpro.TEMPERATURE)) == 0.5
    assert float(jax.grad(lambda t: losses.bounded(t, *alpro.TEMPERATURE))(0.73)) == 1


def test_init_from_can_load_a_run_into_a_subtree(data: Data, tmp_path: Path) -> None:
    """`init_from=prompter:=RUN` loads "text" of a prompter run as "prompter/text"."""
    run = setup.prepare(experiment("alpro_prompter", data), jax.devices()[:1])
    params, _ = setup.fresh_params(run)
    params = jax.tree.map(lambda leaf: leaf + 1, params)
    saved = checkpoint.Checkpoints(str(tmp_path / "prompter"), keep=1)
    saved.save_frozen({})
    saved.save(state_lib.TrainState(jnp.int32(3), params, run.tx.init(params)), 3, 24)
    saved.close()
    settings = experiment("alpro_pretrain", data)
    vectors = np.load(settings.options["entities"])["entity_features"]
    origin = checkpoint_files.fingerprint(str(tmp_path / "prompter"))  # of the run that these vectors are from
    np.savez(tmp_path / "entities.npz", entity_features=vectors, fingerprint=origin)
    settings = dataclasses.replace(settings, options={"entities": str(tmp_path / "entities.npz")})
    more = dataclasses.replace(settings.train, init_from=f"prompter:={tmp_path / 'prompter'}")
    found, origin = setup.fresh_params(setup.prepare(dataclasses.replace(settings, train=more), jax.devices()[:1]))
    entities = found["prompter"].pop("entities")
    assert entities.any() and origin["prompter/entities"] == "fresh" and origin["text/token_embed"] == "fresh"
    for path, value in state_lib.flatten(params).items():
        np.testing.assert_array_equal(state_lib.flatten(found["prompter"])[path], value)
    with pytest.raises(
        checkpoint_files.CheckpointError, match="no parameter below 'prompter/' fits the subtree 'prompter'"
    ):
        setup.fresh_params(
            setup.prepare(
                dataclasses.replace(
                    settings, train=dataclasses.replace(more, init_from=f"prompter={tmp_path / 'prompter'}")
                ),
                jax.devices()[:1],
            )
        )


def test_temporal_attention_can_start_from_spatial_attention(data: Data, tmp_path: Path) -> None:
    """`NAME:STORED=DIR` loads one subtree under another name and nothing else of the folder."""
    settings = experiment("alpro_retrieve", data)
    run = setup.prepare(settings, jax.devices()[:1])
    params, _ = setup.fresh_params(run)
    saved = checkpoint.Checkpoints(str(tmp_path / "first"), keep=1)
    saved.save_frozen({})
    saved.save(state_lib.TrainState(jnp.int32(3), params, run.tx.init(params)), 3, 24)
    saved.close()

    def start(names: str) -> tuple[dict, dict[str, str]]:
        more = dataclasses.replace(settings.train, init_from=f"{names}={tmp_path / 'first'}", seed=7)
        return setup.fresh_params(setup.prepare(dataclasses.replace(settings, train=more), jax.devices()[:1]))

    found, origin = start("vision/blocks/temporal_attn:vision/blocks/attn")
    jax.tree.map(
        np.testing.assert_array_equal,
        found["vision"]["blocks"]["temporal_attn"],
        params["vision"]["blocks"]["attn"],
    )
    assert {path for path, name in origin.items() if name == "first"} == {
        path for path in origin if path.startswith("vision/blocks/temporal_attn/")
    }
    with pytest.raises(
        checkpoint_files.CheckpointError, match="no parameter below 'vision/blocks/atn/' fits the subtree"
    ):
        start("vision/blocks/temporal_attn:vision/blocks/atn")


def test_errors_name_the_setting(data: Data) -> None:
    def make(name: str, model: ALPRO, **changes) -> None:
        task_lib.get(dataclasses.replace(experiment(name, data, model), **changes))

    for name, model, message in (
        ("alpro_pretrain", BASE.clone(masked=False), "needs contrastive_width, matching and masked"),
        ("alpro_retrieve", BASE.clone(contrastive_width=0), "needs contrastive_width and matching"),
        ("alpro_classify", BASE, "config.model.classes: 0 classes"),
        ("alpro_classify", BASE.clone(classes=44), "config.model.classes: 44 classes, but there are 45 names"),
        ("alpro_prompter", BASE, "contrastive heads only"),
        (
            "alpro_retrieve",
            BASE.clone(variant="other"),
            "config.model.variant: unknown variant 'other'; choose one of youku, salesforce",
        ),
        ("alpro_retrieve", BASE.clone(text=BASE.text.clone(max_positions=8)), "max_positions 8"),
        ("alpro_retrieve", BASE.clone(text=BASE.text.clone(vocab=8)), "raise config.model.text.vocab"),
    ):
        with pytest.raises(ValueError, match=message):
            make(name, model)
    with pytest.raises(
        ValueError, match=r"config\.options\.group: 3 does not fit a micro-batch of 8 rows; give a divisor"
    ):
        make("alpro_retrieve", BASE, options={"group": 3})
    sentencepiece = shards.tokenizer(Path(data.path).parent / "t.model")
    with pytest.raises(ValueError, match=r"has no \[MASK\]"):
        make("alpro_retrieve", BASE, data=dataclasses.replace(data, tokenizer=str(sentencepiece)))
    with pytest.raises(ValueError, match="unknown vision tower 'h14'; choose one of b16, clip_b16"):
        alpro.sized("h14")


def test_parameter_counts_are_those_of_the_releases() -> None:
    def count(model: ALPRO) -> int:
        return state_lib.count(jax.eval_shape(lambda key: alpro.init(model, key), jax.random.key(0)))

    assert count(alpro.sized("b16")) == 223_922_827
    assert count(alpro.sized("clip_b16")) == 223_923_595
    assert count(alpro.sized("clip_l14")) == 532_610_187
    assert count(alpro.sized("b16", frames=4, **ALONE, classes=45)) == 224_152_757 - 613_256  # minus the unused head


def test_partition_rules_match_all_parameters() -> None:
    models = alpro.sized("clip_l14", entities=10, classes=45), alpro.sized("b16", entities=10)
    trees = (jax.eval_shape(lambda key, m=model: alpro.init(m, key), jax.random.key(0)) for model in models)
    paths = {path for tree in trees for path in state_lib.flatten(tree)}
    for path in paths:
        sharding.axis_words(path, alpro.AXES)
    unused = {pattern for pattern, _ in alpro.AXES if not any(re.fullmatch(pattern, path) for path in paths)}
    # The rules of the prompter cover all parts, but it has only two encoders.
    assert all(re.match(r"prompter/(fusion|mlm|match|\(head\|entity\))", pattern) for pattern in unused), unused
