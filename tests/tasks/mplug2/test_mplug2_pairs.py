"""Retrieval and classification with mPLUG-2 on small models: examples, both stages, teacher and queue on any mesh, accumulation."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shards
import small_mplug2
from task_rows import batch_of, kept_of, rows_of
from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean
from ymplug_jax.data.records import Record, Records
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.universal import Fusion, Universal
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.common import pair_scoring, task_metrics
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug2 import joint
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib

YOUKU, RELEASED = (model.clone(generates=False) for model in (small_mplug2.YOUKU, small_mplug2.RELEASED))
PAIRS = {"contrastive_width": 8, "matching": True}
HEADS = {"mplug2_retrieve": PAIRS, "mplug2_classify": {"classes": 45}}
TAUGHT = {"momentum": True, "queue": 16, "soft_ramp": 2}
variants = pytest.mark.parametrize("model", [YOUKU, RELEASED], ids=lambda model: model.variant)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("pairs")
    shards.write(folder / "data", (17,))
    shards.write(folder / "data", (10,), split="validation", first=40)
    tokenizer = shards.vocabulary(folder / "vocab.txt")
    return Data(
        path=str(folder / "data"), tokenizer=str(tokenizer), frames=2, image_size=16, max_tokens=12, augment=False
    )


def experiment(name: str, data: Data, model: MPLUG2 = YOUKU, train: dict | None = None, **options) -> Experiment:
    return Experiment(
        task=name,
        model=model.clone(**HEADS[name]),
        data=dataclasses.replace(data, eval_split=""),
        optim=Optim(lr=1e-2, warmup="0 steps"),
        train=Train(**{"batch_size": 8, "duration": "8 steps", "frozen_dtype": "float32"} | (train or {})),
        options=options,
    )


def prepared(name: str, data: Data, model: MPLUG2 = YOUKU, **options) -> tuple[Task, dict]:
    """The task with drawn parameters: at initialisation, videos hardly differ."""
    task, rng = task_lib.get(experiment(name, data, model, **options)), np.random.default_rng(0)
    flat = state_lib.flatten(jax.eval_shape(task.init, jax.random.key(0)))
    params = state_lib.unflatten(
        {k: rng.normal(k.endswith("scale"), 0.3, leaf.shape).astype(np.float32) for k, leaf in flat.items()}
    )
    return task, params | ({"temperature": np.float32(0.07)} if "temperature" in params else {})


@variants
@pytest.mark.parametrize("name", HEADS)
def test_examples_keep_their_spec(name: str, model: MPLUG2, data: Data) -> None:
    task = task_lib.get(experiment(name, data, model))
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items() if key != "valid"} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in task.spec.items()
    }
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert not {"decoder", "mlm"} & set(params) and ("head" in params) == (name == "mplug2_classify")
    assert "loss" in jax.eval_shape(lambda params: task.loss(params, batch, None)[1], params)


@pytest.mark.parametrize("name", HEADS)
def test_padding_does_not_count(name: str, data: Data) -> None:
    task, params = prepared(name, data)
    batch = batch_of(task, Records(data.path, "train"), np.random.default_rng(0), range(8))
    batch["valid"][3] = False
    other = {key: value.copy() for key, value in batch.items()}
    other["video"][3], other["ids"][3] = other["video"][0], other["ids"][0]
    step = jax.jit(lambda batch: task.loss(params, batch, None)[1])
    first, second = step(batch), step(other)
    assert float(first["loss"].weight) == 7
    for key in first:
        assert first[key].value() == pytest.approx(second[key].value(), rel=1e-5), key


def doubled(records: Records) -> list[Record]:
    """Ten records of nine clips: row 5 is another text of row 2's clip, and row 7 has the text of row 3."""
    found = list(records)
    found[5] = found[2]._replace(captions=["第8个视频"])
    found[7] = found[7]._replace(captions=found[3].captions)
    return found


