"""One story on gs://, against a storage server on this machine: shards, training, kill -9, resume, evaluation, answers, conversion.

Everything lies in buckets: shards, tokenizer, run folder, videos, conversion. Faults are injected on the way: refused requests (503),
slow answers, and connections cut in the middle of a read and of a save.
"""

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

import buckets
import builds
import runs
import shards
import videos
from together import Group, finished
from ymplug_jax import compare, predict
from ymplug_jax import main as main_lib
from ymplug_jax.convert import __main__ as convert
from ymplug_jax.core import checkpoint_files, leaf_store, metrics, verified_read

pytestmark = pytest.mark.slow

STEPS, SAVE = 12, 4
FLAGS = [
    "--config=configs/tiny/pretrain.py",
    *runs.SMALL,
    f"--config.train.duration={STEPS} steps",
    f"--config.train.save_every={SAVE} steps",
    "--config.data.path=gs://clips/shards",
    "--config.data.tokenizer=gs://clips/words/t.model",
    "--config.mesh.fsdp=2",
    "--config.data.eval_split=",
]
SCORED = "--config.data.eval_split=validation"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("buckets")


@pytest.fixture(scope="module")
def server(place: Path):
    """Shards, a tokenizer and a video in gs://clips; an empty gs://runs."""
    shards.tokenizer(place / "t.model")
    videos.write(place / "videos" / "a.mp4")
    with buckets.served("clips", "runs", faults=True) as found:
        found.put("clips", "words/t.model", (place / "t.model").read_bytes())
        found.put_folder("clips", "videos", place / "videos")
        for split, rows in (("train", 60), ("validation", 10)):  # every seventh row names a missing file
            csv, root = builds.corpus(place / split, rows)
            found.put("clips", f"{split}.csv", csv.read_bytes())
            found.put_folder("clips", "raw", root)
            flags = builds.flags(f"gs://clips/{split}.csv", "gs://clips/raw", "gs://clips/shards", f"--split={split}")
            code, _, errors = builds.end(builds.start([*flags, "--workers=1"]), 600)
            assert code == 0, errors
        yield found


@pytest.fixture(autouse=True)
def no_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: buckets.Server):
    """No program takes gs: for a folder of this machine."""
    monkeypatch.chdir(tmp_path)
    yield
    server.heal()
    assert not [*tmp_path.glob("gs*"), *runs.ROOT.glob("gs*")]


def whole(server: buckets.Server, name: str, step: int) -> bool:
    return f"{name}/checkpoints/steps/{step}/commit_success.txt" in server.names("runs", f"{name}/checkpoints/")


def wait(group: Group, there) -> None:
    end = time.monotonic() + 400
    while not there():
        for process in group.processes:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.1)


def parameters(name: str) -> dict[str, np.ndarray]:
    """Return the trained parameters of the newest step of gs://runs/NAME."""
    (folder,) = [place for place in checkpoint_files.places(f"gs://runs/{name}") if place.name == "trainable"]
    return values(folder)


