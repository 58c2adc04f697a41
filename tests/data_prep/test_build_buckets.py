"""Builds from and to a bucket: equal to a local one, through faults of the server, kills and an interrupted publication."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import buckets
import builds
from buckets import Fault
from data_prep import build_shards, index_shards
from data_prep.videos import open_videos
from ymplug_jax.data import schema
from ymplug_jax.data.records import Records

CLIPS, SETS = "clips", "sets"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a corpus of 100 rows, with a local build: `whole`."""
    folder = tmp_path_factory.mktemp("bucket")
    csv, root = builds.corpus(folder, 100)
    assert build_shards.main(builds.flags(csv, root, folder / "whole", "--workers=1")) == 0
    return folder


@pytest.fixture(scope="module")
def server(whole: Path) -> Iterator[buckets.Server]:
    with buckets.served(CLIPS, SETS, faults=True) as found:
        found.put_folder(CLIPS, "root", whole / "root")
        found.put(CLIPS, "clips.csv", (whole / "clips.csv").read_bytes())
        yield found


def flags(out: str, *more: str) -> list[str]:
    return builds.flags(f"gs://{CLIPS}/clips.csv", f"gs://{CLIPS}/root", f"gs://{SETS}/{out}", *more)


def parts(server: buckets.Server, out: str) -> int:
    return sum(name.endswith(".json") for name in server.names(SETS, f"{out}/.building/train/part-"))


def check_equal(server: buckets.Server, out: str, whole: Path, local: Path) -> None:
    """Compare a data set in the bucket with the local one: all bytes, but for the video root in the reasons of rejects."""
    found = builds.content(server.get_folder(SETS, out, local))
    expected = builds.content(whole / "whole")
    assert not server.names(SETS, f"{out}/.building")
    found[schema.REJECTS] = found[schema.REJECTS].replace(f"gs://{CLIPS}/root".encode(), str(whole / "root").encode())
    assert found == expected and len(found) > 20


def test_a_build_through_faults_equals_a_local_one(server: buckets.Server, whole: Path, tmp_path: Path):
    server.inject(
        Fault("503", "GET", r"/o/root/1\.mp4", times=2),
        Fault("cut read", "GET", r"root/0\.mp4.*", least=1000),
        Fault("slow", "GET", r"/o/root/2\.mp4", seconds=1.0),
        Fault("503", "POST", r"/upload/", times=2),
        Fault("cut write", "POST", r"/upload/", least=1000),
        Fault("503 after", "POST", r"/upload/"),
        Fault("503", "GET", r"rows\.jsonl"),
        Fault("503", "POST", r"/(copyTo|rewriteTo)/", times=2),
        Fault("503 after", "DELETE", r"part-"),
    )
    assert build_shards.main(flags("faults", "--workers=1")) == 0
    assert not server.waiting()
    server.heal()
    check_equal(server, "faults", whole, tmp_path / "copy")
    local, remote = Records(str(whole / "whole"), "train"), Records(f"gs://{SETS}/faults", "train")
    assert len(local) == len(remote) == 85
    assert all(list(local[i].frames) == list(remote[i].frames) for i in (0, 40, 84))


def test_a_bucket_that_refuses_is_no_reject(server: buckets.Server, whole: Path, tmp_path: Path, capfd):
    server.inject(Fault("403", "GET", r"/o/root/2\.mp4", times=-1))
    assert build_shards.main(flags("refused", "--workers=1")) == 5
    server.heal()
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: gs://{CLIPS}/root/2.mp4: ") and "injected 403" in line
    assert line.count("run the same command again") == 1
    assert build_shards.main(flags("refused", "--workers=1")) == 0
    check_equal(server, "refused", whole, tmp_path / "copy")


def test_an_interrupted_publication_is_refused_by_readers_and_finished(
    server: buckets.Server, whole: Path, tmp_path: Path, capfd
):
    server.inject(Fault("403", "POST", r"(copyTo|rewriteTo).*00007-of-", times=-1))
    assert build_shards.main(flags("publishing", "--workers=1")) == 5
    server.heal()
    assert "; run the same command again" in capfd.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="split 'train' is being published"):
        Records(f"gs://{SETS}/publishing", "train")
    assert build_shards.main(flags("publishing", "--workers=1")) == 0
    assert "resuming" not in capfd.readouterr().err, "only the publication goes on"
    check_equal(server, "publishing", whole, tmp_path / "copy")