def looped(model: MPLUG2, params: dict, rows: list[dict], videos: list[int]) -> np.ndarray:
    """Logits of every clip with every text, each pair in a pass of its own: f32[clips, texts, 2]."""

    @jax.jit
    def one(tokens: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
        def read(run: MPLUG2) -> jax.Array:
            return run.match_logits(run.fuse(states[None], mask[None], tokens[None])[1])[0]

        return within(model, params, read)

    return np.array([[np.asarray(one(rows[v]["tokens"], row["states"], row["mask"])) for row in rows] for v in videos])


@variants
def test_reranking_scores_every_pair_as_a_loop_does(model: MPLUG2, data: Data) -> None:
    task, params = prepared("mplug2_retrieve", data, model, best=0)
    records, first = doubled(Records(data.path, "validation")), [0, 1, 2, 3, 4, 6, 7, 8, 9]
    rows = rows_of(task, params, records)
    full = task.rescore(params, rows, kept_of(task, rows))
    matrix = np.stack([full[v]["match"] for v in first])
    logits = looped(model.clone(**PAIRS), params, rows, first)
    np.testing.assert_allclose(matrix, logits[..., 1] - logits[..., 0], rtol=1e-4, atol=1e-5)
    assert matrix.std(axis=0).min() > 1e-3 and matrix.std(axis=1).min() > 1e-3
    np.testing.assert_array_equal(full[5]["match"], full[2]["match"])  # one clip
    np.testing.assert_allclose(matrix[:, 3], matrix[:, 7], rtol=1e-6)  # one text

    report, right = task.score(full, records), np.array([[c == f for c in clips_of(first)] for f in range(9)])
    want = task_metrics.recalls(task_metrics.ranks_in(matrix, right), task_metrics.ranks_in(matrix.T, right.T))
    assert {key: report.scores[f"match/{key}"] for key in want} == want
    assert (report.scores["videos"], report.scores["texts"], len(report.rows)) == (9, 10, 10)
    own = full[2]["match"][[2, 5]].max()  # the better one of a clip's texts counts
    assert report.rows[2]["v2t_rank"] == 1 + int((np.delete(full[2]["match"], [2, 5]) >= own).sum())
    # An equal text of another clip is wrong, and its tie counts against the model.
    assert report.rows[3]["v2t_rank"] == 1 + int((np.delete(full[3]["match"], 3) >= full[3]["match"][3]).sum()) > 1
    assert report.rows[3]["t2v_rank"] == 1 + int((np.delete(matrix[:, 3], 3) >= matrix[3, 3]).sum())

    if model is YOUKU:
        few, _ = prepared("mplug2_retrieve", data, model, best=2, add_similarity=True)
        some = few.rescore(params, rows, kept_of(few, rows))
        found = np.stack([some[v]["match"] for v in first])
        similarity = np.stack([rows[v]["video"] for v in first]) @ np.stack([row["text"] for row in rows]).T
        scored = pair_scoring.best_of(similarity, 2)
        np.testing.assert_array_equal(scored, np.isfinite(found))
        assert 18 <= scored.sum() < 40
        np.testing.assert_allclose(found[scored], (logits[..., 1] + similarity)[scored], rtol=1e-4, atol=1e-5)


def clips_of(first: list[int]) -> list[int]:
    """Number of the clip of each of the ten texts of `doubled`."""
    return [first.index(2 if i == 5 else i) for i in range(10)]


def without_video(blocks: dict, states: jax.Array, mask: np.ndarray) -> jax.Array:
    """One layer of fusion on a text, without its cross-attention."""
    params = {"blocks": blocks, "latents": jnp.zeros((50, 16))}
    return Universal(depth=1, dropout=0.0, **small_mplug2.SIZES).apply(
        {"params": params}, states, mask, method="read_text"
    )


@variants
def test_classification_with_and_without_each_input(model: MPLUG2, data: Data) -> None:
    task, params = prepared("mplug2_classify", data, model)
    records = list(Records(data.path, "validation"))
    records[1] = records[0]._replace(title=records[1].title)  # row 0's video, another title
    records[2] = records[2]._replace(title=records[0].title)  # row 0's title, another video
    rows = rows_of(task, params, records)
    both, video, title = (np.stack([row["head"][m] for row in rows[:3]]) for m in range(3))
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    near(video[1], video[0])
    near(title[2], title[0])
    for votes, i in ((both, 1), (both, 2), (video, 2), (title, 1)):
        assert np.abs(votes[i] - votes[0]).max() > 1e-2
    assert np.abs(both[0] - video[0]).max() > 1e-2 and np.abs(both[0] - title[0]).max() > 1e-2
    # The title alone equals a fusion encoder whose layers have no cross-attention.
    one = batch_of(task, records, None, range(3))

    made = model.clone(**HEADS["mplug2_classify"])
    states = within(made, params, lambda run: run.encode_text(one["ids"], one["mask"]))
    fused = without_video(params["fusion"]["blocks"], states, one["mask"])
    near(within(made, params, lambda run: run.classify(fused)), title)
    report = task.score(rows, records)
    assert report.scores["labelled"] == 10 and report.rows[0]["label"] == "宠物"
    assert {f"{m}/head_top{k}" for m in ("both", "video", "title") for k in (1, 5)} <= set(report.scores)
    assert task.describe["classify"](rows[0], records[0], 3).json["shown"] == "video and title"


def test_a_connected_layer_reads_the_text_alone() -> None:
    fusion, rng = Fusion(depth=2, stride=1, dropout=0.0, **small_mplug2.SIZES), np.random.default_rng(0)
    states, mask = rng.normal(size=(2, 5, 16)).astype(np.float32), np.array([[1] * 5, [1, 1, 1, 0, 0]])
    params = fusion.init(jax.random.key(0), states, mask, states)["params"]
    tokens, fused = fusion.apply({"params": params}, states, mask, states[:, :0])
    assert tokens.shape == (2, 0, 16)
    x = without_video(params["blocks"], states, mask)
    x = without_video(params["blocks"] | params["connected"], x, mask)  # nothing reads its cross-attention
    np.testing.assert_allclose(fused, x, rtol=1e-5, atol=1e-6)


def placed(run: setup.Run) -> dict[str, jax.Array]:
    made = batch_of(run.task, Records(run.experiment.data.path, "train"), np.random.default_rng(0), range(8))
    made["clip"][5] = made["clip"][4]  # two rows of one clip
    rows = sharding.local_rows(8, run.mesh)
    return sharding.put_batch({key: value[rows] for key, value in made.items()}, rows, 8, run.mesh)


GROUP = 4


def tell_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training report the negatives that it draws: the eight indices below `GROUP` of each side as one number."""
    reported = joint.pair_metrics

    def with_draws(out: dict, valid: jax.Array) -> tuple:
        total, metrics = reported(out, valid)
        draws = {f"drawn_{side}": getattr(out["negatives"], side) for side in ("videos", "texts")}
        digits = GROUP ** jnp.arange(8)  # the sum is exact in float32
        return total, metrics | {name: Mean(jnp.sum(x * digits) * 1.0, jnp.float32(1)) for name, x in draws.items()}

    monkeypatch.setattr(joint, "pair_metrics", with_draws)


def stepped(run: setup.Run, steps: int) -> tuple[dict, list[tuple[float, float]]]:
    """What the run carries after some steps, and the negatives of every step."""
    now, step, told = setup.fresh_state(run)[0], step_lib.compile_step(run), []
    key, batch = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh)), placed(run)
    for _ in range(steps):
        now, metrics = step(now, {}, batch, key)
        assert metrics["skipped"].total == 0
        told.append(tuple(metrics[f"drawn_{side}"].value() for side in ("videos", "texts")))
    return jax.device_get(now.carried), told


@pytest.mark.slow
@variants
def test_negatives_teacher_and_queue_on_eight_devices(
    model: MPLUG2, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The indices that every step draws, the pointer and the clips of the queue are equal; teacher and features agree to 1e-5."""
    tell_draws(monkeypatch)
    made = experiment("mplug2_retrieve", data, model, group=GROUP, **TAUGHT)
    spread = dataclasses.replace(made, mesh=dataclasses.replace(made.mesh, data=4, fsdp=2))
    one, drawn = stepped(setup.prepare(made, jax.devices()[:1]), 3)
    many, drawn_there = stepped(setup.prepare(spread, jax.devices()), 3)
    assert drawn == drawn_there and len(set(drawn)) == 3
    assert all(0 < side < GROUP**8 for draws in drawn for side in draws)
    assert int(one["queue"]["next"]) == int(many["queue"]["next"]) == 8 and int(many["updates"]) == 3
    np.testing.assert_array_equal(one["queue"]["clip"], many["queue"]["clip"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, many)


@pytest.mark.slow
def test_accumulation_follows_its_rule(data: Data) -> None:
    """Keys of a micro-batch are its own rows and the queue; teacher and queue change once, with the rows in the order of the batch."""
    run = setup.prepare(experiment("mplug2_retrieve", data, train={"accumulate": 4}, **TAUGHT), jax.devices()[:1])
    carried, key, now = run.task.carried, jax.random.key(1), setup.fresh_state(run)[0]
    before, batch = (
        jax.device_put(jax.device_get(now)),
        jax.device_get(placed(run)),
    )  # the step takes the memory of `now`

    def loss(params: dict, part: dict, number: jax.Array) -> tuple:
        own = jax.random.fold_in(jax.random.fold_in(key, 0), number)
        value, metrics, rows = carried.loss(params, before.carried, part, own)
        return value, (metrics["loss"].weight, rows)

    def rule(grads: dict, rows: dict) -> dict:
        updates, _ = run.tx.update(grads, before.opt_state, before.trainable)
        params = jax.tree.map(lambda p, u: p - run.rate(jnp.int32(0)) * u, before.trainable, updates)
        return carried.update(params, before.carried, rows)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    parts = [{k: v[part::4] for k, v in batch.items()} for part in range(4)]
    found = [jax.device_get(gradient(before.trainable, part, i)) for i, part in enumerate(parts)]
    weights = np.array([weight for (_, (weight, _)), _ in found])
    rows = {
        name: np.stack([seen[name] for (_, (_, seen)), _ in found], axis=1).reshape(8, *value.shape[1:])
        for name, value in found[0][0][1][1].items()
    }
    grads = jax.tree.map(
        lambda *parts: sum(w * g for w, g in zip(weights, parts, strict=True)) / weights.sum(), *(g for _, g in found)
    )
    want = jax.device_get(jax.jit(rule)(grads, rows))

    after, metrics = step_lib.compile_step(run)(now, {}, placed(run), key)
    after = jax.device_get(after.carried)
    total = np.dot(weights, [value for (value, _), _ in found]) / weights.sum()
    assert metrics["loss"].value() == pytest.approx(total, rel=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after, want)
    assert after["updates"] == 1 and after["queue"]["next"] == 8
    np.testing.assert_array_equal(after["queue"]["clip"][:8], batch["clip"])
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), after["momentum"], before.carried["momentum"])
    assert max(jax.tree.leaves(moved)) > 1e-6 and set(moved) == {"vision", "text", "vision_proj", "text_proj"}


def test_settings_that_do_not_fit_are_refused(data: Data, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("猫\n狗\n", encoding="utf-8")
    named = dataclasses.replace(data, classes=str(tmp_path / "names.txt"), path="")
    cases = [
        ("mplug2_retrieve", data, {"matching": False}, {}, r"retrieval needs reads, contrastive_width and matching"),
        ("mplug2_retrieve", data, {}, {"queue": 16}, r"config\.options\.queue: holds features of a momentum teacher"),
        ("mplug2_classify", data, {"classes": 0}, {}, r"config\.model\.classes: 0 classes; set it to the .*, 45"),
        ("mplug2_classify", data, {"classes": 9}, {}, r"9 classes, but there are 45 names; set it to 45 or more"),
        ("mplug2_classify", named, {}, {}, r"45 classes, but there are 2 names in .*; set config\.model\.classes=2"),
        ("mplug2_classify", data, {"reads": False, "classes": 0}, {}, r"config\.model\.reads: classification reads"),
    ]
    for name, given, fields, options, message in cases:
        made = experiment(name, given, **options)
        with pytest.raises((Mistake, ValueError), match=message):
            task_lib.get(dataclasses.replace(made, model=made.model.clone(**fields)))
