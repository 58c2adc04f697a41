"""Curation of a planted corpus: what is found, what the files say, and equal output for any number of workers and after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import builds
from data_prep import curate, draw_shapes
from data_prep.curate_steps import ComparePairs
from data_prep.curation import card, decisions
from data_prep.curation.decisions import STAGES
from ymplug_jax.core import places

CLIPS = 60
CONFIG = "--config=configs/tiny/curate.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted corpus with three more rows: an exact copy of a clean clip, a missing file and a text file."""
    root = tmp_path_factory.mktemp("curate") / "corpus"
    assert draw_shapes.main([f"--plant={11}", f"--clips={CLIPS}", f"--out={root}"]) == 0
    clean = next(file for file, (fault, _) in truth(root).items() if fault == "clean")
    title = next(row for row in read(root / "raw.csv") if row["video_id:FILE"] == clean)["title"]
    shutil.copy(root / clean, root / "videos" / "zz_copy.mp4")
    (root / "videos" / "text.mp4").write_text("no video")
    with open(root / "raw.csv", "a", encoding="utf-8") as stream:
        stream.write(
            f'videos/zz_copy.mp4,"{title}",uploader_00\n\nvideos/none.mp4,没有这个文件,\nvideos/text.mp4,这不是一个视频,\n'
        )
    return root


def flags(corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        CONFIG,
        f"--csv={corpus / 'raw.csv'}",
        f"--video_root={corpus}",
        f"--out={out}",
        "--partition_rows=8",
        *more,
    ]


@pytest.fixture(scope="module")
def curated(corpus: Path) -> Path:
    out = corpus.parent / "out"
    assert curate.main(flags(corpus, out, "--workers=1")) == 0
    return out