def values(folder: epath.Path) -> dict[str, np.ndarray]:
    stored = verified_read.stored_in(folder)
    return {path: np.asarray(leaf_store.open_leaf(folder, path).read().result()) for path in stored}


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run a command in this process, check its exit code, and return its last line: of stdout, or of stderr if it failed."""

    def run(program, *flags: str, code: int = 0) -> str:
        capsys.readouterr()
        assert program([*flags]) == code
        out, err = capsys.readouterr()
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)  # the program's handler holds a closed stream
        assert "Traceback" not in err
        return (err if code else out).strip().splitlines()[-1]

    return run


def train(flags: list[str]) -> int:
    return main_lib.main(["main", *flags])


@pytest.fixture(scope="module")
def straight(server: buckets.Server, place: Path) -> str:
    """A run of two processes that nothing disturbs."""
    finished(Group(place / "straight", FLAGS, 2, url="gs://runs/straight"))
    return "straight"


@pytest.fixture(scope="module")
def resumed(server: buckets.Server, place: Path, straight: str) -> str:
    """The same run from its first checkpoint on, killed in the middle of the next save, then resumed while the bucket fails now and then."""
    for name in server.names("runs", "straight/"):
        if not any(f"/steps/{step}/" in name for step in (2 * SAVE, STEPS)) and "/tensorboard/" not in name:
            server.put("runs", name.replace("straight/", "killed/", 1), server.get("runs", name))
    lines = server.get("runs", "straight/metrics.jsonl").splitlines(keepends=True)
    server.put("runs", "killed/metrics.jsonl", b"".join(line for line in lines if json.loads(line)["step"] <= SAVE))
    server.inject(buckets.Fault("slow", "POST", f"/steps/{2 * SAVE}/", times=-1, seconds=1))  # time for the kill
    group = Group(place / "killed", FLAGS, 2, url="gs://runs/killed")
    wait(group, lambda: server.names("runs", f"killed/checkpoints/steps/{2 * SAVE}/"))
    for process in group.processes:
        process.kill()
    group.end(60)
    server.heal()
    assert server.names("runs", f"killed/checkpoints/steps/{2 * SAVE}/") and not whole(server, "killed", 2 * SAVE)
    server.inject(
        buckets.Fault("503", "GET", r"/o\?", times=2),  # a listing
        buckets.Fault("503", "GET", "shards/.*alt=media", times=2),
        buckets.Fault("slow", "GET", "shards/.*alt=media", times=2, seconds=1),
        buckets.Fault("cut read", "GET", "shards/.*alt=media", times=2, least=1000),
        buckets.Fault("cut read", "GET", "checkpoints/.*alt=media", times=2, least=100),
        buckets.Fault("cut write", "POST", "checkpoints/", times=2, least=100),
        buckets.Fault("503", "POST", "checkpoints/", times=3),
        buckets.Fault("503 after", "POST", "checkpoints/", times=2),
        buckets.Fault("503", "DELETE", "checkpoints/", times=1),
        buckets.Fault("503", "POST", "uploadType=multipart", times=2),  # gcsfs: metrics, settings, Orbax's metadata
        buckets.Fault("cut write", "POST", "uploadType=multipart", times=1),
        buckets.Fault("503 after", "POST", "uploadType=multipart", times=1),
    )
    finished(Group(place / "resumed", FLAGS, 2, url="gs://runs/killed"))
    assert not server.waiting()
    return "killed"


def test_a_killed_run_resumes_to_the_bit_on_two_processes(server: buckets.Server, straight: str, resumed: str):
    want, got = (
        {
            line["step"]: line["loss"]
            for line in metrics.read_metrics(checkpoint_files.folder_of(f"gs://runs/{name}"))
            if "loss" in line
        }
        for name in (straight, resumed)
    )
    assert sorted(want) == list(range(1, STEPS + 1)) and got == want
    want, got = parameters(straight), parameters(resumed)
    assert want.keys() == got.keys() and want and all(want[path].tobytes() == got[path].tobytes() for path in want)
    names = server.names("runs", "killed/")
    for file in ("config.json", "environment.json", "metrics.jsonl", "loss.png", "MODEL_CARD.md", "tokenizer/t.model"):
        assert f"killed/{file}" in names, names
    assert any("/tensorboard/events" in name for name in names)


def test_evaluation(server: buckets.Server, straight: str, resumed: str, said):
    lines = [
        json.loads(said(train, f"--workdir=gs://runs/{name}", "--mode=eval", SCORED)) for name in (straight, resumed)
    ]
    assert lines[0] == lines[1] and lines[0]["examples"] == 8
    files = {name.rpartition("/")[2] for name in server.names("runs", "killed/eval/validation/")}
    assert {"scores.json", "predictions.jsonl", "report.html"} <= files
    assert json.loads(server.get("runs", "killed/eval/validation/scores.json"))["loss"] == lines[0]["loss"]
    server.inject(buckets.Fault("403", "POST", "/upload/", times=-1))
    line = said(train, "--workdir=gs://runs/killed", "--mode=eval", SCORED, code=5)
    assert line.startswith("error: gs://runs/killed") and "injected 403" in line
    server.heal()
    said(compare.main, "gs://runs/straight", "gs://runs/killed", "--out=gs://runs/pages/compare.html")
    assert b"gs://runs/killed" in server.get("runs", "pages/compare.html")


def test_answers_about_videos(server: buckets.Server, place: Path, resumed: str, said):
    checkpoint = "--checkpoint=gs://runs/killed"
    server.inject(
        buckets.Fault("cut read", "GET", "videos/a.*alt=media", least=100), buckets.Fault("503", "GET", "videos/")
    )
    there = json.loads(said(predict.main, "caption", checkpoint, "--json", "--video=gs://clips/videos"))
    assert not server.waiting()
    here = json.loads(said(predict.main, "caption", checkpoint, "--json", f"--video={place / 'videos' / 'a.mp4'}"))
    assert there["video"] == "gs://clips/videos/a.mp4"
    assert {k: v for k, v in there.items() if k != "video"} == {k: v for k, v in here.items() if k != "video"}
    said(predict.main, "caption", checkpoint, "--video=gs://clips/videos/none.mp4", code=1)
    said(predict.main, "caption", checkpoint, "--video=gs://nowhere/a.mp4", code=5)
    said(predict.main, "caption", checkpoint, "--video=gs:/clips/a.mp4", code=2)


def test_a_conversion(server: buckets.Server, resumed: str, said):
    """The run to PyTorch's format and back, all in buckets; the same parameters return."""
    said(convert.main, "--model=mplug_video", "--source=gs://runs/killed", "--to=torch", "--out=gs://runs/torch")
    assert "torch/model.safetensors" in server.names("runs", "torch/")
    back = ["--model=mplug_video", "--source=gs://runs/torch/model.safetensors", "--out=gs://runs/orbax"]
    sizes = ["--heads", "llm=2", "vision=2", "abstractor=2"]
    server.inject(
        buckets.Fault("503", "POST", "b/runs/", times=2), buckets.Fault("cut write", "POST", "b/runs/", least=100)
    )
    assert said(convert.main, *back, *sizes) == "gs://runs/orbax/checkpoints/converted"
    assert not server.waiting()
    line = said(convert.main, *back, *sizes, code=2)
    assert line.startswith("error: --out gs://runs/orbax: checkpoints/converted/_METADATA exists there")
    (folder,) = checkpoint_files.places("gs://runs/orbax")
    got, want = values(folder), parameters("killed")
    for path in want:
        assert got[path].tobytes() == want[path].tobytes(), path


