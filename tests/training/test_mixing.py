"""A chat run on a weighted mixture of folders with packing: exact after kill -9, also with new weights; wrong data are refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import runs
import shards
from ymplug_jax import main
from ymplug_jax.core import metrics

SMALL = [
    "--config=configs/mplug_chat/instruct.py:bloomz-1b7-lora",
    *(f"--config.model.vision.{name}={value}" for name, value in {"image_size": 16, "patch_size": 8, "depth": 1, "width": 16, "heads": 2, "mlp": 16}.items()),
    *(f"--config.model.abstractor.{name}={value}" for name, value in {"queries": 2, "depth": 1, "heads": 2, "mlp": 16}.items()),
    *(f"--config.model.llm.{name}={value}" for name, value in {"vocab": 64, "width": 32, "depth": 1, "heads": 2}.items()),
    "--config.data.image_size=16",
    "--config.data.max_tokens=150",
    "--config.options.images_per_row=4",
    "--config.options.videos_per_row=0",
    "--config.train.batch_size=32",
    "--config.train.log_every=1",
    "--config.train.save_every=4 steps",
    "--config.train.duration=12 steps",
    "--config.optim.warmup=2 steps",
    "--config.optim.lr=1e-2",
    "--config.data.eval_split=",
    "--config.data.threads=2",
]  # fmt: skip


def talk(i: int, *, image: bool) -> bytes:
    answer = "" if i == 5 else f"\nAI: {shards.title(i)}" * (1 + i % 3)
    text = ("Human: <image>\n" if image else "") + f"Human: {shards.title(i)}{answer}"
    return shards.talk(text, [(True, f"{i}.jpg", [shards.jpeg(i)])] if image else [], f"talks.jsonl:{i}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixing")
    shards.write_talks(folder / "image", [talk(i, image=True) for i in range(150)])
    shards.write_talks(folder / "text", [talk(i, image=False) for i in range(200, 650)])
    shards.write_talks(folder / "other", [talk(i, image=False) for i in range(200, 650, 2)])
    shutil.copytree(folder / "image", folder / "copy")
    shards.tokenizer(folder / "t.model")
    return folder


def flags(home: Path, workdir: Path, *more: str) -> list[str]:
    data = [f"--config.data.path={home / 'image'},{home / 'text'}", f"--config.data.tokenizer={home / 't.model'}"]
    return [
        "main",
        *SMALL,
        *data,
        f"--workdir={workdir}",
        *(more if any("weights" in one for one in more) else ("--config.data.weights=(1, 2)", *more)),
    ]


def train(home: Path, workdir: Path, *more: str) -> Path:
    assert main.main(flags(home, workdir, *more)) == 0
    return workdir


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    return train(home, home / "straight")


@pytest.fixture(scope="module")
def killed(home: Path) -> Path:
    """A run killed with SIGKILL during or just after its first save."""
    workdir = home / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "ymplug_jax.main", *flags(home, workdir)[1:]],
        cwd=runs.ROOT, env=runs.environment(8), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    steps = workdir / "checkpoints" / "steps"
    deadline = time.monotonic() + 240
    while not any(path.name == "4" for path in steps.glob("*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for later in ("8", "12"):  # the run may have gone on before it was killed
        shutil.rmtree(steps / later, ignore_errors=True)
    return workdir


def same_end(a: Path, b: Path, steps: range) -> None:
    want, got = runs.losses(a), runs.losses(b)
    assert [got[step] for step in steps] == [want[step] for step in steps]
    want, got = runs.saved(a), runs.saved(b)
    assert want.keys() == got.keys() and all(want[path].tobytes() == got[path].tobytes() for path in want)


def history(workdir: Path) -> list:
    return json.loads((workdir / "data" / "history.json").read_text())["history"]


def copied(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.parent / name))


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(home: Path, straight: Path, killed: Path, capsys: pytest.CaptureFixture[str]):
    """With new weights and killed again; then from the older step with the old weights, as if it had never happened."""
    weights = "--config.data.weights=(9, 1)"
    changed = train(home, copied(killed, "changed"), weights)
    assert (
        "weights of the data from example 128 on: image 0.3333 -> 0.9000, text 0.6667 -> 0.1000"
        in capsys.readouterr().err
    )
    assert runs.losses(changed)[12] != runs.losses(straight)[12]
    assert history(changed) == [[0, [1, 2], 0], [128, [9, 1], 0]]
    assert all((run / "introduction.txt").read_text() == "\n" for run in (straight, changed))  # these talks have none
    again = copied(changed, "again")  # what the run wrote at its start must be enough after a second kill
    shutil.rmtree(again / "checkpoints" / "steps" / "12")
    sizes = again / "data" / "sizes.npz"
    sizes.write_bytes(sizes.read_bytes()[:50])  # a damaged cache costs time only
    same_end(changed, train(home, again, weights), range(1, 13))
    back = copied(changed, "back")  # steps that are gone take their weights along
    for step in ("8", "12"):
        shutil.rmtree(back / "checkpoints" / "steps" / step)
    same_end(straight, train(home, back), range(1, 13))
    assert history(back) == [[0, [1, 2], 0]]


@pytest.mark.slow
def test_what_was_packed_is_in_the_metrics(straight: Path):
    lines = metrics.read_metrics(straight)
    assert [
        (line["without_target/image"], line["without_target/text"]) for line in lines if "without_target/text" in line
    ] == [(1, 0)]
    packed = [line["packed_rows"] for line in lines if "packed_rows" in line]
    padding = [line["padding"] for line in lines if "padding" in line]
    assert len(packed) == 12 and np.mean(packed) > 4 and 0 <= np.mean(padding) < 0.2


REFUSED = {
    "one folder less": (["--config.data.path={home}/image", "--config.data.weights=(1,)"], "the number of folders is 1, but 2 in the run in"),
    "other content": (["--config.data.path={home}/image,{home}/other"], "folder 2, other, has other records than folder 2 of the run in"),
    "other length": (["--config.data.max_tokens=170"], "an example has room for [171, 4, 0] tokens, images and videos, but for [151, 4, 0]"),
    "weights for three": (["--config.data.weights=(1, 2, 3)"], "has 3 numbers, but config.data.path has 2 folders"),
    "twice": (["--config.data.path={home}/image,{home}/image"], "config.data.path: names {home}/image twice"),
    "a copy": (["--config.data.path={home}/image,{home}/copy"], "config.data.path: folders 1 and 2 hold the same records"),
    "no such folder": (["--config.data.path={home}/image,{home}/nowhere"], "{home}/nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_other_data_are_refused(home: Path, straight: Path, capsys: pytest.CaptureFixture[str], name: str):
    more, message = REFUSED[name]
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert main.main(flags(home, straight, *(flag.format(home=home) for flag in more))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.format(home=home) in line, line
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_an_evaluation_that_does_not_fit_is_refused_at_the_start(home: Path, capsys: pytest.CaptureFixture[str]):
    """Evaluation comes after training has begun, so its records are measured before."""
    wide = "Human: <image>" + "\nHuman: <image>" * 4 + f"\nHuman: {shards.title(1)}\nAI: {shards.title(2)}"
    images = [(True, f"{i}.jpg", [shards.jpeg(i)]) for i in range(5)]
    folder = shards.write_talks(home / "wide", [talk(i, image=False) for i in range(400)])
    shards.write_talks(folder, [talk(7, image=False), shards.talk(wide, images)], split="validation")
    more = [f"--config.data.path={folder}", "--config.data.weights=()", "--config.data.eval_split=validation"]
    assert main.main(flags(home, home / "wide_run", *more)) == 2
    assert "0.jpg: one of 1 records that are larger than an example" in capsys.readouterr().err
    assert not (home / "wide_run").exists()