def read(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def truth(root: Path) -> dict[str, tuple[str, str]]:
    return {row["video_id:FILE"]: (row["fault"], row["original"]) for row in read(root / "truth.csv")}


def decided(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "decisions.parquet").to_pylist()


def test_planted_faults_are_found(corpus: Path, curated: Path):
    """Recall of each fault is at least 0.95, a clip of a pair of copies is kept, and at most 1 % of the clean clips is lost."""
    rows, faults = {row["video_id:FILE"]: row for row in decided(curated)}, truth(corpus)
    found: Counter[str] = Counter()
    lost = 0
    for file, (fault, original) in faults.items():
        row = rows[file]
        if fault in ("black", "frozen"):
            found[fault] += row["reason"] == fault
        elif fault == "text":
            found[fault] += row["stage"] == "titles"
        elif fault == "duplicate":
            found[fault] += not (row["kept"] and rows[original]["kept"])
        elif not row["kept"]:
            # A clean clip of which a copy with a larger picture is kept is not lost.
            lost += not any(
                one["kept"] and one["cluster"] and one["cluster"] == row["cluster"] for one in rows.values()
            )
    planted = Counter(fault for fault, _ in faults.values())
    for fault in ("black", "frozen", "text", "duplicate"):
        assert found[fault] >= 0.95 * planted[fault], (fault, found[fault], planted[fault])
    assert lost <= 0.01 * planted["clean"]


def test_clusters_name_copies(corpus: Path, curated: Path):
    """Clips of a cluster have one id, one of them is kept, and an exact copy is called one."""
    rows = decided(curated)
    ids = Counter(row["cluster"] for row in rows if row["cluster"])
    assert ids and min(ids.values()) >= 2
    for name in ids:
        assert sum(row["kept"] for row in rows if row["cluster"] == name) == 1
    copy = next(row for row in rows if row["video_id:FILE"] == "videos/zz_copy.mp4")
    twins = [row for row in rows if row["sha256"] == copy["sha256"]]
    assert len(twins) == 2 and copy["cluster"] == twins[0]["cluster"]
    assert "exact_duplicate" in [row["reason"] for row in twins] or not any(row["kept"] for row in twins)


def test_the_files_agree(corpus: Path, curated: Path):
    """All rows in order; kept and dropped are all; curated.csv has the kept lines as they stood; unchecked stages say so."""
    rows, raw = decided(curated), read(corpus / "raw.csv")
    assert [row["video_id:FILE"] for row in rows] == [row["video_id:FILE"] for row in raw]
    assert [row["reason"] for row in rows[-2:]] == ["missing_file", "not_a_video"]
    for row in rows:
        assert row["kept"] == (row["reason"] == "") and row["reason"] in STAGES.get(row["stage"], {"": ""})
        assert (row["safety"], row["safety_checked"], row["consistency_checked"]) == (
            None,
            "not checked",
            "not checked",
        )
    keep = [line for line, row in zip(raw, rows, strict=True) if row["kept"]]
    assert read(curated / "curated.csv") == keep
    lines = (corpus / "raw.csv").read_text(encoding="utf-8").splitlines(True)
    assert set((curated / "curated.csv").read_text(encoding="utf-8").splitlines(True)) <= set(lines)
    funnel = json.loads((curated / "funnel.json").read_text(encoding="utf-8"))
    dropped = {reason: n for stage in funnel["stages"] for reason, n in stage["reasons"].items()}
    assert funnel["rows"] == len(raw) and funnel["kept"] == len(keep) == len(raw) - sum(dropped.values())
    assert dropped == Counter(row["reason"] for row in rows if not row["kept"])
    assert not (curated / ".curating").exists()
    card = (curated / "card.html").read_text(encoding="utf-8")
    assert "http" not in card and all(f"<code>{reason}</code>" in card for reason in dropped) and "data:image" in card


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.slow
def test_two_workers_and_a_killed_run_give_equal_files(corpus: Path, curated: Path):
    """The command is killed with its workers while it scores, and started again with two workers."""
    out = corpus.parent / "killed"
    command = [sys.executable, "-m", "data_prep.curate", *flags(corpus, out, "--workers=2")]
    process = subprocess.Popen(
        command, cwd=builds.ROOT, env={**os.environ, "PYTHONPATH": str(builds.ROOT)}, stderr=subprocess.DEVNULL
    )
    work, end = out / curate.WORK / "scores", time.monotonic() + 200
    while len(list(work.glob("part-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    below = builds.descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    builds.wait_until_gone(list(below))
    assert not (out / "funnel.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("part-*.json")}
    code, _, err = _again(command)
    assert code == 0, err
    assert len(done) >= 2 and outputs(out) == outputs(curated)


def _again(command: list[str]) -> tuple[int, str, str]:
    process = subprocess.Popen(
        command,
        cwd=builds.ROOT,
        env={**os.environ, "PYTHONPATH": str(builds.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return builds.end(process)


def test_a_sample_is_exact_and_a_second_curation_is_refused(corpus: Path, curated: Path, capfd: pytest.CaptureFixture):
    """A Parquet listing in another order, --target and a cap: the counts are exact, and the sample is that of any order."""
    config = corpus.parent / "capped.py"
    config.write_text(
        "from data_prep.curation.settings import Curation, Diversity, Metadata, to_config_dict\n"
        "def get_config():\n"
        "    return to_config_dict(Curation(metadata=Metadata(min_seconds=0.05), diversity=Diversity(max_per_source=3)))\n"
    )
    every = pq.read_table(curated / "decisions.parquet").to_pylist()
    kept = {row["video_id:FILE"] for row in every if row["kept"]}
    raw = [row for row in read(corpus / "raw.csv") if row["video_id:FILE"] in kept][:24]
    given = []
    for name, listing in (("one", raw), ("other", raw[::-1])):
        pq.write_table(pa.Table.from_pylist(listing), corpus.parent / f"{name}.parquet")
        given.append(
            [
                f"--config={config}",
                f"--csv={corpus.parent / f'{name}.parquet'}",
                f"--video_root={corpus}",
                f"--out={corpus.parent / name}",
                "--workers=1",
            ]
        )
    for command in given:
        assert curate.main([*command, "--target=9"]) == 0
    one, other = (
        {row["video_id:FILE"]: row["reason"] for row in decided(corpus.parent / name)} for name in ("one", "other")
    )
    assert one == other
    sources = Counter(row["source"] for row in raw)
    counts = Counter(one.values())
    assert counts["source_cap"] == sum(max(0, count - 3) for count in sources.values()) > 0 and counts[""] == 9
    assert len(read(corpus.parent / "one" / "curated.csv")) == 9
    assert curate.main([*given[0], "--target=9"]) == 0 and "nothing to do" in capfd.readouterr().err
    assert curate.main([*given[0], "--target=8"]) == 2
    assert "holds a curation of another listing or with other settings" in capfd.readouterr().err


class Crash(RuntimeError):
    """Stands for the end of the process."""


def test_a_run_that_ends_in_any_later_step_is_resumed(
    corpus: Path, curated: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """It ends while it compares, decides, draws the card, and publishes; what was scored is not scored again."""
    out = corpus.parent / "stopped"
    points = ((ComparePairs, "_alike"), (decisions, "decide"), (card, "render"), (places, "upload"))
    inodes: set[int] = set()
    for owner, name in points:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crash)
            with pytest.raises(RuntimeError) as stopped:
                curate.main(flags(corpus, out, "--workers=1"))
        assert "Crash" in repr(stopped.value) and not (out / "funnel.json").exists()
        table = out / curate.WORK / "scores" / "part-00000.parquet"
        inodes.add(table.stat().st_ino)
    assert curate.main(flags(corpus, out, "--workers=1")) == 0 and outputs(out) == outputs(curated)
    assert len(inodes) == 1


def crash(*_: object, **__: object) -> None:
    raise Crash("Crash")
