"""A run folder in a bucket: its name stays gs:// in every library. Here fsspec maps the bucket to a local folder."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorboardX
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from ymplug_jax.core import checkpoint, checkpoint_files, config, metrics
from ymplug_jax.reports import curves
from ymplug_jax.tasks.task import Report
from ymplug_jax.training import evaluation_files, run_folder, setup


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local folder behind gs://bucket. As in a real bucket, objects are written as a whole and cannot be appended to."""

    class Bucket(LocalFileSystem):
        cachable = False

        @classmethod
        def _strip_protocol(cls, path) -> str:
            text = str(path)
            assert text.startswith(("gs://bucket", str(tmp_path))), f"{text} is not in the bucket"
            return text.replace("gs://bucket", str(tmp_path / "bucket")).rstrip("/")

        def _open(self, path, mode="rb", **options):
            assert "a" not in mode, f"{path}: objects cannot be appended to"
            Path(self._strip_protocol(path)).parent.mkdir(parents=True, exist_ok=True)
            return super()._open(path, mode)

    monkeypatch.setenv("EPATH_USE_TF", "0")
    monkeypatch.setitem(_registry, "gcs", Bucket)
    gpath._is_tf_installed.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    (tmp_path / "bucket").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "bucket"
    assert not (tmp_path / "gs:").exists(), "a library took gs: for a local folder"
    gpath._is_tf_installed.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


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


def test_checkpoints_of_a_bucket(bucket: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(ocp, "CheckpointManager", lambda folder, options: seen.append(folder))
    checkpoints = checkpoint.Checkpoints("gs://bucket/run")
    assert str(checkpoints.folder) == "gs://bucket/run/checkpoints" and not seen, (
        "nothing is created before the first save"
    )
    assert checkpoints._manager is None
    assert str(seen[0]) == "gs://bucket/run/checkpoints/steps"
    assert checkpoint_files.latest_step("gs://bucket/run") is None
    (bucket / "run" / "checkpoints" / "steps" / "7" / "trainable").mkdir(parents=True)
    assert checkpoint_files.latest_step("gs://bucket/run") is None, "a step is complete when Orbax says so"
    (bucket / "run" / "checkpoints" / "steps" / "7" / "commit_success.txt").write_text("")
    assert checkpoint_files.latest_step("gs://bucket/run") == 7
    assert [str(place) for place in checkpoint_files.places("gs://bucket/run")] == [
        "gs://bucket/run/checkpoints/steps/7/trainable"
    ]
    with pytest.raises(checkpoint_files.CheckpointError, match="gs://bucket/other: no checkpoint here"):
        checkpoint_files.fingerprint("gs://bucket/other")


def test_metrics_of_a_bucket(bucket: Path, monkeypatch: pytest.MonkeyPatch):
    class Board:
        def __init__(self, folder: str):
            assert folder == "gs://bucket/run/tensorboard"

        def add_scalar(self, *_): ...
        def close(self): ...

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Board)
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
    assert (bucket / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_settings_and_scores_of_a_bucket(bucket: Path, tmp_path: Path):
    (tmp_path / "t.model").write_bytes(b"tokens")
    experiment = config.Experiment("pretrain", {}, config.Data(tokenizer=str(tmp_path / "t.model")))
    ((_, one), (_, two)) = setup.seeds(experiment, checkpoint_files.folder_of("gs://bucket/run"), 2)
    assert str(one) == f"gs://bucket/run/seed_{experiment.train.seed}" and str(two).startswith("gs://bucket/run/seed_")
    one.mkdir(parents=True, exist_ok=True)
    run_folder.write(experiment, one)
    run_folder.write(experiment, one)
    folder = bucket / "run" / one.name
    assert json.loads((folder / "config.json").read_text())["task"] == "pretrain"
    assert (folder / "environment.json").exists() and (folder / "tokenizer" / "t.model").read_bytes() == b"tokens"
    evaluation_files.write(one / "eval" / "test", {"R@1": 0.5}, Report({}, [{"a": "圆形"}], {"x": np.arange(3)}))
    assert isinstance(one, epath.Path) and json.loads((folder / "eval" / "test" / "scores.json").read_text()) == {
        "R@1": 0.5
    }
    assert np.load(folder / "eval" / "test" / "index.npz")["x"].tolist() == [0, 1, 2]
