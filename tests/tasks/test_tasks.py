"""The mPLUG-video tasks from shards to scores on a tiny model: examples, losses, predictions and missing labels."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shards
from task_rows import batch_of, kept_of, rows_of
from ymplug_jax.core import exits, sharding
from ymplug_jax.core.config import Data, Experiment, Mesh, Optim, Train
from ymplug_jax.data.records import Records
from ymplug_jax.models import mplug_video
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks import names
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.common import candidates, losses, pair_losses
from ymplug_jax.tasks.mplug_video import match, retrieve
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import setup

BASE = MPLUGVideo(
    vision=TimeSformer(image_size=16, patch_size=8, depth=1, width=16, heads=2, frames=2),
    abstractor=Abstractor(queries=4, heads=2),
    llm=GPT3(vocab=300, width=32, depth=2, heads=2, max_positions=96),
)
MODELS = {
    "classify": BASE.clone(classes=45),
    "caption": BASE,
    "retrieve": BASE.clone(contrastive_width=8),
    "match": BASE.clone(classes=2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("tasks")
    shards.write(folder / "data", (9,))
    shards.write(folder / "data", (10,), split="validation", first=40)
    tokenizer = shards.tokenizer(folder / "t.model")
    return Data(
        path=str(folder / "data"), tokenizer=str(tokenizer), frames=2, image_size=16, max_tokens=40, augment=False
    )


def experiment(name: str, data: Data, **options) -> Experiment:
    return Experiment(
        task=name,
        model=MODELS[name],
        data=data,
        optim=Optim(warmup="1 steps"),
        mesh=Mesh(),
        train=Train(batch_size=4, duration="2 steps", frozen_dtype="float32"),
        options=({"prompt_tokens": 4, "new_tokens": 6, "beams": 2} if name == "caption" else {}) | options,
    )


def prepared(name: str, data: Data, **options) -> tuple[Task, dict]:
    task = task_lib.get(experiment(name, data, **options))
    return task, jax.jit(task.init)(jax.random.key(0))


@pytest.mark.parametrize("name", MODELS)
def test_examples_keep_their_spec_and_the_loss_is_finite(name: str, data: Data) -> None:
    task, params = prepared(name, data)
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(4))
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items() if key != "valid"} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in task.spec.items()
    }
    total, metrics = jax.jit(task.loss)(params, batch, jax.random.key(1))
    assert np.isfinite(total) and float(metrics["loss"].weight) > 0
    # Changing the values of an invalid row must not change the loss.
    batch["valid"][1] = False
    other = {key: value.copy() for key, value in batch.items()}
    for key in ("video", "ids", "plain"):
        if key in other:
            other[key][1] = 0
    for key in ("contrastive_loss", "generation_loss", "caption_loss"):
        if key in metrics and name != "match":  # matching draws pairs across rows
            values = [jax.jit(task.loss)(params, b, None)[1][key].value() for b in (batch, other)]
            assert values[0] == pytest.approx(values[1], rel=1e-5), key


@pytest.mark.slow
def test_classification_scores_equal_separate_forward_passes(data: Data) -> None:
    """A shared prefill with 45 branches equals 45 full rows."""
    task, params = prepared("classify", data)
    records = Records(data.path, "validation")
    batch = batch_of(task, records, None, range(2))
    found = jax.jit(task.predict)(params, batch)
    run = MODELS["classify"].bind({"params": params})
    from ymplug_jax.tasks.common import preprocess

    prefix = run.encode_video(preprocess.normalize(batch["video"], "float32"))["prefix"]
    tokenizer = preprocess.tokenizer_for(data, 300)
    from ymplug_jax.data.schema import CLASS_NAMES
    from ymplug_jax.tasks.mplug_video import classify

    for i, shown in ((0, "both"), (1, "both"), (0, "video"), (1, "title")):
        title = "" if shown == "video" else records[i].title
        pairs = [preprocess.encode_pair(tokenizer, classify.prompt_of(title, 40), name, 40) for name in CLASS_NAMES]
        ids, mask, lengths = (np.stack([p[key] for p in pairs]) for key in ("ids", "mask", "prompt_length"))
        seen = None if shown == "title" else jnp.repeat(prefix[i : i + 1], 45, axis=0)
        logits = run.logits(run.hidden(seen, ids)[:, (0 if seen is None else 4) : -1])
        each = -losses.token_losses(logits, ids[:, 1:]) * losses.target_mask(mask, lengths)
        np.testing.assert_allclose(
            found["likelihood"][i, classify.MODALITIES.index(shown)], each.sum(axis=1), rtol=2e-4, atol=2e-4
        )


def test_candidates_with_differently_truncated_prompts() -> None:
    """A longer answer truncates more of the prompt; the shared part is what all rows keep."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 50, 9).tolist()
    answers = [rng.integers(3, 50, n).tolist() for n in (1, 4, 2)]

    class Known:
        bos, eos, pad = 1, 2, 0

        def encode(self, text: str) -> list[int]:
            return prompt

    made = candidates.encode(Known(), "", answers, 12)
    assert made["shared"] == 1 + 12 - 2 - 4
    for k, answer in enumerate(answers):
        kept = min(9, 12 - 2 - len(answer))
        row = [1, *prompt[:kept], *answer, 2]
        width = len(row) - int(made["shared"])
        assert made["branches"][k, :width].tolist() == row[int(made["shared"]) :]
        assert made["branches"][k][made["targets"][k]].tolist() == [*answer, 2]


