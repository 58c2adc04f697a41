"""The files and errors of an evaluation, with a task of a few lines in place of a model."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import shards
from ymplug_jax.core import exits, sharding
from ymplug_jax.core.config import Data, Experiment, Train
from ymplug_jax.core.metrics import Mean
from ymplug_jax.data.records import Records
from ymplug_jax.models import kernels
from ymplug_jax.tasks import kept_rows
from ymplug_jax.tasks.presentation import Page
from ymplug_jax.tasks.task import Report
from ymplug_jax.training import evaluate
from ymplug_jax.training.setup import Run

SHARDS = (10,)


def number_of(record) -> np.ndarray:
    return np.float32(record.media_id.removeprefix("videos/").removesuffix(".mp4"))


def run_of(path: Path, loss=None, score=None, **more) -> Run:
    """Return a run whose examples are numbers: predictions are the numbers, the loss is their mean."""

    def mean(params, batch, key):
        count = jnp.sum(batch["valid"], dtype=jnp.float32)
        return 0.0, {"loss": Mean(jnp.sum(jnp.where(batch["valid"], batch["x"], 0)), count)}

    fields = {
        "example": lambda record, rng: {"x": number_of(record)},
        "loss": loss or mean,
        "predict": lambda params, batch: {"y": batch["x"] * params["w"], "valid": batch["valid"]},
        "rescore": None,
        "kept": (),
        "views": None,
        "score": score or (lambda rows, records: Report({"sum": float(sum(row["y"] for row in rows))}, [])),
        "scores": (),
        "page": Page(),
    }
    task = SimpleNamespace(**fields | more)
    experiment = Experiment(
        task="numbers",
        model={},
        data=Data(path=str(path), threads=1),
        train=Train(batch_size=4, frozen_dtype="float32"),
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Run(experiment, task, mesh, (), None, None, 0, 0, 0, None, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation split with the videos 0 to 9."""
    return shards.write(tmp_path_factory.mktemp("numbers"), SHARDS, split="validation")


def scores_of(
    run: SimpleNamespace, workdir: Path, monkeypatch: pytest.MonkeyPatch, weight: float = 1.0, **options
) -> dict:
    monkeypatch.setattr(evaluate.setup, "prepare", lambda experiment, training: run)
    monkeypatch.setattr(evaluate, "load", lambda run, workdir: {"w": jnp.float32(weight)})
    return evaluate.evaluate(run.experiment, epath.Path(workdir), **options)


def nan_where(wanted: float):
    """Return a loss whose second metric is NaN in the batch that contains the example `wanted`."""

    def loss(params, batch, key):
        bad = jnp.any(batch["valid"] & (batch["x"] == wanted))
        return 0.0, {
            "loss": Mean(jnp.float32(1), jnp.float32(1)),
            "other_loss": Mean(jnp.where(bad, jnp.nan, 1.0), jnp.float32(1)),
        }

    return loss


def test_metrics_without_examples_are_omitted(folder: Path, tmp_path: Path, monkeypatch) -> None:
    none = Mean(jnp.float32(0), jnp.float32(0))
    loss = lambda params, batch, key: (0.0, {"loss": none, "words": none, "rows": Mean(jnp.float32(6), jnp.float32(4))})  # noqa: E731
    report = Report({"note": "this split has no labels"}, [])
    run = run_of(folder, loss, lambda rows, records: report)
    scores = scores_of(run, tmp_path, monkeypatch)
    assert scores["rows"] == 1.5 and "loss" not in scores and "words" not in scores
    assert scores["note"] == "this split has no labels; no example of this split counts for loss, words"
    text = (tmp_path / "eval" / "validation" / "scores.json").read_text(encoding="utf-8")
    assert "null" not in text and "NaN" not in text and json.loads(text)["note"] == scores["note"]
    assert evaluate.losses(run, evaluate.make_loss_step(run), Records(str(folder), "validation"), {}, {}) == {
        "rows": 1.5
    }


def test_all_examples_count_once(folder: Path, tmp_path: Path, monkeypatch) -> None:
    scores = scores_of(run_of(folder), tmp_path, monkeypatch)
    assert (scores["examples"], scores["loss"], scores["sum"]) == (10, 4.5, 45) and "note" not in scores
    scores = scores_of(run_of(folder), tmp_path, monkeypatch, examples=1)
    assert (scores["examples"], scores["loss"], scores["sum"]) == (1, 0, 0)
    with pytest.raises(exits.Mistake, match=r"^--examples: -1 is negative; give 1 or more, or 0 for the whole split$"):
        scores_of(run_of(folder), tmp_path, monkeypatch, examples=-1)