def test_kills_of_a_worker_and_of_the_driver(server: buckets.Server, whole: Path, tmp_path: Path):
    server.inject(Fault("slow", "POST", r"/upload/", times=-1, seconds=0.3))
    process = builds.start(flags("kills", "--workers=2"))
    builds.wait_for(process, lambda: parts(server, "kills"), 1)
    builds.kill_a_worker(process, seed=2)
    builds.wait_for(process, lambda: parts(server, "kills"), 4)
    builds.wait_until_gone(builds.kill_the_driver(process))
    server.heal()
    assert build_shards.main(flags("kills", "--workers=1")) == 0
    check_equal(server, "kills", whole, tmp_path / "copy")


def test_mistakes_are_one_line_and_leave_nothing(server: buckets.Server, whole: Path, capfd):
    server.put(CLIPS, "bad.csv", b'video_id:FILE,title\n0.mp4,a\n1.mp4,"b\n')
    before = server.names(SETS)
    for flag, message in (
        (f"--csv=gs://{CLIPS}/bad.csv", f"gs://{CLIPS}/bad.csv, line 3: a quoted field does not end"),
        (f"--csv=gs://{CLIPS}/none.csv", f"--csv gs://{CLIPS}/none.csv: no such file"),
        (f"--video_root=gs://{CLIPS}/none", f"--video_root gs://{CLIPS}/none: no such folder"),
        ("--out=gs://nobody/x", "there is no bucket gs://nobody"),
        (f"--allow_links_to={whole}", "--allow_links_to: a bucket has no links"),
    ):
        assert build_shards.main([*flags("mistakes", "--workers=1"), flag]) == 2, flag
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert server.names(SETS) == before


def test_index_shards_reads_a_bucket(server: buckets.Server, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(index_shards, "BLOCK", 5000)  # several requests a shard
    server.put_folder(SETS, "old", whole / "whole")
    indices = {name: server.get(SETS, name) for name in server.names(SETS, "old/") if name.endswith(".npy")}
    assert len(indices) == 10
    for name in indices:
        server.delete(SETS, name)
    server.inject(Fault("cut read", "GET", r"tfrecord-00003", least=1000), Fault("503", "GET", r"tfrecord-00004"))
    assert index_shards.main([f"gs://{SETS}/old"]) == 0
    assert not server.waiting() and capsys.readouterr().out == "85 records in 10 shards\n"
    assert {name: server.get(SETS, name) for name in server.names(SETS, "old/") if name.endswith(".npy")} == indices
    shard = f"old/{schema.shard_name('youku_mplug', 'train', 2, 10)}"
    data = bytearray(server.get(SETS, shard))
    data[30] ^= 1
    server.put(SETS, shard, bytes(data))
    assert index_shards.main([f"gs://{SETS}/old"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: gs://{SETS}/{shard}: record 0 at byte 0: wrong checksum; build or copy the shard again"


def test_names_of_videos(server: buckets.Server):
    server.put(CLIPS, "more/a/é.mp4", b"x")
    server.put(CLIPS, "more/b.mp4", b"yy")
    found = open_videos(f"gs://{CLIPS}/more")
    assert sorted(found.names()) == ["a/é.mp4", "b.mp4"]
    assert [found.present(name) for name in ("b.mp4", "a/e\u0301.mp4", "c.mp4", "../root/0.mp4", "a")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    with found.file("a/e\u0301.mp4") as local:
        assert local.read_bytes() == b"x" and local.suffix == ".mp4"
    assert not local.exists()
    folder = local.parent
    found.close()
    assert not folder.exists()
    assert json.dumps(sorted(open_videos(f"gs://{CLIPS}/root").names())) == '["0.mp4", "1.mp4", "2.mp4"]'