def test_classification_reports_every_modality(data: Data) -> None:
    task, params = prepared("classify", data)
    records = Records(data.path, "validation")
    report = task.score(rows_of(task, params, records), records)
    assert report.scores["labelled"] == 10
    assert {
        f"{m}/{by}_top{k}" for m in ("both", "video", "title") for by in ("likelihood", "head") for k in (1, 5)
    } <= set(report.scores)
    assert report.rows[0]["label"] == "宠物" and len(report.rows[0]["top5"]) == 5


@pytest.mark.parametrize("name", MODELS)
def test_a_task_lists_its_scores(name: str, data: Data) -> None:
    """An evaluation reports the scores of the record, in that order, and all of them are in the module's SCORES."""
    task, params = prepared(name, data)
    records = Records(data.path, "validation")
    means = jax.jit(task.loss)(params, batch_of(task, records, None, range(4)), None)[1]
    rows = rows_of(task, params, records)
    rows = task.rescore(params, rows, kept_of(task, rows)) if task.rescore else rows
    report = task.score(rows, records)
    found = [*means, *(key for key, value in report.scores.items() if isinstance(value, float))]
    assert found == [score.name for score in task.scores]
    assert set(task.scores) <= set(names.scores_of(name))
    commands = {*task.describe, *(["retrieve"] if task.embeds else []), *(["chat"] if task.chats else [])}
    assert commands == set(getattr(names.module_of(name), "ANSWERS", ()))
    assert len(task.page.line(report.rows[0])) == len(task.page.columns) > 0
    with pytest.raises(exits.Mistake, match=r"unknown score 'los'; did you mean 'loss'\?"):
        task.score_named("los")


@pytest.mark.parametrize("name", ["classify", "caption"])
def test_splits_without_labels_have_a_note(name: str, data: Data) -> None:
    task, params = prepared(name, data)
    hidden = [r._replace(label_index=-1, label_text="", captions=[]) for r in Records(data.path, "validation")]
    rows = rows_of(task, params, hidden)
    report = task.score(rows, hidden)
    assert "nothing is scored" in report.scores["note"] and report.scores["labelled"] == 0
    assert not any(isinstance(value, float) for value in report.scores.values())
    assert len(report.rows) == 10
    _, metrics = jax.jit(task.loss)(params, batch_of(task, hidden, None, range(4)), None)
    assert float(metrics["loss"].weight) == 0 and np.isfinite(float(metrics["loss"].total))


@pytest.mark.parametrize("search", ["beam", "beam_by_length", "greedy", "sample"])
def test_every_search_writes_captions(search: str, data: Data) -> None:
    task, params = prepared("caption", data, search=search)
    records = Records(data.path, "validation")
    report = task.score(rows_of(task, params, records), records)
    assert report.scores["search"] == search and report.scores["clips"] == 10
    assert {"bleu4", "meteor", "rouge_l", "cider"} <= set(report.scores)
    with pytest.raises(ValueError, match=r"config\.options\.search: unknown search 'best'; choose one of beam,"):
        prepared("caption", data, search="best")


def test_rows_of_one_clip_are_in_the_gallery_once(data: Data) -> None:
    records = [r._replace(media_id="a" if i < 3 else str(i)) for i, r in enumerate(Records(data.path, "validation"))]
    task, params = prepared("retrieve", data)
    report = task.score(rows_of(task, params, records), records)
    assert report.scores["videos"] == 8 and report.scores["texts"] == 10
    assert report.arrays["video"].shape == (8, 8) and report.arrays["text_clip"].tolist()[:4] == [0, 0, 0, 1]
    vectors, texts = report.arrays["video"], report.arrays["text"]
    scores = vectors @ texts.T
    ranks = [1 + int((scores[:, t] > scores[c, t] + 1e-6).sum()) for t, c in enumerate(report.arrays["text_clip"])]
    assert [row["t2v_rank"] for row in report.rows] == ranks