def test_a_loss_that_is_not_finite_names_its_batch(folder: Path, tmp_path: Path, monkeypatch) -> None:
    run = run_of(folder, nan_where(6))
    message = r"videos/4.mp4: other_loss is nan in the batch that starts with this example \(examples 4 to 7 of split 'validation'\)"
    with pytest.raises(exits.Mistake, match=message):
        scores_of(run, tmp_path, monkeypatch)
    with pytest.raises(exits.Mistake, match=message):
        evaluate.losses(run, evaluate.make_loss_step(run), Records(str(folder), "validation"), {}, {})
    assert not (tmp_path / "eval").exists()


def test_a_prediction_that_is_not_finite_names_its_example(folder: Path, tmp_path: Path, monkeypatch) -> None:
    # 0 * inf is NaN; 2 * 3e38 overflows float32.
    for weight, index, found in ((np.inf, 0, "nan"), (3e38, 2, "inf")):
        with pytest.raises(
            exits.Mistake, match=rf"videos/{index}.mp4 \(example {index} of the split\): .*'y' is {found}"
        ):
            scores_of(run_of(folder), tmp_path, monkeypatch, weight)
    assert not (tmp_path / "eval").exists()


def test_kept_predictions_stay_on_the_devices_and_must_be_finite(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The large prediction of row i is [i, i, i]; rescoring gathers its rows 7, 0 and 9 from the devices."""

    def predict(params, batch):
        return {"large": jnp.stack([batch["x"] * params["w"]] * 3, axis=1).astype("bfloat16"), "valid": batch["valid"]}

    def rescore(params, rows, kept):
        assert set(rows[0]) == {"index"} and kept.arrays["large"].shape == (3, 4, 3)
        wanted = jnp.array([[7, 0], [9, 9]])
        found = jax.jit(lambda table: kept_rows.take(table, wanted, kept.mesh))(kept.arrays["large"])
        return [row | {"y": np.asarray(found, np.float32)} for row in rows]

    score = lambda rows, records: Report({}, [{"index": 0, "y": rows[0]["y"].tolist()}])  # noqa: E731
    run = run_of(folder, score=score, predict=predict, rescore=rescore, kept=("large",))
    run = dataclasses.replace(run, mesh=sharding.make_mesh(fsdp=4, devices=jax.devices()[:4]))
    scores_of(run, tmp_path / "run", monkeypatch)
    (line,) = (tmp_path / "run" / "eval" / "validation" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["y"] == [[[7.0] * 3, [0.0] * 3], [[9.0] * 3] * 2]
    with pytest.raises(
        exits.Mistake, match=r"videos/0.mp4 \(example 0 of the split\): the model's 'large' is nan, in 4 of 4"
    ):
        scores_of(run, tmp_path / "bad", monkeypatch, np.inf)
    assert not (tmp_path / "bad" / "eval").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_written_that_is_not_finite(folder: Path, tmp_path: Path, monkeypatch, bad: float) -> None:
    for report, message in (
        (Report({"cider": bad}, []), f"the score 'cider' is {bad}"),
        (Report({}, [{"index": 3, "top5": {"猫": bad}}]), r"videos/3.mp4 \(example 3 of the split\): 'top5' is"),
        (Report({}, [{"index": 7, "similarity": [0.0, np.float32(bad)]}]), r"videos/7.mp4 .*: 'similarity' is"),
    ):
        with pytest.raises(exits.Mistake, match=message):
            scores_of(run_of(folder, score=lambda rows, records, r=report: r), tmp_path, monkeypatch)
    assert not (tmp_path / "eval").exists()


def test_an_empty_split_is_refused(tmp_path: Path, monkeypatch) -> None:
    empty = shards.write(tmp_path / "data", (0,), split="validation")
    with pytest.raises(ValueError, match="split 'validation' has no records"):
        scores_of(run_of(empty), tmp_path, monkeypatch)
    assert not (tmp_path / "eval").exists()


def test_kernels_that_differ_are_turned_off_in_an_evaluation(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The comparison traces the predictions once; the kernels that it turns off stay off in later passes."""
    traced, told = [], []

    def predict(params, batch):
        traced.append(kernels.uses("tpu_rows"))
        return {"y": batch["x"], "valid": batch["valid"]}

    def check(run: Run, trace: Callable[[Run], object] | None = None) -> Run:
        if trace is None:  # the check of the training step
            return run
        trace(run)
        told.append(len(traced))
        return dataclasses.replace(run, kernels_off=frozenset(kernels.KERNELS))

    monkeypatch.setattr(sharding, "computes_on", lambda name: True)
    monkeypatch.setattr(evaluate.step_lib, "with_checked_kernels", check)
    run = run_of(folder, predict=predict)
    scorer, records = evaluate.Scorer(run), Records(str(folder), "validation")
    for _ in range(2):
        scores, _ = scorer.score(records, {"w": jnp.float32(1)}, {}, 0, 1)
        assert scores["examples"] == 10
    assert told == [1] and traced == [True, False], "compared once, then compiled once without them"
