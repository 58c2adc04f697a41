"""Planted corpora: the truth is true, everything is determined by the seed, and writing is atomic."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep import plant, plant_copies, plant_titles
from data_prep.draw_shapes import main
from data_prep.plant import Upload, pictures, plan

CLIPS = 120


@pytest.fixture(scope="module")
def uploads() -> list[Upload]:
    return plan(CLIPS, 7)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_shares_of_faults(uploads):
    counts = Counter(one.fault for one in uploads)
    assert counts == {"clean": 72, "duplicate": 19, "text": 10, "wrong_title": 7, "black": 6, "frozen": 6}
    kinds = Counter(one.kind for one in uploads if one.fault == "duplicate")
    assert set(kinds) == set(plant_copies.COPIES) and max(kinds.values()) - min(kinds.values()) <= 1
    assert {one.kind for one in uploads if one.fault == "text"} == set(plant_titles.FAULTS)


def test_sources_are_uneven(uploads):
    counts = Counter(one.source for one in plan(600, 0)).most_common()
    assert len(counts) == plant.SOURCES and counts[0][1] > 5 * counts[-1][1]


def test_originals_are_clean_and_wrong_titles_are_wrong(uploads):
    by_file = {one.file: one for one in uploads}
    assert len(by_file) == CLIPS
    for one in uploads:
        assert bool(one.original) == (one.fault in ("duplicate", "wrong_title"))
        if one.original:
            original = by_file[one.original]
            assert original.fault == "clean"
            if one.fault == "wrong_title":
                assert one.title == original.title
                assert one.scene.colour not in one.title and one.scene.shape not in one.title
            else:
                assert original.title in one.title and one.scene == original.scene


def test_scenes_and_clean_titles_are_distinct(uploads):
    own = [one for one in uploads if one.fault != "duplicate"]
    assert len({one.scene for one in own}) == len({one.scene.title for one in own}) == len(own)


def test_equal_seeds_plan_the_same_and_others_do_not(uploads):
    assert plan(CLIPS, 7) == uploads
    assert plan(CLIPS, 8) != uploads


def test_faulty_titles():
    rng = np.random.default_rng(0)
    for _ in range(20):
        made = {name: fault("云彩前红色的圆形在向上移动", rng) for name, fault in plant_titles.FAULTS.items()}
        assert re.search(r"\w\.(com|cn|net)", made["url"])
        assert re.search(r"1[3-9]\d([- ]?\d{4}){2}", made["phone"])
        assert len(made["short"]) == 1
        assert not re.search("[一-鿿]", made["foreign"])
        assert max(Counter(made["repeated"]).values()) >= 8


@pytest.mark.parametrize("kind", plant_copies.COPIES)
def test_copies_are_changed_but_show_the_same(kind):
    frames = np.random.default_rng(0).integers(0, 256, (32, 48, 64, 3), np.uint8)
    made = plant_copies.COPIES[kind](frames, np.random.default_rng(1))
    assert made.dtype == np.uint8 and made.ndim == 4
    assert made.shape != frames.shape or not np.array_equal(made, frames)
    if kind == "faster":
        assert len(made) == 29
    if kind == "trimmed":
        assert 24 <= len(made) < 32
    if kind == "cropped":
        assert made.shape[1:3] == (44, 58)


def test_pictures_of_faults(uploads):
    first = {fault: next(one for one in uploads if one.fault == fault) for fault in ("black", "frozen", "clean")}
    frozen = pictures(first["frozen"]).astype(int)
    assert np.abs(frozen - frozen[0]).mean() < 3
    black = pictures(first["black"])
    assert np.mean(black[len(black) // 2] <= 16) > 0.95
    moving = pictures(first["clean"])
    assert np.abs(moving[-1].astype(int) - moving[len(moving) // 4]).max() > 20 or first["clean"].scene_kind == "pause"


def test_the_program_writes_what_was_planned_and_the_same_again(tmp_path, capsys):
    command = ["--plant", "3", "--clips", "60", "--out"]
    for name in ("a", "b"):
        assert main([*command, str(tmp_path / name)]) == 0
    assert "60 uploads: 35 clean" in capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 63
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    raw, truth = rows(tmp_path / "a/raw.csv"), rows(tmp_path / "a/truth.csv")
    assert list(raw[0]) == ["video_id:FILE", "title", "source"] and list(truth[0]) == [
        "video_id:FILE",
        "fault",
        "original",
    ]
    assert [row["video_id:FILE"] for row in raw] == [row["video_id:FILE"] for row in truth]
    assert len(json.loads((tmp_path / "a/plant.json").read_text(encoding="utf-8"))["kinds"]) == 60
    with av.open(str(tmp_path / "a" / raw[0]["video_id:FILE"])) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 14

    assert main([*command, str(tmp_path / "a")]) == 0
    assert "already drawn" in capsys.readouterr().out
    assert main(["--plant", "4", "--clips", "60", "--out", str(tmp_path / "a")]) == 2
    assert "holds a corpus planted with" in capsys.readouterr().err
    (tmp_path / "a" / raw[0]["video_id:FILE"]).unlink()
    assert main([*command, str(tmp_path / "a")]) == 2
    assert "lacks 1 of its files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clips", "10"], "--clips 10: a planted corpus has 60 to 768 clips; give a number in between"),
        (["--clips", "1000"], "--clips 1000: a planted corpus has 60 to 768 clips; give a number in between"),
        (["--seed", "1"], "--seed: --plant has no such choice; remove the flag; --help lists the flags"),
        (["--chat", "80"], "--chat: --plant has no such choice; remove the flag; --help lists the flags"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, tmp_path, capsys):
    try:
        code = main(["--plant", "0", "--out", str(tmp_path / "out"), *flags])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()