def test_several_positives_share_the_target() -> None:
    rng = np.random.default_rng(0)
    video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 5, 8)).astype(np.float32))
    ids = np.array([[1, 2], [3, 4], [1, 2], [1, 5], [3, 4]])
    total, count = losses.retrieval(video, text, jnp.float32(0.1), ids)
    scores, same = video @ text.T / 0.1, (ids[:, None] == ids[None]).all(-1)
    expected = 0.0
    for s in (scores, scores.T):
        logs = s - np.log(np.exp(s).sum(axis=1, keepdims=True))
        expected -= 0.5 * (logs * same / same.sum(axis=1, keepdims=True)).sum()
    assert count == 5 and total == pytest.approx(expected, rel=1e-5)


def test_matching_scores_all_pairs_or_the_best_of_an_index(data: Data, tmp_path: Path) -> None:
    task, params = prepared("match", data)
    records = Records(data.path, "validation")
    rows = rows_of(task, params, records)
    full = task.rescore(params, rows, kept_of(task, rows))
    cut = task.rescore(params, rows, kept_of(task, rows, devices=8, batch=8))  # each row is on one of eight devices
    for one, other in zip(full, cut, strict=True):
        for name in match.NAMES:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6)
    report = task.score(full, records)
    assert report.scores["videos"] == report.scores["texts"] == 10
    assert {"generation/t2v_r1", "head/v2t_r10", "head/r_mean"} <= set(report.scores)
    matrix = np.stack([row["head"] for row in full])
    assert np.isfinite(matrix).all() and (matrix >= 0).all() and (matrix <= 1).all()
    # One pair in a separate forward pass.
    model = MODELS["match"]
    run = model.bind({"params": params})
    prefix = rows[3]["prefix"][None]
    ids, mask = rows[5]["ids"][None], rows[5]["mask"][None]
    logits = run.logits(run.hidden(prefix, ids)[:, 4:-1])
    each = -losses.token_losses(logits, ids[:, 1:]) * losses.target_mask(mask, rows[5]["prompt_length"][None])
    assert full[3]["generation"][5] == pytest.approx(float(each.sum()), rel=1e-4)

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 10, 4)).astype(np.float32)
    np.savez(tmp_path / "index.npz", video=vectors[0], text=vectors[1])
    options = {"candidates": str(tmp_path / "index.npz"), "best": 2}
    some, _ = prepared("match", data, **options)
    few = some.rescore(params, rows, kept_of(some, rows))
    scored = np.isfinite(np.stack([row["head"] for row in few]))
    assert 20 <= scored.sum() < 100
    np.testing.assert_allclose(np.stack([row["head"] for row in few])[scored], matrix[scored], rtol=1e-4, atol=1e-6)
    assert some.score(few, records).scores["videos"] == 10
    np.savez(tmp_path / "index.npz", video=vectors[0][:3], text=vectors[1])
    with pytest.raises(ValueError, match="has 3 videos and 10 texts, this split 10 and 10"):
        some.rescore(params, rows, kept_of(some, rows))


def test_reference_negatives_restores_the_matching_pairs_of_the_reference(data: Data) -> None:
    """Another title of the same clip is labelled as a match; the reference's "negatives" are matching pairs."""
    records = [r._replace(captions=[]) for r in Records(data.path, "train")]  # the titles differ, the captions do not
    task, params = prepared("match", data)
    batch = batch_of(task, records, None, range(4))
    reference, _ = prepared("match", data, reference_negatives=True)
    rng = np.random.default_rng(0)  # at initialisation the video hardly affects the logits
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), params)
    key = jax.random.key(0)
    ours, theirs = (jax.jit(t.loss)(params, batch, key)[1] for t in (task, reference))
    assert float(ours["head_loss"].weight) == float(theirs["head_loss"].weight) == 12
    assert ours["head_loss"].value() != theirs["head_loss"].value()
    same = batch | {"clip": np.zeros_like(batch["clip"])}  # one clip: every row is a match
    other = batch | {"clip": np.arange(8, dtype=np.int32).reshape(4, 2)}
    params["head"]["out"]["bias"] += np.array([0.0, 50.0], np.float32)  # always answers yes
    shares = [jax.jit(task.loss)(params, b, key)[1]["head_accuracy"].value() for b in (same, other)]
    assert shares == [1.0, pytest.approx(1 / 3)]
    wrong = experiment("match", data)
    wrong = dataclasses.replace(wrong, train=dataclasses.replace(wrong.train, accumulate=2))
    with pytest.raises(ValueError, match="accumulate 1"):
        match.make(wrong)


