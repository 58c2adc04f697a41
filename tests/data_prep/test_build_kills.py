"""Builds whose driver or workers are killed: the command goes on by itself or, started again, gives the same bytes."""

import os
import random
import shutil
from pathlib import Path

import pytest

import builds
from data_prep import build_shards, publish, runners
from data_prep.scratch import PREFIX, Scratch
from ymplug_jax.core import places
from ymplug_jax.data.records import Records

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
    assert "Beam on this machine: a worker process was killed by signal 9 (Killed); " in err
    assert builds.content(out) == builds.content(undisturbed / "whole")


@pytest.mark.slow
def test_a_killed_driver_takes_its_processes_along_and_the_build_resumes(undisturbed: Path):
    out = undisturbed / "driver"
    given = builds.flags(undisturbed / "clips.csv", undisturbed / "root", out, "--workers=2")
    for least in (2, 20):
        process = builds.start(given)
        builds.wait_for(process, lambda: parts(out), least)
        below = builds.kill_the_driver(process)
        assert len(below) >= 3, "two workers and their decoders"
        builds.wait_until_gone(below)
        assert not (out / "manifest.json").exists()
    done = parts(out)
    code, _, err = builds.end(builds.start(given))
    assert code == 0 and f"resuming: {done} of 60 partitions" in err, err
    assert builds.content(out) == builds.content(undisturbed / "whole")


def test_an_older_attempt_does_not_write(undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Workers that outlive their driver, on a cluster, stop when the build is started again."""
    out = undisturbed / "older"
    submit = runners.submit

    def other_begins(job: runners.Job, flags: tuple[str, ...]) -> None:
        (out / build_shards.BUILDING / "train" / "attempt").write_text("another")
        submit(job, flags)

    monkeypatch.setattr(runners, "submit", other_begins)
    given = builds.flags(undisturbed / "clips.csv", undisturbed / "root", out, "--workers=1")
    assert build_shards.main(given) == 5
    assert "another run of the same build has begun; wait for that one" in capfd.readouterr().err.splitlines()[-1]
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


class Killed(BaseException):
    """Stands for kill -9 between two changes of files."""


CHANGES = ("write_text", "write_bytes", "upload", "move", "delete", "delete_folder")


def killed_at(patch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Let the change with this number, and all later ones, raise Killed; return the list in which changes are counted."""
    made: list[str] = []

    def counted(name: str) -> None:
        change = getattr(places, name)

        def changed(*args: object) -> None:
            if len(made) >= moment:
                raise Killed
            change(*args)
            made.append(name)

        patch.setattr(places, name, changed)

    for name in CHANGES:
        counted(name)
    return made


def test_a_publication_can_be_killed_after_each_of_its_changes(undisturbed: Path, tmp_path: Path, capfd):
    """Of a split that is built again: readers get the old or the new records or a refusal, never a mixture."""
    root, old = undisturbed / "root", tmp_path / "old"
    rows = [(f"{i % 3}.mp4" if i != 4 else "none.mp4", f"甲{i}") for i in range(30)]
    first = builds.videos.write_csv(tmp_path / "x.csv", builds.COLUMNS, rows[:29])
    assert build_shards.main(builds.flags(first, root, old, "--workers=1")) == 0
    val = builds.videos.write_csv(tmp_path / "y_val.csv", builds.COLUMNS, [("0.mp4", "乙"), ("none.mp4", "丙")])
    assert build_shards.main(builds.flags(val, root, old, "--workers=1")) == 0
    new = builds.videos.write_csv(tmp_path / "x.csv", builds.COLUMNS, [(name, f"丁{title}") for name, title in rows])
    given = builds.flags(new, root, tmp_path / "out", "--workers=1", "--overwrite")

    shutil.copytree(old, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "finish", lambda *_: {})
        build_shards.build(*build_shards.parse(given))
    (tmp_path / "out").rename(tmp_path / "planned")
    shutil.copytree(tmp_path / "planned", tmp_path / "out")
    assert build_shards._old_manifest(tmp_path / "out")["splits"]["train"]["written"] == 29
    whole = builds.content(tmp_path / "out")
    assert len([name for name in whole if name.endswith("-of-00003")]) == 3
    before, after = ([record.title for record in Records(str(folder), "train")] for folder in (old, tmp_path / "out"))
    assert before != after
    for moment in range(100):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "planned", tmp_path / "out")
        with pytest.MonkeyPatch.context() as patch:
            made = killed_at(patch, moment)
            try:
                build_shards._old_manifest(tmp_path / "out")
                break
            except Killed:
                pass
        try:
            assert [record.title for record in Records(str(tmp_path / "out"), "train")] in (before, after)
        except ValueError as error:
            refused = "is being published" in str(error)
            assert refused
        assert build_shards._old_manifest(tmp_path / "out")["splits"].keys() == {"train", "validation"}
        assert builds.content(tmp_path / "out") == whole, made
    assert moment == len(made) > 12


def test_a_build_can_be_killed_after_its_changes(undisturbed: Path, tmp_path: Path):
    """In the first pass over the CSV, in partitions and in groups: the same command gives the same bytes."""
    csv = builds.videos.write_csv(
        tmp_path / "x.csv", builds.COLUMNS, [("0.mp4", "甲"), ("none.mp4", "乙"), ("1.mp4", "丙")] * 4
    )
    args, flags = build_shards.parse(builds.flags(csv, undisturbed / "root", tmp_path / "whole", "--workers=1"))
    build_shards.build(args, flags)
    whole = builds.content(tmp_path / "whole")
    args.out = args.out.with_name("out")
    for moment in range(0, 100, 3):
        with pytest.MonkeyPatch.context() as patch:
            made = killed_at(patch, moment)
            try:
                build_shards.build(args, flags)
                break
            except (Killed, RuntimeError):  # Beam wraps what a worker raises
                pass
        build_shards.build(args, flags)
        assert builds.content(args.out) == whole, made
        shutil.rmtree(args.out)
    assert moment >= len(made) > 12
