"""Builds whose driver or workers are killed: the command goes on by itself or, started again, gives the same bytes."""

import os
import random
from pathlib import Path

import pytest

import builds
from data_prep import build_shards, pipeline
from data_prep.scratch import PREFIX, Scratch

ROWS = 600


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the corpus, with an undisturbed build in one process: `whole`."""
    folder = tmp_path_factory.mktemp("kills")
    csv, root = builds.corpus(folder, ROWS)
    assert build_shards.main(builds.flags(csv, root, folder / "whole", "--workers=1")) == 0
    return folder


def parts(out: Path) -> int:
    return len(list((out / build_shards.BUILDING / "train").glob("part-*.json")))


@pytest.mark.slow
def test_a_killed_worker_is_replaced(undisturbed: Path):
    out = undisturbed / "worker"
    process = builds.start(builds.flags(undisturbed / "clips.csv", undisturbed / "root", out, "--workers=2"))
    builds.wait_for(process, lambda: parts(out), random.Random(1).randrange(1, 15))
    builds.kill_a_worker(process, seed=1)
    code, _, err = builds.end(process)
    assert code == 0, err
    assert "a worker process ended; going on with the partitions that are missing (" in err
    assert builds.content(out) == builds.content(undisturbed / "whole")


@pytest.mark.slow
def test_a_killed_driver_takes_its_processes_along_and_the_build_resumes(undisturbed: Path):
    out = undisturbed / "driver"
    given = builds.flags(undisturbed / "clips.csv", undisturbed / "root", out, "--workers=2")
    for least in (2, 20):
        process = builds.start(given)
        builds.wait_for(process, lambda: parts(out), least)
        below = builds.kill_the_driver(process)
        assert len(below) >= 3, "the pipeline and two workers"
        builds.wait_until_gone(below)
        assert not (out / "manifest.json").exists()
    done = parts(out)
    code, _, err = builds.end(builds.start(given))
    assert code == 0 and f"resuming: {done} of 60 partitions" in err, err
    assert builds.content(out) == builds.content(undisturbed / "whole")


def test_workers_that_always_die_end_the_build(undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Three attempts without a finished partition are one line and exit code 5."""
    asked = []

    def dies(*args: object) -> None:
        asked.append(args)
        raise pipeline.RunnerFailed("a worker process of the build ended (exit code 9)")

    monkeypatch.setattr(pipeline, "_run_in_child", dies)
    given = builds.flags(undisturbed / "clips.csv", undisturbed / "root", undisturbed / "never", "--workers=2")
    assert build_shards.main(given) == 5
    lines = capfd.readouterr().err.splitlines()
    assert len(asked) == 3 and lines[-1].startswith("error: a worker process of the build ended (exit code 9), 3 times")
    assert len({args[0].token for args in asked}) == 3


def test_an_older_attempt_does_not_write(undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Workers that outlive their driver, on a cluster, stop when the build is started again."""
    out = undisturbed / "older"
    run = pipeline.run_here

    def other_begins(job: pipeline.Job, flags: list[str]) -> None:
        (out / build_shards.BUILDING / "train" / "attempt").write_text("another")
        run(job, flags)

    monkeypatch.setattr(pipeline, "run_here", other_begins)
    given = builds.flags(undisturbed / "clips.csv", undisturbed / "root", out, "--workers=1")
    assert build_shards.main(given) == 5
    assert "another run of the same build has begun, so this one stops" in capfd.readouterr().err.splitlines()[-1]
    assert parts(out) == 0


def test_temporary_folders_of_killed_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = Scratch()
    (own.path / "clip.mp4").touch()
    child = os.fork()
    if not child:
        left = Scratch()
        (left.path / "clip.mp4").touch()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 2
    with Scratch() as third:
        assert sorted(tmp_path.iterdir()) == sorted([own.path, third.path])
    own.close()
    assert not list(tmp_path.iterdir())
