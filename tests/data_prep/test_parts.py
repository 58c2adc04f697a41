"""Data sets built part by part and joined: records, rejects, and everything that must not be joined without a word."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

import buckets
import videos
from data_prep import build_shards, index_shards, join_parts, part_rows, parts
from data_prep.archives import Tar
from data_prep.build_flags import BuildError
from data_prep.rows import Row
from data_prep.videos import open_videos
from ymplug_jax.core import places
from ymplug_jax.data import schema
from ymplug_jax.data.records import Records
from ymplug_jax.data.source import fingerprint, open_split

HEADER = "video_id:FILE,title"
TRAIN = ("v/a.mp4", "v/b.mp4", "gone.mp4", "v/c.mp4", "v/a.mp4", "v/page.mp4", "v/小猫.mp4", "v/d.mp4")
PLACES = {
    "first": ("v/a.mp4", "v/page.mp4"),
    "second": ("v/b.mp4", "v/小猫.mp4"),
    "third": ("v/c.mp4", "v/d.mp4", "v/e.mp4"),
}


def flags(csv: object, root: object, out: object, *more: str, frames: int = 2, kind: str = "pretrain") -> list[str]:
    given = {"config": kind, "csv": csv, "video_root": root, "out": out, "num_frames": frames, "workers": 1}
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def build(*args: object, **more: object) -> dict:
    return build_shards.build(*build_shards.parse(flags(*args, **more)))  # type: ignore[arg-type]


def join(out: object, *csvs: object, names: list[str] | None = None) -> dict:
    return join_parts.join(epath.Path(str(out)), [epath.Path(str(csv)) for csv in csvs], names)


def payloads(path: object, split: str = "train") -> list[tuple[str, str, list[bytes]]]:
    records = Records(str(path), split)
    return [(one.media_id, one.title, list(one.frames)) for one in map(records.__getitem__, range(len(records)))]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / schema.REJECTS).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos in a folder `all`, the same in a zip, a tar and a folder, and two CSVs."""
    root = tmp_path_factory.mktemp("source")
    for number, name in enumerate(("a", "b", "c", "d", "e", "小猫")):
        videos.write(root / "all" / "v" / f"{name}.mp4", frames=12 + number)
    (root / "all" / "v" / "page.mp4").write_text("<html>not found</html>")
    for name, files in PLACES.items():
        for file in files:
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "all" / file, root / name / file)
    shutil.make_archive(str(root / "first"), "zip", root / "first")
    shutil.make_archive(str(root / "second"), "tar", root / "second")
    videos.write_csv(root / "clips.csv", HEADER, [(name, f"标题 {i}") for i, name in enumerate(TRAIN)])
    videos.write_csv(root / "clips_val.csv", HEADER, [("v/e.mp4", "标题")])
    return root


