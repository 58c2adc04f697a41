"""The command line: JSON alone on stdout, tables on stderr, and one clear line for each mistake of a user."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import runs

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


def test_plan_of_the_real_model():
    """The 1.3B model is laid out and its step compiled without a byte of it allocated (the published counts, exactly)."""
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


def test_eval_prints_one_json_line_and_writes_predictions(trained: tuple[Path, list[str]]):
    workdir, data = trained
    done = runs.run(workdir, data, "--config.train.duration=6 steps", "--mode=eval")
    (line,) = done.stdout.splitlines()
    scores = json.loads(line)
    assert (scores["split"], scores["step"], scores["examples"]) == ("validation", 6, 9)
    assert scores["loss"] > 0 and 0 <= scores["exact_share"] <= 1
    folder = workdir / "eval" / "validation"
    assert json.loads((folder / "scores.json").read_text()) == scores
    rows = [json.loads(text) for text in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all(row["title"].endswith("在移动") for row in rows)


def test_a_finished_run_is_left_alone(trained: tuple[Path, list[str]]):
    workdir, data = trained
    before = sorted(path.name for path in (workdir / "checkpoints" / "steps").iterdir())
    done = runs.run(workdir, data, "--config.train.duration=6 steps")
    assert "nothing to train" in done.stderr
    assert sorted(path.name for path in (workdir / "checkpoints" / "steps").iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.path=nowhere"], "nowhere: no such folder"),
        (["--config.data.tokenizer=nowhere.model"], "nowhere.model: no such file"),
        (["--config.train.batch_size=7000"], "batch_size 7000 is larger than the training split"),
        (["--config.train.duration=forever"], "cannot read the duration 'forever'"),
        (["--config.train.init_from=llm=nowhere"], "no checkpoint here"),
        (
            ["--config.task=dance"],
            "config.task is 'dance'; there are alpro_classify, alpro_pretrain, alpro_prompter, alpro_retrieve, caption, ",
        ),
        (["--config.mesh.fsdp=3"], "does not make 1 devices; change config.mesh"),
    ],
)
def test_mistakes_end_in_one_line(trained: tuple[Path, list[str]], tmp_path: Path, flags: list[str], message: str):
    done = runs.run(tmp_path / "run", trained[1], "--config.train.duration=6 steps", *flags, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_eval_of_an_empty_folder(trained: tuple[Path, list[str]], tmp_path: Path):
    done = runs.run(tmp_path / "run", trained[1], "--mode=eval", code=2)
    assert "no checkpoint here" in done.stderr and "Traceback" not in done.stderr


def test_a_misspelt_setting_is_refused():
    done = call("--config=configs/tiny/pretrain.py", "--config.train.batch_sise=3", "--mode=plan")
    assert done.returncode != 0 and "batch_sise" in done.stderr
