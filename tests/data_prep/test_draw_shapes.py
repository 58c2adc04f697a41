"""The drawn corpus: titles match the videos, combinations are held out, and writing is atomic."""

import ast
import csv
import hashlib
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep import draw_shapes, shape_clips
from data_prep.draw_shapes import draw, is_drawn, main
from data_prep.shape_clips import COLOURS, MOTIONS, SHAPES, Clip, frames_of, path_of, plan
from ymplug_jax.data.schema import CLASS_NAMES, COLUMNS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "shapes"
    assert draw(out, clips=40, seed=3)
    return out


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def combination(clip: Clip) -> tuple[str, str, str]:
    return clip.colour, clip.shape, clip.motion


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_validation_is_held_out():
    train, val, gallery = plan(480, 0)
    assert (len(train), len(val), len(gallery)) == (432, 48, 128)
    assert len({clip.title for clip in gallery}) == 128
    held_out = {combination(clip) for clip in val}
    assert len(held_out) == 8 and {colour for colour, _, _ in held_out} == set(COLOURS)
    assert all(
        Counter(c[part] for c in held_out)[word] == 2 for part, words in ((1, SHAPES), (2, MOTIONS)) for word in words
    )
    assert not {combination(clip) for clip in train} & {combination(clip) for clip in val}


def test_training_shows_every_word_and_pair():
    train, _, _ = plan(480, 5)
    combinations = [combination(clip) for clip in train]
    assert len(set(combinations)) == 120
    for part, words in enumerate((tuple(COLOURS), SHAPES, MOTIONS)):
        counts = Counter(c[part] for c in combinations)
        assert set(counts) == set(words)
        assert min(counts.values()) > 0.7 * len(train) / len(words)
    for one, two, pairs in ((0, 1, 32), (0, 2, 32), (1, 2, 16)):
        assert len({(c[one], c[two]) for c in combinations}) == pairs