def roots(source: Path) -> dict[str, Path]:
    return {"first": source / "first.zip", "second": source / "second.tar", "third": source / "third"}


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, with a validation split in one of them."""
    out = tmp_path_factory.mktemp("built") / "set"
    for name, root in roots(source).items():
        build(source / "clips.csv", root, out, f"--part={name}")
    build(source / "clips_val.csv", roots(source)["third"], out, "--part=third")
    return out


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "set"))


def csvs(source: Path) -> tuple[Path, Path]:
    return source / "clips.csv", source / "clips_val.csv"


def test_a_joined_set_has_the_bytes_of_a_build_in_one_piece(source: Path, out: Path, tmp_path: Path):
    one = build(source / "clips.csv", source / "all", tmp_path / "one")
    manifest = join(out, *csvs(source))
    whole, joined = payloads(tmp_path / "one"), payloads(out)
    assert sorted(joined) == sorted(whole) and len(whole) == 6
    by_part = [name for files in PLACES.values() for name in TRAIN if name in files and name != "v/page.mp4"]
    assert [name for name, _, _ in joined] == by_part, "records are in the order of the parts, then of the CSV"
    stored = [
        sorted(bytes(record) for file in sorted(folder.rglob("*train*-of-?????")) for record in _records(file))
        for folder in (tmp_path / "one", out)
    ]
    assert stored[0] == stored[1]
    entry = manifest["splits"]["train"]
    assert (entry["rows"], entry["written"], entry["rejected"], entry["missing"]) == (8, 6, 2, 1)
    assert entry["rejects"] == {"not_a_video": 1, "missing_file": 1} and entry["bytes"] == one["bytes"]
    assert [(line["row"], line["reason"], line.get("part")) for line in lines(out)] == [
        (5, "not_a_video", "first"), (2, "missing_file", None),
    ]  # fmt: skip
    assert manifest["kind"] == "pretrain" and manifest["frames"] == one["frames"]
    assert len(payloads(out, "validation")) == 1 and Records(str(out), "validation").kind == "pretrain"
    assert "set" in open_split(str(out), "train").path
    with pytest.raises(FileNotFoundError, match=r"no part has split 'test', they have train, validation"):
        Records(str(out), "test")


def _records(file: Path) -> Iterator[bytes]:
    data = file.read_bytes()
    for offset, size in np.load(file.with_name(file.name + schema.INDEX_SUFFIX)):
        yield data[offset : offset + schema.HEADER_BYTES + size + schema.FOOTER_BYTES]


def test_tfds_reads_the_parts(source: Path, out: Path):
    manifest = join(out, *csvs(source))
    found = tfds.builder_from_directories([str(out / part["name"]) for part in manifest["parts"]])
    assert found.info.splits["train"].num_examples == 6 and found.info.splits["validation"].num_examples == 1
    ids = [example["clip"]["media_id"].decode() for example in tfds.as_numpy(found.as_dataset("train"))]
    assert sorted(ids) == sorted(name for name, _, _ in payloads(out))


def test_indices_of_all_parts_are_written_again(source: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    join(out, *csvs(source))
    before = payloads(out)
    lost = next((out / "second").glob(f"*{schema.INDEX_SUFFIX}"))
    lost.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{lost.name} is missing .*write it with python -m data_prep.index_shards {out}"
    ):
        Records(str(out), "train")
    assert index_shards.main([str(out)]) == 0 and "7 records in 4 shards" in capsys.readouterr().out
    assert payloads(out) == before


def test_a_part_built_again_is_refused_until_it_is_joined_again(source: Path, out: Path):
    join(out, *csvs(source))
    before, print_before = payloads(out), fingerprint(Records(str(out), "train"))
    build(source / "clips.csv", roots(source)["second"], out, "--part=second", "--overwrite")
    assert payloads(out) == before, "built again with the same bytes, it still fits"
    build(source / "clips.csv", roots(source)["second"], out, "--part=second", "--overwrite", "--partition_rows=1")
    with pytest.raises(
        ValueError, match=f"second: built again or extended .*python -m data_prep.join_parts --out {out}"
    ):
        Records(str(out), "train")
    join(out, *csvs(source))
    assert payloads(out) == before and fingerprint(Records(str(out), "train")) != print_before


def test_a_part_that_is_being_published_is_neither_read_nor_joined(source: Path, out: Path):
    join(out, *csvs(source))
    file = out / "first" / schema.MANIFEST
    ready = file.read_text()
    file.write_text(json.dumps({**json.loads(ready), "splits": {}, schema.PUBLISHING: "train"}))
    with pytest.raises(ValueError, match="first: built again or extended"):
        Records(str(out), "train")
    with pytest.raises(parts.PartError, match="first: only half built; wait for its build or run it again"):
        join(out, *csvs(source))
    build(source / "clips_val.csv", roots(source)["third"], out, "--part=third")  # parts are built side by side
    file.unlink()
    with pytest.raises(parts.PartError, match="first: only half built"):
        join(out, *csvs(source))
    with pytest.raises(
        FileNotFoundError, match=r"first/manifest\.json: missing, so the part was moved or is being built"
    ):
        Records(str(out), "train")
    file.write_text(ready)
    assert len(payloads(out)) == 6


def test_half_built_parts_are_left_out_on_request_only(source: Path, out: Path):
    work = out / "fourth" / ".building" / "train"
    work.mkdir(parents=True)
    (work / "build.json").touch()
    with pytest.raises(parts.PartError, match=r"fourth: only half built.*give --parts with the other parts"):
        join(out, *csvs(source))
    manifest = join(out, *csvs(source), names=["third", "first"])
    assert [part["name"] for part in manifest["parts"]] == ["first", "third"]
    assert manifest["splits"]["train"]["missing"] == 3 and len(payloads(out)) == 4
    with pytest.raises(parts.PartError, match=r"--parts fift: no such folder in .* holds first, fourth, second, third"):
        join(out, *csvs(source), names=["fift"])


def _frames(out: Path, source: Path) -> None:
    shutil.rmtree(out / "third")
    shutil.copytree(out / "second", out / "third")
    _edit(out / "third", lambda manifest: manifest["frames"].update(per_clip=4))


def _csv(out: Path, source: Path) -> None:
    _edit(out / "second", lambda manifest: manifest["splits"]["train"].update(csv_sha256="0" * 64))


def _edit(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / schema.MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def _cut_shard(out: Path, source: Path) -> None:
    file = next(file for file in (out / "second").iterdir() if file.name.endswith("-of-00001"))
    file.write_bytes(file.read_bytes()[:-1])


def _other_rows(out: Path, source: Path) -> None:
    np.save(out / "second" / parts.rows_name("train"), np.array([0, 1], np.uint32))


def _plain(out: Path, source: Path) -> None:
    _edit(out / "second", lambda manifest: manifest["splits"]["train"].pop("rows_sha256"))


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "other frames": (_frames, r"third: differs from .*first in --num_frames \(2 and 4\); build one of them again"),
    "other CSV": (_csv, r"second: differs from .*first in CSV of split 'train'"),
    "twice": (lambda out, _: shutil.copytree(out / "first", out / "copy"), r"first and .*copy: 2 rows of split 'train' are in both, the first is row 0;"),
    "short shard": (_cut_shard, r"train\.tfrecord-00000-of-00001: has [\d,]+ bytes, not [\d,]+; copy the part again"),
    "no index": (lambda out, _: next((out / "first").glob("*.index.npy")).unlink(), r"first.*index\.npy: missing; write it with"),
    "no rows": (lambda out, _: (out / "second/rows-train.npy").unlink(), r"rows-train\.npy: missing; copy the part again"),
    "other rows": (_other_rows, r"rows-train\.npy: not the rows of this part's manifest"),
    "no rejects": (lambda out, _: (out / "first" / schema.REJECTS).unlink(), r"rejects\.jsonl: missing"),
    "cut rejects": (lambda out, _: (out / "first" / schema.REJECTS).write_text('{"row": 5,'), r"rejects\.jsonl, line 1: damaged"),
    "no rejects in it": (lambda out, _: (out / "first" / schema.REJECTS).write_text(""), r"first: its rejects do not fit"),
    "no part": (_plain, r"second: built without --part"),
    "damaged": (lambda out, _: (out / "second" / schema.MANIFEST).write_text("{"), r"manifest\.json: damaged"),
    "nothing": (lambda out, _: [shutil.rmtree(out / name) for name in PLACES], r"no parts in it; build them with"),
    "own set": (lambda out, _: (out / schema.MANIFEST).write_text('{"kind": "pretrain"}'), r"holds a data set of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_refused_and_nothing_is_written(case: str, source: Path, out: Path):
    change, message = WRONG[case]
    change(out, source)
    before = sorted(out.rglob("*"))
    with pytest.raises(parts.PartError, match=message):
        join(out, *csvs(source))
    assert sorted(out.rglob("*")) == before


def test_every_csv_is_compared_by_content(source: Path, out: Path, tmp_path: Path):
    with pytest.raises(parts.PartError, match="no file for split 'validation'; give clips_val"):
        join(out, source / "clips.csv")
    shutil.copy(source / "clips.csv", tmp_path / "renamed.csv")
    join(out, tmp_path / "renamed.csv", source / "clips_val.csv")
    (tmp_path / "renamed.csv").write_text((source / "clips.csv").read_text() + "v/f.mp4,新\n")
    with pytest.raises(
        parts.PartError, match=r"renamed\.csv: no part was built from this file \(the parts are of clips.csv"
    ):
        join(out, tmp_path / "renamed.csv", source / "clips_val.csv")
    with pytest.raises(parts.PartError, match=r"nowhere\.csv: no such file"):
        join(out, tmp_path / "nowhere.csv")
    assert len(payloads(out)) == 6, "the earlier join stays"


def test_a_part_that_changes_while_it_is_joined_is_refused(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    check = join_parts.check_files

    def changing(part: parts.Part) -> None:
        check(part)
        _edit(out / "first", lambda manifest: manifest.update(written=7))

    monkeypatch.setattr(join_parts, "check_files", changing)
    with pytest.raises(parts.PartError, match="first: was built again while the parts were joined"):
        join(out, *csvs(source))
    assert not (out / schema.MANIFEST).exists()


def test_a_rejected_row_may_come_in_a_later_part(source: Path, out: Path, tmp_path: Path):
    shutil.copytree(source / "first", tmp_path / "again")
    videos.write(tmp_path / "again" / "v" / "page.mp4", frames=20)
    build(source / "clips.csv", tmp_path / "again", out, "--part=again")
    manifest = join(out, *csvs(source))
    assert manifest["splits"]["train"]["written"] == 7 and manifest["splits"]["train"]["rejects"] == {"missing_file": 1}
    assert [line["row"] for line in lines(out)] == [2]
    assert [name for name, _, _ in payloads(out)].count("v/a.mp4") == 2, "rows of the first part were left to it"


def test_what_a_part_cannot_be_built_from(source: Path, out: Path, tmp_path: Path):
    train, first = source / "clips.csv", roots(source)["first"]

    def refused(message: str, *args: object, **more: object) -> None:
        before = sorted(out.rglob("*"))
        with pytest.raises(ValueError, match=message):
            build(*args, **more)
        assert sorted(out.rglob("*")) == before

    refused(
        r"--part x: none of the 8 rows .*a row names v/a\.mp4, .*/v holds \w+\.mp4\); give as --video_root",
        train,
        source / "third" / "v",
        out,
        "--part=x",
    )
    refused(
        r"--part x: other parts have all 2 rows with files in .*third; leave", train, source / "third", out, "--part=x"
    )
    refused(r"--part x: differs from part .* in --num_frames \(2 and 3\)", train, first, out, "--part=x", frames=3)
    refused(r"--part \.\./x: not a name", train, first, out, "--part=../x")
    refused(
        r"--with_text_rows: applies to --config instruct with --part only",
        train,
        first,
        out,
        "--part=x",
        "--with_text_rows",
    )
    refused(r"first: a part; give --part first --out .*set", train, first, out / "first", "--overwrite")
    other = videos.write_csv(tmp_path / "clips.csv", HEADER, [("v/a.mp4", "other")])
    refused(r"--part x: differs from part .* in CSV of split 'train'", other, first, out, "--part=x")
    join(out, *csvs(source))
    refused(r"a data set of parts; give --part NAME", train, first, out)
    (tmp_path / "a.tar.gz").touch()
    refused(r"a compressed tar .*unpack it", train, tmp_path / "a.tar.gz", out, "--part=x")
    refused(r"--video_root .*clips\.csv: a file, not a folder", train, train, out, "--part=x")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / schema.MANIFEST).write_text('{"kind": "pretrain"}')
    refused(r"own: holds a data set of its own", train, first, tmp_path / "own", "--part=x")


def test_a_part_that_exists_needs_no_videos(
    source: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    build(source / "clips.csv", tmp_path / "empty", out, "--part=first")
    assert "already exists (2 records); nothing to do" in capsys.readouterr().err
    with pytest.raises(BuildError, match=r"none of the 8 rows .*empty is empty"):
        build(source / "clips.csv", tmp_path / "empty", out, "--part=first", "--overwrite")
    assert len(payloads(out / "first")) == 2, "the part is still there"


def test_rows_are_selected_as_a_stream(tmp_path: Path):
    (tmp_path / "b.mp4").touch()
    taken = np.array([False, True])
    rows = [Row(i, f"{'ab'[i % 2]}.mp4", "", (), "", -1, "") for i in range(6)]
    rows[4] = rows[4]._replace(media_id="\ud800.mp4")
    part = part_rows.PartRows(iter(rows), open_videos(tmp_path), taken)
    assert [row.number for row in part.select(iter(rows))] == [3, 5] and len(part) == 2
    assert part.facts()["csv_rows"] == 6
    part.save(epath.Path(tmp_path))
    assert np.load(tmp_path / part_rows.FILE).tolist() == [3, 5]


def test_files_that_come_after_a_kill_are_in_the_part(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(shutil.copytree(source / "second", tmp_path / "root"))
    monkeypatch.setattr(build_shards, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(source / "clips.csv", root, tmp_path / "out", "--part=x")
    monkeypatch.undo()
    shutil.copy(source / "third" / "v" / "c.mp4", root / "v")
    build(source / "clips.csv", root, tmp_path / "out", "--part=x")
    assert [name for name, _, _ in payloads(tmp_path / "out" / "x")] == ["v/b.mp4", "v/c.mp4", "v/小猫.mp4"]


def test_conversations_belong_to_the_part_with_all_their_files(source: Path, tmp_path: Path):
    def talk(*names: str) -> str:
        text = "Human: <|video|>\n" * len(names) + "Human: 什么？\nAI: 好。"
        return json.dumps({"video": list(names), "text": text})

    table = tmp_path / "talks.jsonl"
    table.write_text(
        "\n".join([talk("v/a.mp4"), talk("v/a.mp4", "v/c.mp4"), talk(), talk("v/c.mp4", "v/d.mp4")]) + "\n"
    )
    for name, more in (("first", ["--with_text_rows"]), ("third", [])):
        build(table, roots(source)[name], tmp_path / "out", f"--part={name}", *more, kind="instruct")
    manifest = join(tmp_path / "out", table)
    records = Records(str(tmp_path / "out"), "train")
    assert [len(records[i].media) for i in range(len(records))] == [1, 0, 2]
    assert manifest["missing"] == 1 and lines(tmp_path / "out")[0]["row"] == 1


def test_parts_in_a_bucket_from_archives_in_a_bucket(source: Path):
    with buckets.served("clips") as server:
        for name in ("first.zip", "second.tar", "clips.csv"):
            places.upload(source / name, f"gs://clips/raw/{name}")
        csv, out = "gs://clips/raw/clips.csv", "gs://clips/set"
        build(csv, "gs://clips/raw/first.zip", out, "--part=first")
        build(csv, "gs://clips/raw/second.tar", out, "--part=second")
        build(csv, source / "third", out, "--part=third")
        manifest = join(out, csv)
        assert manifest["splits"]["train"]["written"] == 6
        assert [name for name, _, _ in payloads(out)][:4] == ["v/a.mp4", "v/a.mp4", "v/b.mp4", "v/小猫.mp4"]
        assert not [name for name in server.names("clips") if ".building" in name]
        build(csv, "gs://clips/raw/second.tar", out, "--part=second", "--overwrite", "--partition_rows=1")
        with pytest.raises(ValueError, match="second: built again"):
            Records(out, "train")


def test_only_the_driver_reads_the_headers_of_a_tar(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scans = []
    members = Tar._members
    monkeypatch.setattr(Tar, "_members", lambda self, skipped: scans.append(1) or members(self, skipped))
    build(source / "clips.csv", roots(source)["second"], tmp_path / "out", "--part=second")
    assert len(scans) == 1 and not (tmp_path / "out" / "second" / ".building").exists()
