"""The command line: JSON on stdout, tables and logs on stderr, one line per user error."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from ymplug_jax import main
from ymplug_jax.core import exits

ROOT = Path(__file__).parent.parent


def call(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ymplug_jax.main", *flags],
        cwd=ROOT,
        env=runs.environment(),
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.slow
def test_plan_of_the_real_model():
    """The 1.3B model has exactly the published parameter counts; its step compiles without allocating a parameter."""
    done = call("--config=configs/mplug_video/pretrain.py:1.3b", "--mode=plan")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)
    assert (facts["trainable_params"], facts["frozen_params"]) == (130_002_176, 1_317_654_528)
    assert facts["steps"] == 260_660 and facts["bytes_per_device"]["frozen"] == 2 * 1_317_654_528
    assert "llm" in done.stderr and "frozen" in done.stderr and "bfloat16" in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("trained")
    data = runs.make_data(folder)
    runs.run(folder / "run", data, "--config.train.duration=6 steps")
    return folder / "run", data


def test_eval_takes_the_settings_of_the_run_prints_one_json_line_and_writes_predictions(
    trained: tuple[Path, list[str]],
):
    workdir, _ = trained
    done = call(f"--workdir={workdir}", "--mode=eval")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    scores = json.loads(line)
    assert (scores["split"], scores["step"], scores["examples"]) == ("validation", 6, 9)
    assert scores["loss"] > 0 and 0 <= scores["exact_share"] <= 1
    folder = workdir / "eval" / "validation"
    assert json.loads((folder / "scores.json").read_text()) == scores
    rows = [json.loads(text) for text in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all(row["title"].endswith("在移动") for row in rows)


def test_a_finished_run_is_not_changed(trained: tuple[Path, list[str]]):
    workdir, _ = trained
    before = sorted(path.name for path in (workdir / "checkpoints" / "steps").iterdir())
    done = call(f"--workdir={workdir}")
    assert done.returncode == 0 and "nothing to train" in done.stderr
    assert "settings differ" not in done.stderr
    assert sorted(path.name for path in (workdir / "checkpoints" / "steps").iterdir()) == before


def test_a_run_resumes_from_its_folder_alone(trained: tuple[Path, list[str]], tmp_path: Path):
    """The command line overrides the stored settings; the run's copy replaces a tokenizer file that no longer exists."""
    workdir, data = shutil.copytree(trained[0], tmp_path / "run"), trained[0].parent
    tokenizer = (data / "t.model").rename(data / "moved.model")
    try:
        done = call(f"--workdir={workdir}", "--config.train.duration=7 steps", "--config.data.eval_split=")
    finally:
        tokenizer.rename(data / "t.model")
    assert done.returncode == 0, done.stderr
    assert "train.duration: '6 steps' -> '7 steps'" in done.stderr
    assert list(runs.losses(workdir)) == [1, 2, 3, 4, 5, 6, 7]
    kept = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    assert (kept["train"]["duration"], kept["data"]["eval_split"]) == ("7 steps", "")
    assert kept["train"]["batch_size"] == 8


@pytest.mark.parametrize("place", ["_accepted", "_result_of"])
def test_ctrl_c_prints_no_traceback(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """During the checks and during an evaluation; training saves a checkpoint first (see test_resume)."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_accepted", lambda *_: [])
    monkeypatch.setattr(main, place, interrupted)
    flags = ["--config=configs/tiny/pretrain.py", "--mode=eval", f"--workdir={tmp_path}"]
    assert main.main(["main", *flags]) == 130 == exits.STOPPED
    out, err = capsys.readouterr()
    assert out == "" and err == "interrupted\n"
