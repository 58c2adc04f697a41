"""A killed run resumes bit for bit on the same mesh; on another mesh it resumes with the same data."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import runs

pytestmark = pytest.mark.slow

END = "--config.train.duration=20 steps"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    runs.run(workdir, data, END)
    return workdir


@pytest.fixture(scope="module")
def killed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed with SIGKILL during or just after the save of step 10, before step 20."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = runs.start(workdir, data, END)
    steps = workdir / "checkpoints" / "steps"
    deadline = time.monotonic() + 240
    while not any(path.name.startswith("10") for path in steps.glob("*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (steps / "20").exists(), "the run finished before the kill"
    return workdir


def resume(source: Path, target: Path, data: list[str], *more: str, devices: int = 1) -> Path:
    shutil.copytree(source, target)
    runs.run(target, data, END, *more, devices=devices)
    return target


def test_kill_and_resume_is_exact(straight: Path, killed: Path, data: list[str], tmp_path: Path):
    end = resume(killed, tmp_path / "run", data)
    want, got = runs.losses(straight), runs.losses(end)
    assert sorted(want) == list(range(1, 21)) and got == want
    want, got = runs.saved(straight), runs.saved(end)
    assert want.keys() == got.keys()
    assert all(want[path].tobytes() == got[path].tobytes() for path in want)


def test_an_incomplete_checkpoint_is_ignored_and_removed(straight: Path, data: list[str], tmp_path: Path):
    """A kill during a save leaves the temporary folder of a newer step with half its files."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    steps = workdir / "checkpoints" / "steps"
    half = steps / "20.orbax-checkpoint-tmp-7"
    (steps / "20").rename(half)
    shutil.rmtree(half / "opt_state")
    runs.run(workdir, data, END)
    assert not half.exists()
    want, got = runs.saved(straight), runs.saved(workdir)
    assert all(want[path].tobytes() == got[path].tobytes() for path in want)


@pytest.mark.parametrize("mesh", [["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]])
def test_resume_on_another_mesh(straight: Path, killed: Path, data: list[str], tmp_path: Path, mesh: list[str]):
    end = resume(killed, tmp_path / "run", data, *mesh, devices=8)
    want, got = runs.losses(straight), runs.losses(end)
    np.testing.assert_allclose([got[step] for step in range(11, 21)], [want[step] for step in range(11, 21)], rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(straight: Path, data: list[str], tmp_path: Path, number: int):
    workdir = tmp_path / "run"
    process = runs.start(
        workdir,
        data,
        "--config.train.duration=4000 steps",
        "--config.train.save_every=4000 steps",
        "--config.optim.schedule=linear",
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    (step,) = (int(path.name) for path in (workdir / "checkpoints" / "steps").iterdir())
    assert 5 <= step < 4000
    progress = json.loads((workdir / "checkpoints" / "steps" / str(step) / "progress" / "metadata").read_text())
    assert progress == {"step": step, "examples_seen": 8 * step}
    assert (workdir / "loss.png").stat().st_size > 1000


def test_frozen_is_saved_once_and_steps_hold_none_of_it(straight: Path):
    checkpoints = straight / "checkpoints"
    assert (checkpoints / "frozen").is_dir()
    stored = {path.name for path in (checkpoints / "steps" / "20").iterdir()}
    assert {"trainable", "opt_state", "progress"} <= stored
    assert not any("llm" in path.name for path in (checkpoints / "steps" / "20").rglob("*"))


def test_a_run_that_stays_non_finite_stops(data: list[str], tmp_path: Path):
    done = runs.run(tmp_path / "run", data, END, "--config.optim.lr=1e38", "--config.train.max_bad_steps=3", code=2)
    assert "was not finite in 3 consecutive steps" in done.stderr and "Traceback" not in done.stderr


def test_checkpoint_of_another_model_is_refused(straight: Path, data: list[str], tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    done = runs.run(workdir, data, END, "--config.model.abstractor.queries=5", code=2)
    assert "config.model.abstractor.queries 4 -> 5" in done.stderr and "Traceback" not in done.stderr
    # Without config.json, the comparison of shapes finds the difference.
    (workdir / "config.json").unlink()
    done = runs.run(workdir, data, END, "--config.model.abstractor.queries=5", code=2)
    assert "abstractor/queries is (4, 16), wanted (5, 16)" in done.stderr and "Traceback" not in done.stderr
    del before[workdir / "config.json"]
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
