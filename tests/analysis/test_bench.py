"""`--mode bench`: its JSON line, and that it runs without the packages that read data, text and checkpoints."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from etils import epath

import runs
import tiny
from ymplug_jax.analysis import bench as bench_lib
from ymplug_jax.core.exits import Mistake
from ymplug_jax.training import setup, step

MISSING = (
    "grain tensorflow_datasets tensorflow apache_beam cv2 av sacrebleu sentencepiece tokenizers tqdm matplotlib "
    "tensorboardX google_crc32c jinja2 torch transformers"
)
BARE = f"""
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING.split()!r}:
            raise ModuleNotFoundError(f"no {{name}} on a bare machine")

sys.meta_path.insert(0, Refuse())
sys.argv = ["ymplug_jax.main", *sys.argv[1:]]
runpy.run_module("ymplug_jax.main", run_name="__main__")
"""


def bench(task: str, *more: str, devices: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BARE, f"--config=configs/tiny/{task}.py", "--mode=bench", *more]
    environment = runs.environment(devices)
    return subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_step_of_pretraining_on_a_bare_machine(tmp_path: Path) -> None:
    done = bench("pretrain", *runs.SMALL, "--steps=3", f"--workdir={tmp_path}", devices=2)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 2 and facts["batch_size"] == 8 and facts["steps"] == 3
    times = facts["step_seconds"]
    assert 0 < times["minimum"] <= times["p10"] <= times["median"] <= times["p90"]
    assert facts["samples_per_second"] == pytest.approx(8 / times["median"])
    assert facts["text_tokens_per_second"] == pytest.approx(8 * 12 / times["median"])
    assert 0 < facts["mfu"] == pytest.approx(facts["model_flops"] / times["median"] / facts["peak_flops"])
    assert facts["model_flops"] <= facts["program_flops"]
    assert 0 <= facts["input_wait"] <= 1 and facts["loss"] > 0 and facts["peak_memory_bytes"] > 2**20
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "step 3 of 3" in done.stderr and "MFU" in done.stderr


@pytest.mark.slow
def test_every_task_has_a_step_to_time() -> None:
    for task in ("caption", "retrieve"):
        done = bench(task, *runs.SMALL, "--steps=2")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1])["task"] == task


class Counted:
    """A compiled step that counts its calls."""

    def __init__(self, compiled):
        self._compiled, self.calls = compiled, 0

    def __call__(self, *args):
        self.calls += 1
        return self._compiled(*args)

    def __getattr__(self, name: str):
        return getattr(self._compiled, name)


def test_few_steps_are_few_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warm-up steps and two timed ones: a step of a large model takes many seconds."""
    made, compile_step = [], step.compile_step
    monkeypatch.setattr(setup, "prepare", functools.partial(setup.prepare, devices=jax.devices()[:1]))
    monkeypatch.setattr(bench_lib, "_facts", lambda run, compiled, seconds, waits: {"steps": len(seconds)})
    monkeypatch.setattr(step, "compile_step", lambda run: made.append(Counted(compile_step(run))) or made[-1])
    facts = bench_lib.bench(tiny.experiment(), 2)
    assert facts["steps"] == 2 and made[0].calls == 4


def test_one_step_has_no_spread() -> None:
    with pytest.raises(Mistake, match=r"^--steps 1: too small; give 2 or more$"):
        bench_lib.bench(tiny.experiment(), 1)


def test_a_folder_that_cannot_be_made_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "compile_step", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        Mistake, match=r"^--workdir .*/file/run: cannot be created \(Not a directory\); choose another folder$"
    ):
        bench_lib.bench(tiny.experiment(), 2, epath.Path(tmp_path / "file" / "run"))
