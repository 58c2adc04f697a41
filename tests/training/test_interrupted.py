"""A run of two processes of which one is killed or stopped: the other one exits in time, and the run resumes bit for bit."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import runs
import shards
from together import Group, finished, steps
from ymplug_jax.training import hosts

pytestmark = pytest.mark.slow

STEPS, SAVE = 24, 6


def same_bytes(a: Path, b: Path) -> None:
    assert runs.losses(a) == runs.losses(b) and sorted(runs.losses(a)) == list(range(1, STEPS + 1))
    want, got = runs.saved(a), runs.saved(b)
    assert want.keys() == got.keys() and all(want[path].tobytes() == got[path].tobytes() for path in want)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "t.txt").write_text("\n".join(shards.title(i) for i in range(400)), encoding="utf-8")
    shards.tokenizer(folder / "t.model")
    return folder


@pytest.fixture(scope="module")
def flags(place: Path) -> list[str]:
    """Flags of the language model, the fastest one to compile."""
    return [
        "--config=configs/tiny/language.py",
        f"--config.data.path={place / 't.txt'}",
        f"--config.data.tokenizer={place / 't.model'}",
        "--config.model.llm.vocab=64",
        "--config.model.llm.width=32",
        "--config.model.llm.depth=2",
        "--config.data.max_tokens=12",
        "--config.train.batch_size=8",
        "--config.train.log_every=1",
        "--config.optim.warmup=2 steps",
        f"--config.train.duration={STEPS} steps",
        f"--config.train.save_every={SAVE} steps",
        "--config.mesh.fsdp=2",
    ]


@pytest.fixture(scope="module")
def two(place: Path, flags: list[str]) -> Group:
    return finished(Group(place / "two", flags, 2))


@pytest.fixture(scope="module")
def killed(place: Path, flags: list[str]) -> Path:
    """A run whose second process is killed after a checkpoint; the first one must log the loss and exit."""
    group = Group(place / "killed", flags, 2, pause=0.3)
    group.wait_for_step(SAVE + 2)
    group.processes[1].kill()
    begin = time.monotonic()
    (code, errors), _ = group.end(60)  # seconds; detection takes less than one, the rest is slack for a busy machine
    print(f"the other process ended {time.monotonic() - begin:.1f} s after the kill")
    assert code == hosts.LOST and "error: process 1 (" in errors and "is lost" in errors, errors[-4000:]
    assert max(steps(group.workdir)) < STEPS
    return group.workdir


def copied(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.parent / name))


def test_a_killed_run_resumes_exactly(two: Group, killed: Path, flags: list[str]):
    group = finished(Group(copied(killed, "killed_two"), flags, 2))
    same_bytes(group.workdir, two.workdir)


def test_a_killed_run_resumes_with_another_number_of_processes(two: Group, killed: Path, flags: list[str]):
    group = finished(Group(copied(killed, "killed_one"), flags, 1, devices=2))
    want, got = runs.losses(two.workdir), runs.losses(group.workdir)
    assert sorted(got) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([got[step] for step in want], [want[step] for step in want], rtol=1e-4)


@pytest.mark.parametrize("receivers", [[1], [0, 1]], ids=["one", "all"])
def test_sigterm_makes_all_save_the_same_step(two: Group, place: Path, flags: list[str], receivers: list[int]):
    flags = [*flags, f"--config.train.save_every={SAVE + 1} steps"]
    group = Group(place / f"stopped{len(receivers)}", flags, 2, pause=0.3)
    group.wait_for_step(SAVE + 2)
    for i in receivers:
        os.kill(group.processes[i].pid, signal.SIGTERM)
    ended = group.end()
    assert [code for code, _ in ended] == [0, 0], ended
    step = max(runs.losses(group.workdir))
    assert SAVE + 2 <= step < STEPS and max(steps(group.workdir)) == step
    assert f"stop requested: saving step {step}" in ended[0][1]
    progress = group.workdir / "checkpoints" / "steps" / str(step) / "progress" / "metadata"
    assert json.loads(progress.read_text()) == {"step": step, "examples_seen": 8 * step}
    same_bytes(finished(Group(group.workdir, flags, 2)).workdir, two.workdir)
