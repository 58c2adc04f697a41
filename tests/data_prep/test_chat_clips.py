"""Clips and conversations of the drawn corpus for the chat model: frames fit the answers, and nothing else gives them away."""

import csv
import json
from collections import Counter
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from data_prep import chat_clips, chat_rows, draw_shapes, shape_clips
from data_prep.chat_clips import DIRECTIONS, OPPOSITE, TURNS, ChatClip
from data_prep.shape_clips import COLOURS, FRAMES, SHAPES, SIZE


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "chat"
    assert draw_shapes.draw(out, clips=20, seed=3, chat=80)
    return out


def rows_of(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"instruct_{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def turns_of(row: dict) -> list[tuple[str, str]]:
    lines = row["text"].splitlines()[1:]
    return [
        (asked.removeprefix("Human: "), told.removeprefix("AI: "))
        for asked, told in zip(lines[::2], lines[1::2], strict=True)
    ]


def moves_of(file: Path, colour: str) -> list[str]:
    """The motion between frames 1 and 5, and between 9 and 13, of the pixels of a colour on a torus."""
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    near = [np.abs(frame.astype(int) - np.array(COLOURS[colour])).max(axis=-1) < 60 for frame in frames]  # [112, 112]
    found = []
    for one, two in ((1, 5), (9, 13)):
        overlap = {
            name: (near[two] & np.roll(near[one], (26 * y, 26 * x), (0, 1))).sum()
            for name, (x, y) in DIRECTIONS.items()
        }
        found.append(max(overlap, key=overlap.__getitem__))
    return found


def test_files_show_their_answers(corpus: Path):
    asked = Counter()
    for name in ("val", "backwards"):
        clips = {}
        for row in rows_of(corpus, name):
            (turn,) = turns_of(row)
            clips.setdefault(row["video"][0], {}).setdefault(row["task_type"], []).append(turn[1])
        for file, answers in clips.items():
            asked.update(answers.keys())
            (colour,) = answers["colour_sft"]
            if "number_sft" not in answers:
                wanted = answers.get("order_sft") or answers["motion_sft"] * 2
                assert moves_of(corpus / file, colour) == wanted, file
    assert set(asked) == {f"{kind}_sft" for kind in ("colour", "shape", "motion", "order", "number")}


def test_backwards_is_the_same_clip_with_other_answers(corpus: Path):
    val = {(row["video"][0], turns_of(row)[0][0]): turns_of(row)[0][1] for row in rows_of(corpus, "val")}
    flipped = Counter()
    for row in rows_of(corpus, "backwards"):
        file = row["video"][0].replace("_backwards", "")
        original = {answer for (name, _), answer in val.items() if name == file}
        assert row["task_type"] != "number_sft"
        for _, answer in turns_of(row):
            moved = row["task_type"] in ("motion_sft", "order_sft")
            assert (OPPOSITE[answer] if moved else answer) in original
            flipped[row["task_type"]] += 1
    assert flipped["motion_sft"] and flipped["order_sft"]
    for clip in chat_clips.plan("val", 20, 3):
        if clip.motions:
            back = clip.played_backwards()
            assert np.array_equal(chat_clips.frames_of(back), chat_clips.frames_of(clip)[::-1])
            assert back.motions != clip.motions and back.played_backwards().motions == clip.motions


def test_no_single_frame_tells_the_motion():
    """For each frame, where the shape is has the same distribution for all motions."""
    for motions in (*((motion,) for motion in DIRECTIONS), *TURNS):
        paths = np.stack([chat_clips.path_of(motions, np.random.default_rng(seed)) for seed in range(2000)])
        assert paths[..., 2].min() >= 20 and len(paths[0]) == FRAMES
        for frame in (0, FRAMES // 2, FRAMES - 1):
            for axis in (0, 1):
                counts, _ = np.histogram(paths[:, frame, axis] % SIZE, bins=8, range=(0, SIZE))
                assert abs(counts - 250).max() < 75  # five standard deviations


def test_what_leaves_on_one_side_enters_on_the_other():
    whole = chat_clips.coverage("正方形", SIZE / 2, SIZE / 2, 24)
    for x, y in ((0, 0), (SIZE / 2, 0), (5, SIZE / 2), (SIZE * 3, -SIZE)):
        moved = np.roll(whole, (round(y - SIZE / 2), round(x - SIZE / 2)), (0, 1))
        assert np.array_equal(chat_clips.coverage("正方形", x, y, 24), moved)


def test_answers_are_balanced_and_independent():
    clips = chat_clips.plan("val", 200, 0)
    assert len({(clip.file, clip.seed) for clip in clips}) == 200
    for kind, most in (("colour", 1 / 8), ("shape", 1 / 4), ("motion", 1 / 4), ("number", 1 / 10)):
        told = Counter(q.answer for clip in clips for q in chat_rows.questions_of(clip) if q.kind == kind)
        assert max(told.values()) <= most * sum(told.values()) + 3, (kind, told)  # no constant answer helps
    for place in (0, 1):
        told = Counter(clip.motions[place] for clip in clips if len(clip.motions) == 2)
        assert set(told) == set(DIRECTIONS) and max(told.values()) <= 0.25 * told.total() + 3
    train = chat_clips.plan("train", 1600, 0)
    pairs = Counter((clip.colour, clip.motions[0]) for clip in train if clip.motions)
    assert len(pairs) == 32 and max(pairs.values()) < 2 * min(pairs.values())
    assert {clip.seed for clip in train}.isdisjoint(clip.seed for clip in clips)


def test_numbers_differ_and_are_large():
    drawn = [chat_clips.digits(number, SIZE / 2, SIZE / 2, 60) for number in chat_clips.NUMBERS]
    for i, one in enumerate(drawn):
        ys, _, _ = np.nonzero(one > 0.5)
        assert 50 < np.ptp(ys) < 75 and abs(ys.mean() - SIZE / 2) < 8
        assert all(np.abs(one - two).sum() > 100 for two in drawn[:i])


def test_rows_of_training_are_a_mixture(corpus: Path):
    rows = rows_of(corpus, "train")
    clips = chat_clips.plan("train", 80, 3)
    media = Counter(next((field for field in ("video", "image") if field in row), "text") for row in rows)
    assert media == {"video": 80, "image": 7, "text": 7}
    assert {len(turns_of(row)) for row in rows} == {1, 2, 3}
    titles = {clip.title for clip in clips}
    with open(corpus / "chat_titles_train.csv", newline="", encoding="utf-8") as stream:
        assert [row["title"] for row in csv.DictReader(stream)] == [clip.title for clip in clips]
    for row in rows:
        first = row["text"].splitlines()[0].removeprefix("Human: ")
        assert first in {"video": {"<|video|>"}, "image": {"<image>"}}.get(next(iter(row)), titles)
        for file in row.get("video", []) + row.get("image", []):
            assert (corpus / file).is_file()
        if "image" in row:
            assert row["task_type"] not in ("motion_sft", "order_sft")
            assert cv2.imread(str(corpus / row["image"][0])).shape == (SIZE, SIZE, 3)
    texts = set((corpus / "chat_texts.txt").read_text(encoding="utf-8").splitlines())
    assert titles <= texts and {f"AI: {answer}" for row in rows for _, answer in turns_of(row)} <= texts
    scenes = rows_of(corpus, "scene")
    assert [turns_of(row)[0][1] for row in scenes] == [clip.title for clip in chat_clips.plan("val", 10, 3)]
    assert {f"Human: {asked}" for row in rows_of(corpus, "val") + scenes for asked, _ in turns_of(row)} <= texts
    assert all(
        row["task_type"] and row["prompt"] == chat_rows.INTRODUCTION for row in rows + rows_of(corpus, "text_train")
    )


def test_chat_is_an_addition(corpus: Path, tmp_path: Path, capsys):
    draw_shapes.draw(tmp_path / "plain", clips=20, seed=3)
    names = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.*")}
    assert all(
        (corpus / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        for name in names - {Path("corpus.json")}
    )
    assert not draw_shapes.draw(corpus, clips=20, seed=3, chat=80)
    (corpus / "instruct_backwards.jsonl").rename(corpus / "kept")
    with pytest.raises(FileExistsError, match=r"lacks 1 of its files, such as instruct_backwards\.jsonl"):
        draw_shapes.draw(corpus, clips=20, seed=3, chat=80)
    (corpus / "kept").rename(corpus / "instruct_backwards.jsonl")
    with pytest.raises(FileExistsError, match="holds a corpus drawn with"):
        draw_shapes.draw(corpus, clips=20, seed=3)
    assert draw_shapes.main([f"--out={tmp_path}/few", "--clips=20", "--chat=30"]) == 2
    assert "--chat 30: too few" in capsys.readouterr().err


def test_titles_say_what_is_seen():
    assert ChatClip("", "红色", "圆形", ("向右移动", "向下移动"), None, ()).title == "红色的圆形先向右移动，再向下移动"
    every = chat_clips.every_clip()
    assert len({clip.title for clip in every}) == len(every) == len(COLOURS) * (len(SHAPES) * 12 + 10)
    assert shape_clips.FRAMES % 2 == 0  # both motions take as long