@pytest.mark.parametrize("group", [2, 3, 12])
def test_negatives_come_from_the_same_group(group: int) -> None:
    videos, texts, others = match.rows(jax.random.key(0), 12 // group, group, match.Options())
    assert videos.shape == texts.shape == others.shape == (12 // group, group, 3)
    own = np.broadcast_to(np.arange(group)[:, None], videos[..., :1].shape)
    np.testing.assert_array_equal(videos[..., :1], own)  # the first pair is its own
    np.testing.assert_array_equal(
        np.sort(videos, axis=1), np.broadcast_to(own, videos.shape)
    )  # each video occurs three times
    assert np.all(videos[..., 1:] != own)
    np.testing.assert_array_equal(texts, np.broadcast_to(own, texts.shape))
    np.testing.assert_array_equal(texts, others)
    theirs, titles, _ = match.rows(jax.random.key(0), 12 // group, group, match.Options(reference_negatives=True))
    np.testing.assert_array_equal(theirs, titles)
    x = np.arange(24).reshape(12, 2)
    taken = pair_losses.take(x, videos, group).reshape(12, 3, 2)
    starts = np.arange(12) // group * group
    np.testing.assert_array_equal(taken, x[starts[:, None] + np.asarray(videos).reshape(12, 3)])


def test_matching_over_groups_is_the_sum_of_the_groups(data: Data) -> None:
    """The loss sums of a batch equal those of its groups evaluated separately."""
    task, params = prepared("match", data, group=2)
    batch = batch_of(task, Records(data.path, "train"), None, range(4))  # two rows have only one derangement
    whole, *halves = (
        jax.jit(task.loss)(params, {name: x[part] for name, x in batch.items()}, None)[1]
        for part in (slice(4), slice(2), slice(2, 4))
    )
    for name in ("generation_loss", "head_loss", "head_accuracy"):
        assert float(whole[name].weight) == sum(float(half[name].weight) for half in halves)
        assert float(whole[name].total) == pytest.approx(sum(float(half[name].total) for half in halves), rel=1e-5)


def test_pairs_do_not_depend_on_the_mesh(data: Data) -> None:
    task, params = prepared("match", data, group=4)
    batch = batch_of(task, Records(data.path, "train"), None, range(8))
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(mesh))
            whole = jax.device_put(params, sharding.replicated(mesh))
            found.append(jax.device_get(jax.jit(task.loss)(whole, placed, jax.random.key(3))[1]))
    for name, mean in found[0].items():
        assert found[1][name].value() == pytest.approx(mean.value(), rel=1e-5), name


def test_retrieval_freezes_the_abstractor(data: Data) -> None:
    run = setup.prepare(experiment("retrieve", data), jax.devices()[:1])
    assert {"abstractor", "connector", "llm"} == set(run.frozen)
    assert set(run.state.trainable) == {"vision", "vision_proj", "text_proj", "temperature"}
    assert retrieve.FROZEN[: len(mplug_video.FROZEN)] == mplug_video.FROZEN


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_equal_one(name: str, data: Data) -> None:
    """Losses and predictions of a sharded batch equal those on one device."""
    task, params = prepared(name, data)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32), params)
    records = [r._replace(captions=[]) if name == "retrieve" else r for r in Records(data.path, "validation")]
    batch = batch_of(task, records, None, range(8))
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(fsdp=devices // 2 or 1, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(mesh))
            whole = jax.device_put(params, sharding.replicated(mesh))
            loss = jax.jit(task.loss)(whole, placed, None)[0]
            found.append(jax.device_get((loss, jax.jit(task.predict)(whole, placed))))
    (one, answers), (eight, others) = found
    assert eight == pytest.approx(float(one), rel=1e-5)
    for key, value in answers.items():
        np.testing.assert_allclose(others[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_wrong_heads_are_named(data: Data) -> None:
    for name, model, message in (
        ("classify", BASE, "config.model.classes: 0 classes, but there are 45 categories; set config.model.classes=45"),
        ("match", BASE, "matching has two"),
        ("retrieve", BASE, "contrastive_width: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            task_lib.get(dataclasses.replace(experiment(name, data), model=model))
