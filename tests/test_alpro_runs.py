"""ALPRO from the command line: pre-training on one and on eight devices, fine-tuning, evaluation and prediction."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runs
import shards
from ymplug_jax import predict

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "data_prep"))
import videos  # noqa: E402  generated test videos

pytestmark = pytest.mark.slow

SMALL = [
    "--config.model.vision.image_size=16", "--config.model.vision.patch_size=8", "--config.model.vision.depth=1",
    "--config.model.vision.width=16", "--config.model.vision.heads=2", "--config.model.vision.frames=2",
    "--config.model.text.vocab=64", "--config.model.text.width=32", "--config.model.text.depth=1",
    "--config.model.text.heads=2", "--config.model.text.hidden=32", "--config.model.fusion.depth=1",
    "--config.model.fusion.heads=2", "--config.model.fusion.hidden=32", "--config.data.frames=2",
    "--config.data.image_size=16", "--config.data.max_tokens=14", "--config.train.batch_size=8",
    "--config.train.log_every=1", "--config.train.duration=3 steps", "--config.optim.warmup=1 steps",
]  # fmt: skip


def python(*command: str | Path, devices: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=runs.environment(devices),
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    return done


def main(
    home: Path, task: str, workdir: str, *more: str, devices: int = 1, code: int = 0
) -> subprocess.CompletedProcess:
    shards.call(home / "data", "classification" if task == "alpro_classify" else "pretrain")
    data = [f"--config.data.path={home / 'data'}", f"--config.data.tokenizer={home / 'vocab.txt'}"]
    base = [f"--config=configs/tiny/{task}.py", f"--workdir={home / workdir}", *data, *SMALL]
    return python("ymplug_jax.main", *base, *more, devices=devices, code=code)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run and two runs fine-tuned from it."""
    home = tmp_path_factory.mktemp("alpro")
    shards.write(home / "data", (13, 8))
    shards.write(home / "data", (9,), split="validation", first=50)
    shards.vocabulary(home / "vocab.txt")
    main(home, "alpro_pretrain", "one", "--config.options.group=4")
    for task, more in (("alpro_retrieve", ["--config.options.group=8"]), ("alpro_classify", [])):
        main(home, task, task, f"--config.train.init_from={home / 'one'}", *more)
    return home


def test_eight_devices_learn_the_same(home: Path) -> None:
    more = ["--config.options.group=4", "--config.mesh.fsdp=4"]
    main(home, "alpro_pretrain", "eight", *more, devices=8)
    one, eight = runs.losses(home / "one"), runs.losses(home / "eight")
    assert len(one) == 3 and one.keys() == eight.keys()
    np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-4)


def test_evaluations_of_the_runs(home: Path) -> None:
    found = json.loads(main(home, "alpro_retrieve", "alpro_retrieve", "--config.options.group=8", "--mode=eval").stdout)
    assert found["task"] == "alpro_retrieve" and found["examples"] == found["texts"] == 9
    assert {"t2v_r1", "match/t2v_r1", "match/r_mean", "matching_loss"} <= set(found)
    folder = home / "alpro_retrieve" / "eval" / "validation"
    assert (folder / "report.html").stat().st_size > 1000 and (folder / "index.npz").is_file()
    found = json.loads(main(home, "alpro_classify", "alpro_classify", "--mode=eval").stdout)
    assert found["labelled"] == 9 and "both/head_top1" in found
    found = json.loads(main(home, "alpro_pretrain", "one", "--config.options.group=4", "--mode=eval").stdout)
    assert found["masked_loss"] > 0 and "t2v_r1" in found


def test_predictions_for_files(home: Path, capsys: pytest.CaptureFixture) -> None:
    def ask(*command: str | Path) -> list[dict]:
        capsys.readouterr()
        assert predict.main([str(flag) for flag in (*command, "--json")]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (home / "videos").mkdir()
    for name in ("a.mp4", "b.mkv"):
        videos.write(home / "videos" / name)
    answers = ask("classify", "--checkpoint", home / "alpro_classify", "--video", home / "videos")
    assert len(answers) == 2 and all(a["class"] == a["head"] == next(iter(a["best"])) for a in answers)
    for run in ("alpro_retrieve", "one"):
        (answer,) = ask("retrieve", "--checkpoint", home / run, "--video", home / "videos", "--text", "红色")
        assert len(answer["ranking"]) == 2


def test_mistakes_end_in_one_line(home: Path) -> None:
    done = main(home, "alpro_retrieve", "x", "--config.options.group=3", code=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "config.options.group: 3 does not fit" in line and "Traceback" not in done.stderr
