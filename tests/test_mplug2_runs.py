"""mPLUG-2 from the command line: a run with a teacher and a queue is killed and resumes bit for bit."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
import shards
from ymplug_jax.core import config
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.state import TrainState
from ymplug_jax.training import setup

pytestmark = pytest.mark.slow

STEPS, SAVE, BATCH, QUEUE = 15, 5, 8, 32
TEXT = ("text", "fusion", "decoder")
SMALL = [
    "--config.model.vision.image_size=16", "--config.model.vision.patch_size=8", "--config.model.vision.depth=1",
    "--config.model.vision.width=16", "--config.model.vision.heads=2", "--config.model.vision.frames=2",
    *(f"--config.model.{part}.{name}={value}" for part in TEXT for name, value in (
        ("depth", 1), ("width", 16), ("heads", 2), ("hidden", 24))),
    "--config.model.contrastive_width=8", "--config.data.frames=2", "--config.data.image_size=16",
    "--config.data.max_tokens=12", f"--config.train.batch_size={BATCH}", "--config.train.log_every=1",
    f"--config.train.duration={STEPS} steps", f"--config.train.save_every={SAVE} steps", "--config.data.eval_split=",
    "--config.optim.warmup=2 steps", f"--config.options.queue={QUEUE}", "--config.options.group=4",
    "--config.options.soft_ramp=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """The command of a run, without its folder."""
    home = tmp_path_factory.mktemp("mplug2")
    shards.write(home / "data", (13, 8))
    shards.vocabulary(home / "vocab.txt")
    base = [sys.executable, "-m", "ymplug_jax.main", "--config=configs/tiny/mplug2_pretrain.py", "--mode=train"]
    return [*base, f"--config.data.path={home / 'data'}", f"--config.data.tokenizer={home / 'vocab.txt'}", *SMALL]


def started(flags: Sequence[str], workdir: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*flags, f"--workdir={workdir}"], cwd=runs.ROOT, env=runs.environment(), **pipes)


def finished(process: subprocess.Popen) -> None:
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors


def state_of(workdir: Path) -> TrainState:
    """The whole state that a run saved last, with teacher and queue."""
    experiment = config.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    run = setup.prepare(experiment, jax.devices()[:1])
    return jax.device_get(Checkpoints(str(workdir)).restore(run.state, STEPS)[0])


def test_a_killed_run_resumes_teacher_and_queue_bit_for_bit(flags: Sequence[str], tmp_path: Path) -> None:
    """SIGKILL comes during or just after the save of the second checkpoint; both runs end with the same bits."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process, steps = started(flags, killed), killed / "checkpoints" / "steps"
    deadline = time.monotonic() + 600
    while not any(path.name.startswith(str(2 * SAVE)) for path in steps.glob("*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (steps / str(STEPS)).exists(), "the run finished before the kill"
    before = runs.losses(killed)
    copy = shutil.copytree(killed, tmp_path / "resumed")
    finished(started(flags, copy))
    finished(started(flags, straight))

    want, got = runs.losses(straight), runs.losses(copy)
    assert got == want and sorted(want) == list(range(1, STEPS + 1))
    assert set(before) < set(want) and all(want[step] == loss for step, loss in before.items())
    end, resumed = state_of(straight), state_of(copy)
    assert jax.tree.structure(end) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, end)
    queue = end.carried["queue"]
    assert int(queue["next"]) == STEPS * BATCH % QUEUE > 0 and (queue["clip"] != -100).all()
    assert int(end.carried["updates"]) == STEPS
    vision = jax.tree.leaves(end.carried["momentum"]["vision"]), jax.tree.leaves(end.trainable["vision"])
    assert max(np.abs(a - b).max() for a, b in zip(*vision, strict=True)) > 1e-5  # the teacher lags
