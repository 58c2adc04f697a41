"""Builds of conversations: media, text-only rows, rejects, lengths, resuming and what reads the shards."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import shards
import videos
from data_prep import build_shards
from data_prep.index_shards import index_of
from ymplug_jax.data import conversation, loader, schema, video_file
from ymplug_jax.data.records import Records
from ymplug_jax.reports.pictures import Pictures

FRAMES, LIMIT, SLOTS = 3, 150, 5
CLIP, STILL = "Human: <|video|>\nHuman: 问\nAI: 答。", "Human: <image>\nHuman: 问\nAI: 答。"
LONG = "红色的圆形在移动" * 300

ROWS: list[tuple[str, object]] = [  # (reject reason or "", row)
    ("", {"video": ["a.mp4"], "text": CLIP, "prompt": "", "task_type": "video_sft"}),
    ("", {"text": "Human: 你好\nAI: 你好。\nHuman: 再见\nAI: 再见。", "options": ["你好。", "再见。"]}),
    (
        "",
        {
            "image": ["turned.jpg", "clear.png"],
            "video": ["one.mp4"],
            "text": "Human: <image>\nHuman: <|video|>\nHuman: <image>\nHuman: 问\nAI: 答。\nHuman: 再问\nAI: 再答。",
        },
    ),
    ("bad_json", "{"),
    ("", {"video": ["a.mp4"], "text": CLIP, "task_type": "video_sft"}),  # repeats the first
    ("missing_file", {"image": ["none.png"], "text": STILL}),
    ("missing_file", {"image": ["none.png"], "text": STILL}),
    ("hostile_path", {"image": ["../turned.jpg"], "text": STILL}),
    ("hostile_path", {"image": ["outside.png"], "text": STILL}),
    ("not_an_image", {"image": ["a.mp4"], "text": STILL}),
    ("not_a_video", {"video": ["clear.png"], "text": CLIP}),
    ("not_an_image", {"image": ["moving.gif"], "text": STILL}),
    ("", {"video": ["moving.gif"], "text": CLIP}),
    ("unreadable", {"video": ["a.mp4", "cut.mp4"], "text": CLIP.replace("\nHuman: 问", "<|video|>\nHuman: 问")}),
    ("no_answer", {"text": f"Human: {LONG}\nAI: 答。"}),
    ("", {"text": f"Human: 问\nAI: {LONG}"}),  # cut, and kept
    ("unknown_placeholder", {"video": ["a.mp4"], "text": "Human: <video>\nAI: 答。"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media, rows, a tokenizer, and two builds: `out`, and `again`, which was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("chat")
    root = folder / "root"
    videos.write(root / "a.mp4")
    videos.write(root / "one.mp4", frames=1, size=(32, 32))
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:700])
    picture = Image.new("RGB", (600, 300), (200, 30, 40))
    picture.paste((10, 20, 220), (0, 0, 300, 150))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "turned.jpg", exif=exif)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(root / "clear.png")
    grey = [Image.new("L", (32, 32), shade) for shade in (0, 120, 240)]
    grey[0].save(root / "moving.gif", save_all=True, append_images=grey[1:])
    (root / "outside.png").symlink_to(folder / "tokens.model")
    shards.tokenizer(folder / "tokens.model")
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for _, row in ROWS]
    (folder / "talks_val.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    return folder


def flags(folder: Path, out: str) -> list[str]:
    return [
        "--config=instruct", f"--csv={folder / 'talks_val.jsonl'}", f"--video_root={folder / 'root'}", f"--out={folder / out}",
        f"--num_frames={FRAMES}", "--workers=1", "--partition_rows=6", f"--tokenizer={folder / 'tokens.model'}",
        f"--max_tokens={LIMIT}", f"--slots={SLOTS}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def built(folder: Path) -> tuple[Path, list[str]]:
    """(folder of the shards, files decoded by each read)."""
    read, asked = video_file.Reader.read, []

    def counted(self: video_file.Reader, path: Path, *args: object, **more: object) -> video_file.Clip:
        asked.append(path.name)
        return read(self, path, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_file.Reader, "read", counted)
        assert build_shards.main(flags(folder, "out")) == 0
    return folder / "out", asked


def test_rows_are_records_or_rejects(built: tuple[Path, list[str]]):
    out, _ = built
    manifest = json.loads((out / schema.MANIFEST).read_text())
    rejects = [json.loads(line) for line in (out / schema.REJECTS).read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in rejects] == [
        (i, reason) for i, (reason, _) in enumerate(ROWS) if reason
    ]
    by_row = {line["row"]: line for line in rejects}
    assert by_row[3]["id"] == "talks_val.jsonl:4" and by_row[3]["detail"].startswith("line 4: not JSON")
    assert by_row[5]["id"] == "none.png" and by_row[5]["detail"].startswith("none.png: no such file below")
    assert by_row[13]["id"] == "a.mp4" and by_row[13]["detail"].startswith("cut.mp4: ")
    assert by_row[14]["detail"] == f"no token of an answer fits into --max_tokens {LIMIT}"
    assert manifest["kind"] == "instruct" and manifest["schema_version"] == "1.1.0"
    assert (manifest["rows"], manifest["written"], manifest["duplicated_ids"], manifest["cut"]) == (len(ROWS), 6, 2, 1)
    assert (
        list(manifest["splits"]) == ["validation"] and len(manifest["splits"]["validation"]["tokenizer_sha256"]) == 64
    )


def test_records_hold_all_media_in_order(built: tuple[Path, list[str]]):
    records = Records(str(built[0]), "validation")
    first, words, both, again, gif, long = records
    assert records.kind == "instruct" and again == first._replace(timestamps=again.timestamps)
    assert [(m.still, m.name, len(m.frames)) for m in first.media] == [(False, "a.mp4", FRAMES)]
    assert (first.media_id, first.task_type) == ("a.mp4", "video_sft")
    assert first.text == f"{conversation.SYSTEM}\n{CLIP}" and first.timestamps.tolist() == [333333, 1000000, 1666667]
    assert (first.options, words.options) == ((), ("你好。", "再见。"))
    assert (words.media_id, words.media, words.frames) == ("talks_val.jsonl:2", (), [])
    assert (long.media_id, long.text) == ("talks_val.jsonl:16", f"{conversation.SYSTEM}\nHuman: 问\nAI: {LONG}")
    assert [(m.still, m.name, len(m.frames)) for m in both.media] == [
        (True, "turned.jpg", 1), (False, "one.mp4", FRAMES), (True, "clear.png", 1),
    ]  # fmt: skip
    assert list(both.frames) == [jpeg for medium in both.media for jpeg in medium.frames]
    assert both.timestamps.tolist() == [0] * 5 and both.media[1].frames[0] == both.media[1].frames[2]
    turned, clip, clear = (
        cv2.imdecode(np.frombuffer(medium.frames[0], np.uint8), cv2.IMREAD_COLOR_RGB) for medium in both.media
    )
    assert turned.shape == (512, 256, 3) and clip.shape == (32, 32, 3) and clear.min() > 250
    np.testing.assert_allclose(turned[20, -20], (10, 20, 220), atol=12)
    shades = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE).mean() for jpeg in gif.frames]
    np.testing.assert_allclose(shades, [0, 120, 240], atol=3)


def test_a_file_is_decoded_once_in_a_partition(built: tuple[Path, list[str]]):
    """Partitions of six rows. A file under both kinds is read as each of them."""
    assert built[1] == [
        "a.mp4", "turned.jpg", "one.mp4", "clear.png", "a.mp4", "clear.png", "moving.gif", "moving.gif", "a.mp4", "cut.mp4",
    ]  # fmt: skip


def test_other_readers_of_the_shards(built: tuple[Path, list[str]]):
    import tensorflow_datasets as tfds

    out = built[0]
    records = Records(str(out), "validation")
    for shard in out.glob("*.tfrecord-?????-of-?????"):
        np.testing.assert_array_equal(index_of(shard), np.load(f"{shard}{schema.INDEX_SUFFIX}"))
    dataset = tfds.builder_from_directory(out).as_dataset(split="validation").as_numpy_iterator()
    assert sorted(example["chat"]["text"].decode() for example in dataset) == sorted(r.text for r in records)
    pictures = Pictures(records)
    assert [len(pictures.of(i)) for i in range(3)] == [3, 0, 4]

    def example(record: object, _: object) -> dict[str, np.ndarray]:
        return {"media": np.array(len(record.media))}

    batches = loader.batches(records, example, seed=0, batch_size=6, rows=range(6), shuffle=False, threads=2)
    assert next(iter(batches))["media"].tolist() == [1, 0, 3, 1, 1, 0]


def test_an_interrupted_build_has_the_same_bytes(
    built: tuple[Path, list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    sync, left = os.fsync, [1]

    def full(number: int) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert build_shards.main(flags(folder, "again")) == 5
    assert build_shards.main(flags(folder, "again")) == 0
    # Beam chooses the order, and the partition without records needs no fsync.
    assert re.search(r"resuming: [12] of 3 partitions", capfd.readouterr().err)
    ours = {path.name: path.read_bytes() for path in built[0].iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "again").iterdir()} == ours
    assert build_shards.main(flags(folder, "again")) == 0 and "already exists" in capfd.readouterr().err
    assert build_shards.main([*flags(folder, "again"), "--max_tokens=160"]) == 2
    assert "built from another CSV or with other settings" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_tokens=9"], "--max_tokens: needs --tokenizer too, to measure the rows; give both or neither"),
        (["--tokenizer=nowhere.json"], "--tokenizer: needs --max_tokens too"),
        (["--tokenizer=nowhere.json", "--max_tokens=9"], "--tokenizer nowhere.json: no such file; correct the path"),
        (["--tokenizer={rows}", "--max_tokens=9"], "--tokenizer {rows}: unknown file type"),
        (["--slots=9"], "--slots: needs --tokenizer and --max_tokens too"),
        (["--max_tokens=0"], "--max_tokens 0: too small; give 1 or more"),
        (["--config=pretrain", "--slots=9"], "--slots: applies to --config instruct only, not to pretrain"),
    ],
)
def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture, more: list[str], message: str):
    rows = folder / "talks_val.jsonl"
    given = ["--config=instruct", f"--csv={rows}", f"--video_root={folder}", f"--out={folder / 'no'}", *more]
    assert build_shards.main([flag.replace("{rows}", str(rows)) for flag in given]) == 2
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.startswith(f"error: {message.replace('{rows}', str(rows))}") and not (folder / "no").exists()
