"""Builds of shards: records, rejects, manifest, resuming and errors. In one process unless the runner matters."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import videos
from data_prep import build_shards, partition, publish
from ymplug_jax.data import schema, video_container, video_file
from ymplug_jax.data.frames import decode_frames
from ymplug_jax.data.records import Records

ROOT = Path(__file__).parent.parent.parent
PRETRAIN = "video_id:FILE,title"


def build(out: Path, csv: Path, root: Path, *more: str, kind: str = "pretrain", frames: int = 4) -> dict:
    flags = [
        "--config",
        kind,
        "--csv",
        str(csv),
        "--video_root",
        str(root),
        "--out",
        str(out),
        "--num_frames",
        str(frames),
        "--workers",
        "1",
    ]
    return build_shards.build(*build_shards.parse([*flags, *more]))


def command(out: Path, csv: Path, root: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "data_prep.build_shards",
        "--config=pretrain",
        f"--csv={csv}",
        f"--video_root={root}",
        f"--out={out}",
        *more,
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video root with valid and invalid files."""
    root = tmp_path_factory.mktemp("root")
    videos.write(root / "a.mp4")
    videos.write(root / "b.mkv", frames=40)
    videos.write(root / "short.mp4", frames=3)
    videos.write(root / "old.avi", codec="mpeg4")
    videos.write(root / '小猫 "打滚", it\'s.mp4')
    videos.write(root / "tiny.mp4", size=(8, 8))
    videos.write(root / "wide.mp4", size=(640, 320))
    videos.write_sound(root / "sound.wav")
    (root / "empty.mp4").touch()
    (root / "page.mp4").write_text("<html>not found</html>")
    whole = (root / "b.mkv").read_bytes()
    (root / "noindex.mp4").write_bytes((root / "a.mp4").read_bytes()[:700])
    (root / "cut.mkv").write_bytes(whole[:200])
    (root / "outside.mp4").symlink_to("/etc/hostname")
    return root


BAD = {
    "nowhere.mp4": "missing_file",
    "empty.mp4": "empty_file",
    "page.mp4": "not_a_video",
    "sound.wav": "no_video_stream",
    "noindex.mp4": "unreadable",
    "tiny.mp4": "too_small",
    "/etc/passwd": "hostile_path",
    "../a.mp4": "hostile_path",
    "outside.mp4": "hostile_path",
}
GOOD = ("a.mp4", "b.mkv", "short.mp4", "old.avi", '小猫 "打滚", it\'s.mp4', "wide.mp4")


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    names = [name for pair in zip(BAD, [*GOOD, *GOOD], strict=False) for name in pair]
    csv = videos.write_csv(folder / "all.csv", PRETRAIN, [(name, f"标题 {name}") for name in names], bom=True)
    build(folder / "out", csv, root, "--partition_rows", "5")
    return folder / "out"


def test_every_row_is_a_record_or_a_reject_with_its_reason(built: Path):
    manifest = json.loads((built / schema.MANIFEST).read_text())
    rejects = [json.loads(line) for line in (built / schema.REJECTS).read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in rejects} == BAD
    assert all(line["split"] == "train" and line["detail"] and line["row"] % 2 == 0 for line in rejects)
    assert manifest["written"] + manifest["rejected"] == manifest["rows"] == 18
    assert manifest["schema_version"] == schema.SCHEMA_VERSION and len(manifest["splits"]["train"]["csv_sha256"]) == 64
    assert manifest["duplicated_ids"] == 3, "three good clips stand in the list twice"
    records = Records(str(built), "train")
    assert sorted(records[i].media_id for i in range(len(records))) == sorted([*GOOD, *GOOD[:3]])
    assert all(records[i].title == f"标题 {records[i].media_id}" for i in range(len(records)))