def test_seed_decides_everything(corpus: Path, tmp_path: Path):
    def digests(root: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.*")}

    draw(tmp_path / "same", clips=40, seed=3)
    assert digests(tmp_path / "same") == digests(corpus)
    assert plan(40, 3) != plan(40, 4)


def test_clips_of_one_title_differ():
    train, _, _ = plan(480, 0)
    same = [clip for clip in train if clip.title == train[0].title]
    assert len(same) >= 3
    assert not np.array_equal(frames_of(same[0]), frames_of(same[1]))


@pytest.mark.parametrize("motion", MOTIONS)
def test_motion_is_clear_from_four_frames(motion: str):
    for seed in range(50):
        path = path_of(motion, np.random.default_rng(seed))
        assert (path[:, :2] - path[:, 2:] >= shape_clips.MARGIN - 1e-9).all()
        assert (path[:, :2] + path[:, 2:] <= shape_clips.SIZE - shape_clips.MARGIN + 1e-9).all()
        x, y, radius = path[[1, 5, 9, 13]].T
        changes = {"x": np.diff(x), "y": np.diff(y), "radius": np.diff(radius)}
        axis, sign = {
            "向上移动": ("y", -1),
            "向下移动": ("y", 1),
            "慢慢变大": ("radius", 1),
            "慢慢变小": ("radius", -1),
        }[motion]
        assert (sign * changes.pop(axis) > 3).all()  # pixels between consecutive frames of the four
        assert all(np.allclose(change, 0) for change in changes.values())
        assert path[:, 2].min() >= 14  # of 112 pixels; at 64 pixels, a circle still differs from a square


def test_files_show_their_titles(corpus: Path):
    """Pixels of the title's colour in the decoded file move or grow as the title says."""
    for row in read(corpus / "pretrain_val.csv") + read(corpus / "pretrain_train.csv"):
        frames = decode(corpus / row["video_id:FILE"])  # [16, 112, 112, 3]
        assert frames.shape == (shape_clips.FRAMES, shape_clips.SIZE, shape_clips.SIZE, 3)
        colour, rest = row["title"].split("的")
        shape, motion = rest.split("在")
        assert shape in SHAPES
        near = np.abs(frames.astype(int) - np.array(COLOURS[colour])).max(axis=-1) < 40  # [16, 112, 112]
        area = near.sum(axis=(1, 2))
        assert area.min() > 60, row
        first, last = (np.argwhere(near[i]).mean(axis=0) for i in (0, -1))
        down, growth = (last - first)[0], area[-1] / area[0]
        seen = {"向上移动": down < -20, "向下移动": down > 20, "慢慢变大": growth > 2, "慢慢变小": growth < 0.5}
        assert [name for name, true in seen.items() if true] == [motion], row


def test_tables_match_those_of_youku_mplug(corpus: Path):
    lines = (corpus / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 128 + 128 + 256 + 45 and {
        row["title"] for row in read(corpus / "pretrain_val.csv")
    } <= set(lines)
    files = set()
    for kind, (file, texts) in COLUMNS.items():
        for split, clips in (("train", 36), ("val", 4)):
            rows = read(corpus / f"{kind}_{split}.csv")
            wanted = clips if kind == "pretrain" or split == "val" else clips // 3
            wanted = 128 if kind == "retrieval" and split == "val" else wanted
            assert len(rows) == wanted and list(rows[0]) == [file, *texts]
            files |= {row[file] for row in rows}
    assert files == {p.relative_to(corpus).as_posix() for p in corpus.rglob("*.mp4")}
    assert {row["label"] for row in read(corpus / "classification_train.csv")} <= set(CLASS_NAMES)
    titles = [row["title"] for row in read(corpus / "pretrain_val.csv")]
    references = [ast.literal_eval(row["golden_caption"]) for row in read(corpus / "captioning_val.csv")]
    assert [r[0] for r in references] == titles and all(len(set(r)) == 3 for r in references)
    train = [row["golden_caption"] for row in read(corpus / "captioning_train.csv")]
    assert train == [row["title"] for row in read(corpus / "pretrain_train.csv")][: len(train)]


def test_test_titles_carry_no_information_about_the_class(corpus: Path):
    rows = read(corpus / "classification_test.csv")
    assert {row["video_id:FILE"] for row in rows} == {
        row["clip_name:FILE"] for row in read(corpus / "retrieval_val.csv")
    }
    classes = {title: set() for title in {row["title"] for row in rows}}
    for row in rows:
        classes[row["title"]].add(row["label"])
    assert len(rows) == 128 and len(classes) == 32
    assert all(labels == set(shape_clips.LABELS.values()) for labels in classes.values())


def test_complete_corpus_is_reused(corpus: Path, capsys):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    main(["--out", str(corpus), "--clips", "40", "--seed", "3"])
    assert "36 training and 4 validation clips, already drawn" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before
    assert main(["--out", str(corpus), "--clips", "40", "--seed", "4"]) == 2
    assert "remove it or choose another --out" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("mine")
    for flags, message in (
        (
            [f"--out={tmp_path}/file/corpus"],
            f"error: {tmp_path}/file/corpus: cannot be created (Not a directory); choose another --out",
        ),
        ([f"--out={tmp_path}/file"], "is not a corpus of draw_shapes; choose another --out"),
        ([f"--out={tmp_path}/new", "--clips=3"], "error: "),
        (["--out=gs://bucket/corpus"], "is not a local path"),
        (["--out=x", "--clip=40"], "unrecognized arguments: --clip=40"),
    ):
        try:
            code = main(flags)
        except SystemExit as ended:
            code = ended.code
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2 and line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_folders_are_not_touched(tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a corpus of draw_shapes"):
        draw(tmp_path, clips=20)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
    with pytest.raises(ValueError, match="--clips 5: too few"):
        draw(tmp_path / "few", clips=5)


def test_lost_file_is_named(tmp_path: Path):
    draw(tmp_path / "c", clips=20)
    (tmp_path / "c/videos/val_00001.mp4").unlink()
    settings = {"version": draw_shapes.VERSION, "clips": 20, "seed": 0}
    with pytest.raises(FileExistsError, match=r"lacks 1 of its files, such as videos/val_00001.mp4"):
        is_drawn(tmp_path / "c", settings, [clip.file for part in plan(20, 0) for clip in part])


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    stale = tmp_path / ".c.partial"
    stale.mkdir()
    monkeypatch.setattr(draw_shapes, "write_tables", fail)
    with pytest.raises(OSError, match="no space left"):
        draw(tmp_path / "c", clips=20)
    assert list(tmp_path.iterdir()) == []
