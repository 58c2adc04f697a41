"""A run folder in a bucket: its name stays gs:// in every library."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import buckets
from ymplug_jax.core import checkpoint, checkpoint_files, config, index_file, metrics
from ymplug_jax.reports import curves
from ymplug_jax.tasks.task import Report
from ymplug_jax.training import evaluation_files, run_folder, setup


@pytest.fixture(scope="module")
def server():
    with buckets.served("bucket") as found:
        yield found


@pytest.fixture
def bucket(server: buckets.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> buckets.Server:
    """A server with an empty gs://bucket."""
    monkeypatch.chdir(tmp_path)
    yield server
    for name in server.names("bucket"):
        server.delete("bucket", name)
    assert not (tmp_path / "gs:").exists(), "a library took gs: for a local folder"


def test_names_of_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.chdir(tmp_path)
    for name, folder, whole in (
        ("gs://bucket/a/b", "gs://bucket/a/b", "gs://bucket/a/b"),
        ("file:///x/y", "/x/y", "/x/y"),
        ("~/x", "/home/a/x", "/home/a/x"),
        ("runs/x", "runs/x", f"{tmp_path}/runs/x"),
    ):
        assert str(checkpoint_files.folder_of(name)) == folder and str(checkpoint_files.whole(name)) == whole
        assert str(checkpoint_files.whole(str(checkpoint_files.folder_of(name)))) == whole


def test_checkpoints_of_a_bucket(bucket: buckets.Server, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(ocp, "CheckpointManager", lambda folder, options: seen.append(folder))
    checkpoints = checkpoint.Checkpoints("gs://bucket/run")
    assert str(checkpoints.folder) == "gs://bucket/run/checkpoints" and not seen, (
        "nothing is created before the first save"
    )
    assert checkpoints._manager is None
    assert str(seen[0]) == "gs://bucket/run/checkpoints/steps"
    assert checkpoint_files.latest_step("gs://bucket/run") is None
    bucket.put("bucket", "run/checkpoints/steps/7/trainable/_METADATA", b"{}")
    assert checkpoint_files.latest_step("gs://bucket/run") is None, "a step is complete when Orbax says so"
    bucket.put("bucket", "run/checkpoints/steps/7/commit_success.txt", b"")
    assert checkpoint_files.latest_step("gs://bucket/run") == 7
    assert [str(place) for place in checkpoint_files.places("gs://bucket/run")] == [
        "gs://bucket/run/checkpoints/steps/7/trainable"
    ]
    with pytest.raises(checkpoint_files.CheckpointError, match="gs://bucket/other: no checkpoint here"):
        checkpoint_files.fingerprint("gs://bucket/other")


def test_metrics_of_a_bucket(bucket: buckets.Server):
    workdir = checkpoint_files.folder_of("gs://bucket/run")
    first = metrics.Writer(workdir, active=True)
    first.write(1, {"loss": 2.0})
    first.write(2, {"loss": 1.5})
    first.flush()
    first.write(3, {"loss": 9.0})  # killed here, after the checkpoint: this line must be dropped
    assert [line["step"] for line in metrics.read_metrics(workdir)] == [1, 2]
    second = metrics.Writer(workdir, active=True)
    second.write(3, {"loss": 1.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in metrics.read_metrics(workdir)] == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert str(curves.draw_curve(workdir)) == "gs://bucket/run/loss.png"
    assert bucket.get("bucket", "run/loss.png").startswith(b"\x89PNG")
    boards = [name for name in bucket.names("bucket") if name.startswith("run/tensorboard/events")]
    assert boards and all(len(bucket.get("bucket", name)) > 60 for name in boards)


def test_settings_and_scores_of_a_bucket(bucket: buckets.Server, tmp_path: Path):
    (tmp_path / "t.model").write_bytes(b"tokens")
    experiment = config.Experiment("pretrain", {}, config.Data(tokenizer=str(tmp_path / "t.model")))
    ((_, one), (_, two)) = setup.seeds(experiment, checkpoint_files.folder_of("gs://bucket/run"), 2)
    assert str(one) == f"gs://bucket/run/seed_{experiment.train.seed}" and str(two).startswith("gs://bucket/run/seed_")
    one.mkdir(parents=True, exist_ok=True)
    run_folder.write(experiment, one)
    run_folder.write(experiment, one)
    folder = bucket.get_folder("bucket", f"run/{one.name}", tmp_path / "copy")
    assert json.loads((folder / "config.json").read_text())["task"] == "pretrain"
    assert (folder / "environment.json").exists() and (folder / "tokenizer" / "t.model").read_bytes() == b"tokens"
    evaluation_files.write(one / "eval" / "test", {"R@1": 0.5}, Report({}, [{"a": "圆形"}], {"x": np.arange(3)}))
    folder = bucket.get_folder("bucket", f"run/{one.name}", tmp_path / "copy")
    assert isinstance(one, epath.Path) and json.loads((folder / "eval" / "test" / "scores.json").read_text()) == {
        "R@1": 0.5
    }
    assert np.load(folder / "eval" / "test" / "index.npz")["x"].tolist() == [0, 1, 2]
    assert index_file.read(one / "eval" / "test" / "index.npz", ("x",), setting="--index")["x"].tolist() == [0, 1, 2]


def test_a_line_torn_by_a_kill_does_not_swallow_the_next_one(tmp_path: Path):
    workdir = checkpoint_files.folder_of(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    writer = metrics.Writer(workdir, active=True)
    writer.write(2, {"loss": 1.5})
    writer.close()
    assert [(line["step"], line["loss"]) for line in metrics.read_metrics(workdir)] == [(1, 2.0), (2, 1.5)]
    metrics.Writer(workdir, active=True).close()
    assert len((tmp_path / "metrics.jsonl").read_text().split("\n")) == 4  # no empty line after a whole one