def test_frames_are_evenly_spaced_and_timed(built: Path):
    records = Records(str(built), "train")
    by_name = {records[i].media_id: records[i] for i in range(len(records))}
    clip = by_name["a.mp4"]
    shades = decode_frames(clip.frames, range(4)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose((shades - 20) / 8, [3, 9, 15, 21], atol=0.5)
    np.testing.assert_allclose(clip.timestamps / 1e6, np.array([3, 9, 15, 21]) / 12, atol=2e-3)
    short = by_name["short.mp4"]
    assert short.frames[2] == short.frames[3] != short.frames[1], "the last frame is repeated"
    assert decode_frames(by_name["wide.mp4"].frames, [0]).shape == (1, 256, 512, 3)
    assert decode_frames(clip.frames, [0]).shape == (1, 48, 64, 3), "small videos are not blown up"


def test_tfds_loads_it(built: Path):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(built)
    assert builder.info.splits["train"].num_examples == 9
    assert set(builder.info.features) == {"image", "clip", "caption"}
    examples = list(builder.as_dataset(split="train").as_numpy_iterator())
    assert len(examples) == 9
    titles = {example["clip"]["title"].decode() for example in examples}
    assert titles == {f"标题 {name}" for name in GOOD}
    assert all(example["image"]["encoded"].shape[0] == 4 for example in examples)


def test_repeated_build_changes_nothing(built: Path, root: Path, capsys: pytest.CaptureFixture):
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    build(built, built.parent / "all.csv", root, "--partition_rows", "5")
    assert "already exists" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    with pytest.raises(build_shards.BuildError, match="another CSV or with other settings; give --overwrite"):
        build(built, built.parent / "all.csv", root, "--partition_rows", "6")
    with pytest.raises(build_shards.BuildError, match="holds a pretrain data set with 4 frames"):
        build(built, built.parent / "all.csv", root, frames=5)


def test_the_four_kinds_and_their_splits(root: Path, tmp_path: Path):
    out = tmp_path / "c"
    for split, labels in (("train", ("宠物", "")), ("val", ("财经", "不存在")), ("test", ("", ""))):
        csv = videos.write_csv(
            tmp_path / f"classification_{split}.csv",
            PRETRAIN + ",label",
            [("a.mp4", "甲", labels[0]), ("b.mkv", "乙", labels[1])],
        )
        manifest = build(out, csv, root, kind="classification")
    assert {name: entry["written"] for name, entry in manifest["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "test": 2,
    }
    assert [Records(str(out), "train")[i].label_index for i in range(2)] == [36, -1]
    assert Records(str(out), "validation")[0].label_text == "财经"
    (reject,) = [json.loads(line) for line in (out / schema.REJECTS).read_text().splitlines()]
    assert reject["split"] == "validation" and reject["reason"] == "unknown_label" and "不存在" in reject["detail"]

    csv = videos.write_csv(
        tmp_path / "captioning_val.csv",
        "video_id:FILE,golden_caption",
        [("a.mp4", "['一。', '二。']"), ("b.mkv", "只有一句"), ("a.mp4", "['坏"), ("b.mkv", "")],
    )
    build(tmp_path / "cap", csv, root, kind="captioning")
    records = Records(str(tmp_path / "cap"), "validation")
    assert [records[i].captions for i in range(len(records))] == [["一。", "二。"], ["只有一句"], []]

    csv = videos.write_csv(
        tmp_path / "retrieval_train.csv", "clip_name:FILE,caption", [("a.mp4", "甲"), ("a.mp4", "乙")]
    )
    assert build(tmp_path / "r", csv, root, kind="retrieval")["duplicated_ids"] == 1
    assert [Records(str(tmp_path / "r"), "train")[i].captions for i in range(2)] == [["甲"], ["乙"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"id,title\nx,y\n", "no column 'video_id:FILE'"),
        (b"video_id:FILE,title\n", "no rows"),
        ("video_id:FILE,title\na,小猫打滚".encode("gbk"), "not UTF-8"),
    ],
)
def test_unusable_csv(tmp_path: Path, root: Path, text: bytes, message: str):
    (tmp_path / "x.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", tmp_path / "x.csv", root)
    assert not (tmp_path / "out").exists()


def test_own_class_names(root: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_bytes("\ufeff猫\r\n狗\n".encode())
    (tmp_path / "other.txt").write_text("狗\n猫\n", encoding="utf-8")
    rows = [("a.mp4", "甲", "狗"), ("b.mkv", "乙", "宠物")]
    csv = videos.write_csv(tmp_path / "c_train.csv", PRETRAIN + ",label", rows)
    val = videos.write_csv(tmp_path / "c_val.csv", PRETRAIN + ",label", rows)
    names, out = ("--classes", str(tmp_path / "names.txt")), tmp_path / "out"
    assert build(out, csv, root, *names, kind="classification")["classes"] == ["猫", "狗"]
    assert Records(str(out), "train")[0].label_index == 1
    (reject,) = [json.loads(line) for line in (out / schema.REJECTS).read_text().split("\n")[:-1]]
    assert (reject["reason"], reject["id"]) == ("unknown_label", "b.mkv")
    for more in ((), ("--classes", str(tmp_path / "other.txt"))):
        with pytest.raises(build_shards.BuildError, match="built with other classes"):
            build(out, val, root, *more, kind="classification")
    with pytest.raises(build_shards.BuildError, match="--classes: applies to --config classification"):
        build(out, csv, root, *names)


def test_publication_resumes_after_a_full_disk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk is full at the last file: no valid data set remains, other splits are kept, and the same command finishes."""
    first = videos.write_csv(tmp_path / "x_val.csv", PRETRAIN, [("a.mp4", "甲")])
    csv = videos.write_csv(
        tmp_path / "x.csv", PRETRAIN, [("a.mp4", "上\u2028下"), ("b.mkv", "乙"), ("no\u2028.mp4", "丙")]
    )
    build(tmp_path / "out", first, root)
    write = publish.places.write_text

    def full(path: Path, text: str) -> None:
        if path.name == schema.MANIFEST and schema.PUBLISHING not in json.loads(text):
            raise OSError(28, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(publish.places, "write_text", full)
    with pytest.raises(
        build_shards.PlaceError,
        match=r"manifest.json: cannot be written \(No space left on device\); make it writable, then run the same command",
    ):
        build(tmp_path / "out", csv, root)
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=r"manifest.json: split 'train' is being published; wait until"):
            Records(str(tmp_path / "out"), split)
    monkeypatch.setattr(publish.places, "write_text", write)
    manifest = build(tmp_path / "out", csv, root)
    assert {name: entry["written"] for name, entry in manifest["splits"].items()} == {"validation": 1, "train": 2}
    assert Records(str(tmp_path / "out"), "train")[0].title == "上\u2028下"
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / schema.REJECTS).read_text().split("\n")[:-1]]
    assert reject["id"] == "no\u2028.mp4" and not (tmp_path / "out" / build_shards.BUILDING).exists()


def test_a_full_disk_while_partitions_are_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [("a.mp4", "甲")])
    flags = ["--config=pretrain", f"--csv={csv}", f"--video_root={root}", f"--out={tmp_path / 'out'}", "--workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert build_shards.main(flags) == 5
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.startswith(f"error: {tmp_path / 'out'}") and "No space left on device; fix this" in line
    assert build_shards.main(flags) == 0
    assert f"{tmp_path / 'out'}: train: 1 rows (data set: 1), " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--time_limt=5", "--time_limt: unknown flag; did you mean --time_limit?"),
        ("--num_frame=5", "--num_frame: unknown flag; did you mean --num_frames?"),
        ("--nonsense", "--nonsense: unknown flag"),
        ("--num_frames=0", "--num_frames 0: too small; give 1 or more"),
        ("--num_frames=x", "argument --num_frames: invalid int value: 'x'"),
        ("--config=video", "argument --config: invalid choice: 'video'"),
        ("--out=gs:/bucket/x", "gs:/bucket/x: not a place; write gs://bucket/x"),
        ("--video_root=ftp://host/x", "ftp://host/x: ftp:// is not supported; give a local path"),
        ("--out={file}/out", "cannot be created or written (Not a directory); choose another folder"),
        ("--video_root={file}", "a file, not a folder; give the folder of the videos"),
        ("--csv=nowhere.csv", "--csv nowhere.csv: no such file"),
    ],
)
def test_errors_are_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flag: str, message: str):
    csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [("a.mp4", "甲")])
    flags = ["--config=pretrain", f"--csv={csv}", f"--video_root={root}", f"--out={tmp_path / 'out'}"]
    try:
        code = build_shards.main([*flags, flag.replace("{file}", str(csv))])
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert code == 2 and line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_error_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(build_shards.importlib.util, "find_spec", lambda name: None)
    assert build_shards.main(["--config=pretrain", "--csv=x", "--video_root=x", "--out=x"]) == 2
    assert capsys.readouterr().err.endswith("not installed; run pip install 'ymplug_jax[prep]'\n")


def test_too_many_rejects_publish_nothing(tmp_path: Path, root: Path):
    csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [("a.mp4", "甲"), ("nowhere.mp4", "乙")])
    with pytest.raises(
        build_shards.BuildError,
        match=r"1 of 2 rows were rejected and nothing was published; .*raise --max_rejects 0.25",
    ):
        build(tmp_path / "out", csv, root, "--max_rejects", "0.25")
    with pytest.raises(FileNotFoundError, match="no split"):
        Records(str(tmp_path / "out"), "train")
    assert build(tmp_path / "out", csv, root, "--max_rejects", "0.5")["written"] == 1


@pytest.mark.slow
def test_killed_build_resumes(tmp_path: Path, root: Path):
    """After kill -9, finished partitions are kept, and no reader sees a shard before the build ends."""
    csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [(("a.mp4", "b.mkv")[i % 2], f"第{i}个") for i in range(600)])
    out, work = tmp_path / "out", tmp_path / "out" / build_shards.BUILDING / "train"
    run = command(out, csv, root, "--partition_rows=20", "--workers=1")
    process = subprocess.Popen(run, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(work.glob("part-*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {
        path.name: path.stat().st_mtime_ns
        for path in work.glob("part-*.tfrecord")
        if path.with_suffix(".json").exists()
    }
    assert 3 <= len(done) < 30
    with pytest.raises(FileNotFoundError, match="no split"):
        Records(str(out), "train")
    again = subprocess.run([*run[:-1], "--workers=2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"resuming: {len(done)} of 30 partitions" in again.stderr
    records = Records(str(out), "train")
    assert sorted(int(records[i].title[1:-1]) for i in range(len(records))) == list(range(600))
    assert {path.stat().st_mtime_ns for path in out.glob("*.tfrecord-?????-of-?????")} >= set(done.values()), (
        "not written again"
    )
    assert not (out / build_shards.BUILDING).exists()


def test_damaged_partition_is_rebuilt(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch):
    csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [("a.mp4", "甲"), ("b.mkv", "乙")])
    frame, run_beam = partition.frame, build_shards._run_beam
    work = tmp_path / "out" / build_shards.BUILDING / "train"

    def flipped(payload: bytes) -> bytes:
        data = bytearray(frame(payload))
        data[50] ^= 1
        return bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(partition, "frame", flipped)
        with pytest.raises(
            build_shards.PlaceError, match=r"record 0 at byte 0: wrong checksum; .* run the same command"
        ):
            build(tmp_path / "out", csv, root, "--partition_rows", "1")
    assert sorted(path.name for path in work.iterdir()) == ["attempt", "build.json", "rows.jsonl", "rows.npy"]

    def cut(*args) -> None:
        run_beam(*args)
        with (work / "part-00001.tfrecord").open("r+b") as shard:
            shard.truncate(100)

    monkeypatch.setattr(build_shards, "_run_beam", cut)
    with pytest.raises(
        build_shards.BuildError,
        match=r"part-00001.tfrecord: 100 bytes, but .* were written; the same command rebuilds only this partition",
    ):
        build(tmp_path / "out", csv, root, "--partition_rows", "1")
    monkeypatch.setattr(build_shards, "_run_beam", run_beam)
    before = (work / "part-00000.tfrecord").stat().st_mtime_ns
    assert build(tmp_path / "out", csv, root, "--partition_rows", "1")["written"] == 2
    kept = [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tfrecord-?????-of-?????")]
    assert before in kept and len(kept) == 2


def test_hanging_clip_is_rejected(root: Path):
    """A decoder that does not answer, as when it hangs in C, is killed; the next clip gets a new process."""
    reader = video_file.Reader(time_limit=30.0)
    assert len(reader.read(root / "a.mp4", 4).frames) == 4
    reader._limit = 1.0
    os.kill(reader._child.pid, signal.SIGSTOP)
    with pytest.raises(video_file.Reject) as caught:
        reader.read(root / "a.mp4", 4)
    assert caught.value.reason == "timed_out"
    reader._limit = 30.0
    assert len(reader.read(root / "a.mp4", 4).frames) == 4
    reader.close()


def test_oversized_pictures_are_rejected_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path):
    monkeypatch.setattr(video_container, "MAX_PIXELS", 1000)
    with pytest.raises(video_file.Reject, match="too_large"):
        video_file.read_clip(str(root / "a.mp4"), 4)
    monkeypatch.setattr(video_file, "MAX_BYTES", 10)
    with pytest.raises(video_file.Reject, match="bytes; the limit is 10"):
        video_file.read_clip(str(root / "a.mp4"), 4)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended"
        with socket.socket() as client:
            if client.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing answers on port {port}")


@pytest.mark.slow
def test_portable_job_service_with_external_workers(tmp_path: Path, root: Path):
    """The protocol of Beam clusters: a job service, and a pool that starts the workers."""
    jobs, pool = free_port(), free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the pool runs the command `python`
    services = [
        subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for module, flags in (
            ("apache_beam.runners.portability.local_job_service_main", ["-p", str(jobs)]),
            ("apache_beam.runners.worker.worker_pool_main", [f"--service_port={pool}"]),
        )
    ]
    try:
        for port, service in zip((jobs, pool), services, strict=True):
            wait_for(port, service)
        csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [("a.mp4", "甲"), ("b.mkv", "乙"), ("empty.mp4", "丙")])
        flags = [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{jobs}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool}",
        ]
        done = subprocess.run(
            command(tmp_path / "out", csv, root, "--partition_rows=1", *flags),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    finally:
        for service in services:
            service.kill()
            service.wait()
    records = Records(str(tmp_path / "out"), "train")
    assert sorted(records[i].title for i in range(len(records))) == ["乙", "甲"]
    assert cv2.imdecode(np.frombuffer(records[0].frames[0], np.uint8), cv2.IMREAD_COLOR).shape == (48, 64, 3)


def test_splits_that_are_built_side_by_side_are_both_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    csv = videos.write_csv(tmp_path / "x.csv", PRETRAIN, [("a.mp4", "甲")])
    val = videos.write_csv(tmp_path / "x_val.csv", PRETRAIN, [("b.mkv", "乙")])
    run_beam = build_shards._run_beam

    def other_first(*args) -> None:
        monkeypatch.setattr(build_shards, "_run_beam", run_beam)
        build(tmp_path / "out", val, root)
        run_beam(*args)

    monkeypatch.setattr(build_shards, "_run_beam", other_first)
    assert build(tmp_path / "out", csv, root)["splits"].keys() == {"train", "validation"}
    path = tmp_path / "out" / schema.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), schema.PUBLISHING: "test"}))
    with pytest.raises(
        build_shards.BuildError, match="split 'test' is being published by another command; wait for it"
    ):
        build(tmp_path / "out", csv, root, "--overwrite")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"kind": "pretrain", "frames": 16}', b"\xff\xfe", b'{"kind']
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(
        build_shards.BuildError, match=r"manifest\.json: damaged \(.*\); build into another --out$"
    ) as error:
        build_shards._old_manifest(tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "manifest.json").read_bytes() == content
