"""Contact sheets: text in any script, wrapping, size limits, supported files and errors."""

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest

import shards
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Record
from ymplug_jax.reports import contact_sheet, fonts


def record(i: int, frames: int = 4) -> Record:
    pictures = [shards.jpeg(10 * i + t, 40) for t in range(frames)]
    return Record(f"{i}.mp4", pictures, np.arange(frames) * 100_000, "", [], "", -1)


def test_each_clip_is_below_its_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {}
    monkeypatch.setattr(
        contact_sheet, "_compose", lambda width, height, pictures, words, form: seen.update(w=words, p=pictures) or b"x"
    )
    texts = [["videos/一.mp4", "1. 红色的圆形 (+0.512)"], "videos/two.mp4\n2. 蓝色 (-0.031)"]
    assert contact_sheet.draw(tmp_path / "s.png", [record(1), record(2)], texts, 2) == 2
    words = [word[2] for word in seen["w"]]
    assert words[:2] + words[4:6] == ["videos/一.mp4", "1. 红色的圆形 (+0.512)", "videos/two.mp4", "2. 蓝色 (-0.031)"]
    assert all(stamp.endswith(" s") for stamp in words[2:4] + words[6:]) and len(words) == 8
    rows = [y for _, y, *_ in seen["w"]]
    assert rows == sorted(rows) and rows[1] < seen["p"][0][1] < rows[4]  # text, its frames, the next text
    assert (tmp_path / "s.png").read_bytes() == b"x" and [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_unusual_texts_and_broken_frames_are_drawn(tmp_path: Path):
    broken = record(3)
    broken = broken._replace(frames=[b"", b"no picture", *broken.frames[2:]])
    words = Record("x.jsonl:1", [], np.zeros(0, np.int64), "", [], "", -1, "Human: 你好\nAI: 你好。")  # without media
    texts = [["a $ sign, 100 % and \\frac{", "两行\t制表符\x07"], [], ["你好。"], ["很长的名字" * 60]]
    for suffix in contact_sheet.SUFFIXES:
        assert contact_sheet.draw(tmp_path / f"s{suffix}", [record(1), broken, words, record(2, 1)], texts, 3) == 4
    image = cv2.imread(str(tmp_path / "s.png"))
    assert image.shape[1] == 2 * contact_sheet.MARGIN + 3 * contact_sheet.FRAME[0]
    assert contact_sheet.draw(tmp_path / "BIG.PNG", [record(1)], ["x"], 16) == 1
    with pytest.raises(ValueError, match="1 texts for 2 records"):
        contact_sheet.draw(tmp_path / "s.png", [record(1), record(2)], ["x"], 2)


def test_lines_are_wrapped_to_the_width():
    lines = contact_sheet.wrap(["视频" * 50, "one two " * 30], 620)
    assert "".join(lines[:2]).startswith("视频" * 40) and all(len(line) <= 42 for line in lines[:3])
    assert all(line.startswith(("one", "two")) for line in lines if line.isascii())
    many = contact_sheet.wrap([str(i) for i in range(50)], 620)
    assert len(many) == 12 and many[0] == "0" and many[-1] == "…"


def test_the_size_of_a_sheet_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contact_sheet, "_compose", lambda width, height, *_: height.to_bytes(4, "big"))
    assert contact_sheet.draw(tmp_path / "s.png", [record(1)] * 500, ["x"] * 500, 2) == 64
    assert contact_sheet.draw(tmp_path / "s.png", [record(1)] * 64, [["x"] * 12] * 64, 64) < 64
    assert int.from_bytes((tmp_path / "s.png").read_bytes(), "big") < 65_536


def test_files_that_cannot_be_written_are_refused_early(tmp_path: Path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("s.gif", "cannot draw .gif"),
        ("s", "cannot draw no suffix"),
        ("s.mp4", "cannot draw .mp4"),
        ("folder.png", "a folder, not a file"),
        ("nowhere/s.png", "no such folder"),
        ("file/s.png", "no such folder"),
    ):
        with pytest.raises(Mistake, match=message) as caught:
            contact_sheet.check(tmp_path / name)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("--sheet ")
    for name in ("s.png", "S.JPG", "a.b.webp"):
        contact_sheet.check(tmp_path / name)


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(contact_sheet, "_compose", lambda *_: b"x")
    with pytest.raises(Mistake, match="No space left on device"):
        contact_sheet.draw(tmp_path / "s.png", [record(1)], ["x"], 2)
    assert not list(tmp_path.iterdir())


def test_a_missing_chinese_font_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    fonts.families.cache_clear()
    monkeypatch.setattr(fonts, "_chinese", lambda manager: None)
    with caplog.at_level(logging.ERROR):
        assert fonts.families() == ("DejaVu Sans",) and fonts.families() == ("DejaVu Sans",)
    (message,) = [record.message for record in caplog.records]
    assert "no font with Chinese characters" in message and "\n" not in message
    fonts.families.cache_clear()


def test_a_font_is_found_by_its_characters():
    """Fonts are tested by their glyphs: Matplotlib's default font has no Chinese characters."""
    from matplotlib import font_manager

    assert not fonts._draws(font_manager, font_manager.findfont("DejaVu Sans")) and not fonts._draws(
        font_manager, "none.ttf"
    )
    fonts.families.cache_clear()
    first, *rest = fonts.families()
    if rest:  # where a Chinese font is installed
        assert fonts._draws(font_manager, font_manager.findfont(first))
