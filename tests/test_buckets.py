"""One story on gs://, against a storage server on this machine: shards, training, kill -9, resume, evaluation, answers, conversion.

Everything lies in buckets: shards, tokenizer, run folder, videos, conversion. Faults are injected on the way: refused requests (503),
slow answers, and connections cut in the middle of a read and of a save.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import buckets
import runs
import shards
import videos
from together import Group, finished
from ymplug_jax.core import checkpoint_files, metrics

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
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("buckets")


@pytest.fixture(scope="module")
def server(place: Path):
    """Shards, a tokenizer and a video in gs://clips; an empty gs://runs."""
    shards.write(place / "data", (60, 36))
    shards.write(place / "data", (9,), split="validation", first=500)
    shards.tokenizer(place / "t.model")
    videos.write(place / "videos" / "a.mp4")
    with buckets.served("clips", "runs", faults=True) as found:
        found.put_folder("clips", "shards", place / "data")
        found.put("clips", "words/t.model", (place / "t.model").read_bytes())
        found.put_folder("clips", "videos", place / "videos")
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
    from ymplug_jax.core import leaf_store, verified_read

    return {
        path: np.asarray(leaf_store.open_leaf(folder, path).read().result()) for path in verified_read.stored_in(folder)
    }


def main(*flags: str, code: int) -> str:
    """Run a mode in a process of its own; return its last line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "ymplug_jax.main", *flags],
        cwd=runs.ROOT,
        env=runs.environment(2),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def straight(server: buckets.Server, place: Path) -> str:
    """A run of two processes that nothing disturbs."""
    finished(Group(place / "straight", FLAGS, 2, url="gs://runs/straight"))
    return "straight"


@pytest.fixture(scope="module")
def resumed(server: buckets.Server, place: Path, straight: str) -> str:
    """The same run, killed with SIGKILL in the middle of its second save, then resumed while the bucket fails now and then."""
    group = Group(place / "killed", FLAGS, 2, pause=0.2, url="gs://runs/killed")
    wait(group, lambda: whole(server, "killed", SAVE) and server.names("runs", f"killed/checkpoints/steps/{2 * SAVE}/"))
    for process in group.processes:
        process.kill()
    group.end(60)
    left = server.names("runs", "killed/checkpoints/steps/")
    assert any(f"/steps/{2 * SAVE}/" in name for name in left) and not whole(server, "killed", STEPS)
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
    for file in ("config.json", "environment.json", "metrics.jsonl", "loss.png", "README.md", "tokenizer/t.model"):
        assert f"killed/{file}" in names, names
    assert any("/tensorboard/events" in name for name in names)


def test_evaluation(server: buckets.Server, straight: str, resumed: str):
    said = [json.loads(main(f"--workdir=gs://runs/{name}", "--mode=eval", code=0)) for name in (straight, resumed)]
    assert said[0] == said[1] and said[0]["examples"] == 9
    files = {name.rpartition("/")[2] for name in server.names("runs", "killed/eval/validation/")}
    assert {"scores.json", "predictions.jsonl", "report.html"} <= files
    assert json.loads(server.get("runs", "killed/eval/validation/scores.json"))["loss"] == said[0]["loss"]


def test_a_step_without_its_last_file_is_no_checkpoint(server: buckets.Server, resumed: str):
    before = checkpoint_files.latest_step("gs://runs/killed")
    server.put("runs", "killed/checkpoints/steps/99/trainable/_METADATA", b"{}")
    assert checkpoint_files.latest_step("gs://runs/killed") == before == STEPS
    server.delete("runs", "killed/checkpoints/steps/99/trainable/_METADATA")


@pytest.mark.parametrize("kind", ["403", "503"])
def test_a_bucket_that_fails_is_not_an_empty_one(server: buckets.Server, resumed: str, kind: str):
    """Nothing starts from scratch when the checkpoints cannot be seen."""
    before = server.names("runs", "killed/")
    server.inject(buckets.Fault(kind, "GET", "checkpoints", times=-1))
    line = main("--workdir=gs://runs/killed", f"--config.train.duration={STEPS + 2} steps", code=5)
    assert line.startswith("error: gs://runs/killed/checkpoints") and "cannot be used" in line
    server.heal()
    assert server.names("runs", "killed/") == before


def test_a_missing_bucket_is_one_line(server: buckets.Server):
    flags = [flag for flag in FLAGS if not flag.startswith("--config.data.path")]
    line = main("--workdir=gs://nowhere/run", *FLAGS, code=2)
    assert line == "error: gs://nowhere/run: there is no bucket gs://nowhere; create it, or correct the name"
    line = main("--workdir=gs://runs/new", *flags, "--config.data.path=gs://nowhere/shards", code=2)
    assert line.startswith("error: gs://nowhere/shards: ")
    line = main("--workdir=gs:/runs/new", *FLAGS, code=2)
    assert line == "error: --workdir gs:/runs/new: not a place; write gs://runs/new"
    assert not server.names("runs", "new")


def test_a_place_that_may_not_be_written_is_one_line(server: buckets.Server):
    server.inject(buckets.Fault("403", "POST", "/upload/", times=-1))
    assert main("--workdir=gs://runs/refused", *FLAGS, code=5).startswith("error: gs://runs/refused")