def test_a_step_without_its_last_file_is_no_checkpoint(server: buckets.Server, resumed: str):
    server.put("runs", "killed/checkpoints/steps/99/trainable/_METADATA", b"{}")
    assert checkpoint_files.latest_step("gs://runs/killed") == STEPS
    server.delete("runs", "killed/checkpoints/steps/99/trainable/_METADATA")


def test_a_bucket_that_fails_is_not_an_empty_one(server: buckets.Server, resumed: str, said):
    """Nothing starts from scratch when the checkpoints cannot be seen."""
    before = server.names("runs", "killed/")
    for kind in ("403", "503"):
        server.inject(buckets.Fault(kind, "GET", "checkpoints", times=-1))
        line = said(train, "--workdir=gs://runs/killed", f"--config.train.duration={STEPS + 2} steps", code=5)
        assert line.startswith("error: gs://runs/killed/checkpoints") and "cannot be used" in line
        server.heal()
    assert server.names("runs", "killed/") == before


def test_a_missing_bucket_is_one_line(server: buckets.Server, said):
    line = said(train, "--workdir=gs://nowhere/run", *FLAGS, code=2)
    assert line == "error: gs://nowhere/run: there is no bucket gs://nowhere; create it, or correct the name"
    line = said(train, "--workdir=gs://runs/new", *FLAGS, "--config.data.path=gs://nowhere/shards", code=2)
    assert line.startswith("error: gs://nowhere/shards: ")
    line = said(train, "--workdir=gs:/runs/new", *FLAGS, code=2)
    assert line == "error: --workdir gs:/runs/new: not a place; write gs://runs/new"
    assert not server.names("runs", "new")
