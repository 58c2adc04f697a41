"""`ymplug_jax.predict` on checkpoints of tiny runs: classify, caption, retrieve, and mistakes that end in one line."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import runs
import shards
from answering import ROOT, SMALL, draw_videos, python, train, videos
from ymplug_jax import predict as predict_lib
from ymplug_jax.core import checkpoint_files
from ymplug_jax.data import schema
from ymplug_jax.inference import clip_stream, predict_flags, predictor


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three tasks, and a folder of videos."""
    home = tmp_path_factory.mktemp("predict")
    data = None
    for task in ("classify", "caption", "retrieve"):
        data = train(home, task, data=data)
    (home / "t.model").unlink()  # the runs have their own copies
    draw_videos(home / "videos", "a.mp4", "b.mkv")
    (home / "broken.mp4").write_bytes(b"")
    return home


@pytest.fixture
def ask(capsys: pytest.CaptureFixture) -> Callable:
    """(code, lines of stdout, lines of stderr) of a command in this process."""

    def run(*flags: str | Path) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        code = predict_lib.main([str(flag) for flag in flags])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_a_broken_link_is_reported_as_a_missing_file(tmp_path: Path) -> None:
    videos.write(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("gone.mp4")
    os.mkfifo(tmp_path / "c.mp4")
    files = clip_stream.files_of([str(tmp_path)])
    assert [Path(file.name).name for file in files] == ["a.mp4", "b.mp4"]
    (reads,) = clip_stream.read_all(files, 8, 1)
    assert reads[1].clip.reason == "missing_file" and not clip_stream.left_out(reads[1])


def test_flags_with_several_values_can_be_repeated() -> None:
    args = predict_flags.parse(
        [
            "retrieve",
            "--checkpoint",
            "r",
            "--video",
            "a",
            "b",
            "--video",
            "c",
            "--text",
            "一",
            "--text",
            "二",
            "三",
            "--title",
            "x",
            "--title",
            "y",
        ],
        "",
    )
    assert (args.video, args.text, args.title) == (["a", "b", "c"], ["一", "二", "三"], ["x", "y"])


def copies(folder: Path, source: Path, names: Sequence[str]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).hardlink_to(source)
    return [folder / name for name in names]


def test_classify_a_file_and_a_folder(home: Path, ask: Callable) -> None:
    code, out, _ = ask("classify", "--checkpoint", home / "classify", "--video", home / "videos", "--json")
    answers = [json.loads(line) for line in out]
    assert code == 0 and [Path(a["video"]).name for a in answers] == ["a.mp4", "b.mkv"]
    assert all(len(a["best"]) == 5 and a["class"] == next(iter(a["best"])) and a["shown"] == "video" for a in answers)
    file, sheet = home / "videos" / "a.mp4", home / "sheet.png"
    code, out, _ = ask(
        "classify", "--checkpoint", home / "classify", "--video", file, "--title", "红色的圆形", "--sheet", sheet
    )
    assert code == 0 and "by video and title" in out[1] and "the head says" in out[1]
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_caption_continues_after_a_broken_file(home: Path) -> None:
    """In a subprocess where only the core dependencies can be imported, in its decoding processes too."""
    (home / "core").mkdir()
    extras = ("tensorflow", "tensorflow_datasets", "apache_beam", "torch", "transformers", "safetensors")
    (home / "core" / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({extras})\n")
    flags = [
        "--checkpoint",
        f"file://{home / 'caption'}",
        "--json",
        "--video",
        home / "broken.mp4",
        home / "videos" / "b.mkv",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ymplug_jax.predict", "caption", *flags], cwd=ROOT, text=True, capture_output=True,
        env=runs.environment() | {"PYTHONPATH": str(home / "core")}, timeout=300,
    )  # fmt: skip
    (answer,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and Path(answer["video"]).name == "b.mkv" and isinstance(answer["caption"], str)
    assert done.stderr == f"error: {home / 'broken.mp4'}: empty_file: zero bytes\n"  # and no control codes


def test_each_title_belongs_to_its_file_when_others_fail(
    home: Path, ask: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, asked = predictor.Predictor.rows, []

    def rows(self: predictor.Predictor, records: Sequence) -> list:
        asked.extend((record.media_id, record.title) for record in records)
        return answered(self, records)

    monkeypatch.setattr(predictor.Predictor, "rows", rows)
    clip, other, twin = home / "videos" / "a.mp4", home / "videos" / "b.mkv", home / "twin.mp4"
    twin.hardlink_to(clip)
    files = [clip, home / "broken.mp4", home / "nowhere.mp4", twin, other]
    flags = ["--json", "--video", *files, "--title", "红色", "空", "没有", "蓝色的圆形在移动", ""]
    code, out, err = ask("classify", "--checkpoint", home / "classify", *flags)
    assert code == 1 and asked == [(str(clip), "红色"), (str(twin), "蓝色的圆形在移动"), (str(other), "")]
    shown = [(answer["video"], answer["shown"]) for answer in map(json.loads, out)]
    assert shown == [(str(clip), "video and title"), (str(twin), "video and title"), (str(other), "video")]
    assert err == [
        f"error: {home / 'broken.mp4'}: empty_file: zero bytes",
        f"error: {home / 'nowhere.mp4'}: missing_file: no such file",
    ]


def test_a_folder_stands_for_the_files_that_can_be_decoded(home: Path, ask: Callable) -> None:
    classify = ["classify", "--checkpoint", home / "classify", "--json"]
    folder = home / "mixed"
    # Sorted by bytes: "B" before "a", "a.mp4" before "ab", the folder "a.d" before the file "a.mp4", 中 after ASCII.
    names = ["中.mp4", "ab", "a.mp4", "B.ogv", "a.d/z"]
    (folder / "a.d").mkdir(parents=True)
    for name in names:
        (folder / name).hardlink_to(home / "videos" / "a.mp4")
    for name in (".hidden.mp4", "notes.txt", "a.json", "a.srt", "empty.txt"):
        (folder / name).write_text("" if "empty" in name else '{"a": "1 --> 2"}\n' * 40)
    code, out, err = ask(*classify, "--video", folder)
    found = [str(Path(json.loads(line)["video"]).relative_to(folder)) for line in out]
    assert code == 0 and found == ["B.ogv", "a.d/z", "a.mp4", "ab", "中.mp4"]
    listed = ", ".join(str(folder / name) for name in ("a.json", "a.srt", "empty.txt", "notes.txt"))
    assert err == [f"4 of 9 files are not videos: {listed}"]
    # A file that is given itself, or that is named like a video, is an error.
    code, out, err = ask(*classify, "--video", folder / "notes.txt", folder / "ab")
    assert code == 1 and len(out) == 1 and err[0].startswith(f"error: {folder / 'notes.txt'}: not_a_video")
    (folder / "broken.ogv").write_bytes(b"")
    code, out, err = ask(*classify, "--video", folder)
    assert code == 1 and len(out) == 5 and err[0] == f"error: {folder / 'broken.ogv'}: empty_file: zero bytes"


def test_retrieve_from_files_and_from_an_index(home: Path, ask: Callable) -> None:
    run, index = ["retrieve", "--checkpoint", home / "retrieve"], home / "exact_name"
    texts = ["红色的圆形在移动", "蓝色"]
    sheet = home / "found.png"
    code, out, err = ask(
        *run, "--video", home / "videos", "--text", *texts, "--export", index, "--json", "--sheet", sheet
    )
    from_files = [json.loads(line) for line in out]
    assert code == 0 and err == [f"index of 2 videos: {index}", f"frames: {sheet}"]
    assert [a["text"] for a in from_files] == texts and len(from_files[0]["ranking"]) == 2
    assert sorted(home.glob("exact_name*")) == [index]
    with np.load(index, allow_pickle=False) as stored:
        np.testing.assert_allclose(np.linalg.norm(stored["video"], axis=1), 1, atol=1e-5)
        assert len(str(stored["fingerprint"])) == 64
        assert (int(stored["step"]), str(stored["task"]), int(stored["frames"])) == (3, "retrieve", 2)
    code, out, _ = ask(*run, "--index", index, "--text", *texts, "--json")
    assert code == 0 and [json.loads(line) for line in out] == from_files
    scores = {(a["text"], video): score for a in from_files for video, score in a["ranking"]}
    assert scores[texts[0], from_files[0]["ranking"][0][0]] == max(v for (t, _), v in scores.items() if t == texts[0])
    # Ranking texts for each video gives the same four scores, from files and from the index.
    for source in (["--video", home / "videos"], ["--index", index]):
        code, out, _ = ask(*run, *source, "--text", *texts, "--rank", "texts", "--json", "--best", 1)
        answers = [json.loads(line) for line in out]
        assert [Path(a["video"]).name for a in answers] == ["a.mp4", "b.mkv"]
        for answer in answers:
            best = max(texts, key=lambda text: scores[text, answer["video"]])
            assert answer["ranking"] == [[best, pytest.approx(scores[best, answer["video"]], abs=1e-4)]]


def test_an_answer_does_not_depend_on_the_batch(home: Path, ask: Callable) -> None:
    classify = ["classify", "--checkpoint", home / "classify", "--json"]
    alone = json.loads(ask(*classify, "--video", home / "videos" / "b.mkv")[1][0])
    many = copies(home / "many_clips", home / "videos" / "a.mp4", [f"{i}.mp4" for i in range(18)])
    code, out, _ = ask(*classify, "--video", *many[:10], home / "videos" / "b.mkv", *many[10:])
    answers = [json.loads(line) for line in out]
    assert code == 0 and [a["video"] for a in answers] == [str(p) for p in many[:10]] + [alone["video"]] + [
        str(p) for p in many[10:]
    ]
    assert answers[10]["best"] == pytest.approx(alone["best"], abs=2e-4)


def test_names_and_terminals(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gbk = b"\xbc\xfc\xc5\xcc.mp4"  # 键盘 in GBK, which is not valid UTF-8
    folder = os.fsencode(home / "names")
    os.mkdir(folder)
    for name in (gbk, "😀.mp4".encode(), b"\x1b[31m.mp4"):
        os.link(home / "videos" / "a.mp4", folder + b"/" + name)
    flags = ["retrieve", "--checkpoint", home / "retrieve", "--video", home / "names", "--text", "😀键盘"]
    names = set(os.listdir(folder))

    def ask(encoding: str, *more: str | Path) -> list[str]:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert predict_lib.main([str(flag) for flag in (*flags, *more)]) == 0
        return sys.stdout.buffer.getvalue().decode(encoding).splitlines()

    for encoding in ("utf-8", "gbk", "ascii"):
        (answer,) = map(json.loads, ask(encoding, "--json"))
        assert answer["text"] == "😀键盘" and len(answer["ranking"]) == 3
        assert {os.path.basename(os.fsencode(name)) for name, _ in answer["ranking"]} == names
    lines = ask("ascii", "--export", home / "names.npz", "--sheet", home / "names.png")
    assert lines[0] == "\\U0001f600\\u952e\\u76d8" and len(lines) == 4 and "\x1b" not in "".join(lines)
    assert any("\\udcbc\\udcfc\\udcc5\\udccc.mp4" in line for line in lines)
    with np.load(home / "names.npz", allow_pickle=False) as index:
        assert {os.path.basename(os.fsencode(str(name))) for name in index["video_id"]} == names


def test_utf8_text_under_the_c_locale(home: Path, ask: Callable) -> None:
    """Python represents bytes that the locale cannot decode as \\udc80 to \\udcff."""
    bytes_of = "红色".encode().decode("ascii", "surrogateescape")
    run = ["retrieve", "--checkpoint", home / "retrieve", "--json", "--video", home / "videos" / "a.mp4", "--text"]
    assert ask(*run, bytes_of) == ask(*run, "红色")


def test_a_closed_pipe_is_no_error(home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert predict_lib.main(["classify", f"--checkpoint={home / 'classify'}", f"--video={home / 'videos'}"]) == 0
        assert capsys.readouterr().err == ""


def test_a_full_disk_is_one_line(home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert predict_lib.main(["classify", f"--checkpoint={home / 'classify'}", f"--video={home / 'videos'}"]) == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: standard output: cannot be written (No space left")
        with contextlib.suppress(OSError):
            full.close()  # flushing the buffer fails again


@pytest.mark.slow
def test_an_interrupted_export_continues(home: Path, ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    files = copies(home / "gallery", home / "videos" / "a.mp4", [f"{i:02d}.mp4" for i in range(20)])
    files[13].unlink()
    files[13].hardlink_to(home / "videos" / "b.mkv")
    index, part = home / "gallery.npz", home / "gallery.npz.part"
    export = ["retrieve", "--checkpoint", home / "retrieve", "--video", home / "gallery", "--export", index]
    assert ask(*export)[0] == 0
    whole = dict(np.load(index))
    index.unlink()

    answered = predictor.Predictor.rows
    seen: list[int] = []

    def stop_after(batches: int) -> None:
        def rows(self: predictor.Predictor, records: Sequence) -> list:
            if len(seen) == batches:
                raise KeyboardInterrupt
            seen.append(len(records))
            return answered(self, records)

        seen.clear()
        monkeypatch.setattr(predictor.Predictor, "rows", rows)

    stop_after(1)
    assert ask(*export)[0] == 130 and part.exists() and not index.exists()
    with part.open("ab") as file:
        file.write(b'{"video": "half a li')  # cut off, as after a kill
    stop_after(1)
    code, _, err = ask(*export)
    assert code == 130 and err[0] == f"{part}: 8 videos are already exported" and not index.exists()
    # A file that changed in the meantime is computed again.
    files[0].unlink()
    files[0].write_bytes((home / "videos" / "b.mkv").read_bytes())
    stop_after(99)
    code, _, err = ask(*export)
    assert code == 0 and err[0] == f"{part}: 15 videos are already exported" and sum(seen) == 5
    assert err[1] == f"index of 20 videos: {index}" and sorted(home.glob("gallery.npz*")) == [index]
    again = dict(np.load(index))
    assert [Path(str(name)).name for name in again["video_id"]] == [f"{i:02d}.mp4" for i in range(20)]
    np.testing.assert_allclose(again["video"][1:], whole["video"][1:], atol=1e-5)
    np.testing.assert_allclose(again["video"][0], whole["video"][13], atol=1e-5)

    # A file that changed and can no longer be read has no vector: the one of its old content is dropped.
    index.unlink()
    stop_after(1)
    assert ask(*export)[0] == 130 and '"' + str(files[2]) + '"' in part.read_text()
    files[2].unlink()
    files[2].write_bytes(b"")
    stop_after(99)
    code, _, err = ask(*export)
    assert code == 1 and [line for line in err if line.startswith("error: ")] == [
        f"error: {files[2]}: empty_file: zero bytes"
    ]
    assert [Path(str(name)).name for name in np.load(index)["video_id"]] == [
        f"{i:02d}.mp4" for i in range(20) if i != 2
    ]
    files[2].unlink()
    files[2].hardlink_to(home / "videos" / "a.mp4")
    stop_after(99)
    assert ask(*export)[0] == 0

    # A partial export of other weights is refused and kept. An index is replaced when the new one is complete.
    stop_after(1)
    assert ask(*export)[0] == 130 and np.load(index)["video"].shape[0] == 20
    lines = part.read_text().splitlines(keepends=True)
    head = json.loads(lines[0])
    part.write_text("".join([json.dumps(head | {"fingerprint": "0" * 64, "step": 7}) + "\n", *lines[1:]]))
    code, _, err = ask(*export)
    assert code == 2 and len(err) == 1 and "step 7" in err[0] and "step 3" in err[0] and part.exists()
    part.write_text("my notes\n")
    code, _, err = ask(*export)
    assert code == 2 and len(err) == 1 and "move it away" in err[0] and part.read_text() == "my notes\n"
    part.unlink()


def test_decoding_runs_ahead_by_a_limited_number_of_clips(tmp_path: Path) -> None:
    clip = videos.write(tmp_path / "a.mp4")
    files = [clip_stream.File(str(path), True) for path in copies(tmp_path / "many", clip, [str(i) for i in range(90)])]
    places = clip_stream.read_all(files, 8, 2)
    first = next(places)
    assert [read.number for read in first] == list(range(8))
    started = time.monotonic()
    while sum(1 for _ in (thread for thread in threading.enumerate() if thread.name.startswith("decoder"))) != 2:
        assert time.monotonic() - started < 5
    held = places.gi_frame.f_locals["waiting"]
    assert len(held) <= clip_stream.AHEAD + 2
    rest = [read for batch in places for read in batch]
    assert [read.number for read in rest] == list(range(8, 90))
    assert all(isinstance(read.clip, clip_stream.Clip) for read in rest)


def test_a_file_that_hangs_does_not_delay_earlier_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    class Slow:
        def __init__(self, limit: float):
            pass

        def read(self, path: Path, frames: int) -> Path:
            assert path.name != "slow" or free.wait(60)
            return path

        def close(self) -> None:
            pass

    monkeypatch.setattr(clip_stream, "Reader", Slow)
    monkeypatch.setattr(clip_stream, "PATIENCE", 0.2)
    names = ["a", "slow", "b"]
    for name in names:
        (tmp_path / name).touch()
    places = clip_stream.read_all([clip_stream.File(str(tmp_path / name), True) for name in names], 8, 2)
    assert [read.file.name for read in next(places)] == [str(tmp_path / "a")]
    free.set()
    assert [read.file.name for read in next(places)] == [str(tmp_path / name) for name in ("slow", "b")]


def test_a_decoder_that_cannot_start_ends_in_one_line(
    home: Path, ask: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")  # must not be mistaken for a closed stdout

    monkeypatch.setattr(clip_stream.Reader, "read", fail)
    code, out, (line,) = ask("caption", "--checkpoint", home / "caption", "--video", home / "videos")
    assert code == 5 and out == [] and "a.mp4: the decoding process failed ([Errno 32] Broken pipe)" in line


MISTAKES = {
    "no folder": (["classify", "--checkpoint", "nowhere", "--video", "x.mp4"], "nowhere: no such folder"),
    "a file": (["classify", "--checkpoint", "{home}/broken.mp4", "--video", "x.mp4"], "broken.mp4: a file, not a folder;"),
    "empty name": (["classify", "--checkpoint", "", "--video", "x.mp4"], "--checkpoint: the name is empty"),
    "empty folder": (["classify", "--checkpoint", "{home}/videos", "--video", "x.mp4"], "videos: no config.json here"),
    "below": (["classify", "--checkpoint", "{home}/classify/checkpoints", "--video", "x"], "such as {home}/classify"),
    "conversion": (["classify", "--checkpoint", "{home}/bad/converted", "--video", "x"], "a converted checkpoint"),
    "seeds": (["classify", "--checkpoint", "{home}/bad", "--video", "x.mp4"], "but runs damaged, no_classes, no_step"),
    "damaged": (["classify", "--checkpoint", "{home}/bad/damaged", "--video", "x"], "config.json: damaged, not JSON"),
    "no step": (["classify", "--checkpoint", "{home}/bad/no_step", "--video", "x"], "has no checkpoint yet"),
    "no tokenizer": (["classify", "--checkpoint", "{home}/bad/no_tokenizer", "--video", "x"], "copy of its tokenizer is"),
    "no classes": (["classify", "--checkpoint", "{home}/bad/no_classes", "--video", "x"], "class names are missing"),
    "task": (["caption", "--checkpoint", "{home}/classify", "--video", "x.mp4"], "is a run of task 'classify'"),
    "no video": (["classify", "--checkpoint", "{home}/classify"], "--video: missing; give the files to classify"),
    "empty video": (["classify", "--checkpoint", "{home}/classify", "--video", ""], "--video: a name is empty"),
    "twice": (["caption", "--checkpoint", "{home}/caption", "--video", "{home}/videos", "{home}/x/../videos/a.mp4"], "twice"),
    "titles": (["classify", "--checkpoint", "r", "--video", "a", "b", "--title", "t"], "--title: 1 titles for 2 files"),
    "no search": (["retrieve", "--checkpoint", "{home}/retrieve", "--video", "x.mp4"], "--text: missing; give texts"),
    "empty folder of videos": (["caption", "--checkpoint", "r", "--video", "{home}/empty"], "no files in this folder"),
    "empty text": (["retrieve", "--checkpoint", "r", "--video", "a", "--text", "a", " "], "--text ' ': nothing is left"),
    "marks": (["retrieve", "--checkpoint", "r", "--video", "a", "--text", "?!"], "--text '?!': nothing is left"),
    "bytes": (["retrieve", "--checkpoint", "r", "--video", "a", "--text", "\udcbc"], "nor as UTF-8"),
    "best 0": (["classify", "--checkpoint", "r", "--video", "a", "--best", "0"], "--best 0: too small; give 1 or more"),
    "best -1": (["retrieve", "--checkpoint", "r", "--video", "a", "--text", "t", "--best", "-1"], "--best -1: too small; give 1"),
    "best x": (["retrieve", "--checkpoint", "r", "--video", "a", "--text", "t", "--best", "x"], "invalid int value: 'x'"),
    "decoders": (["caption", "--checkpoint", "r", "--video", "a", "--decoders", "0"], "--decoders 0: too small; give 1 or more"),
    "both": (["retrieve", "--checkpoint", "r", "--video", "a", "--index", "i", "--text", "t"], "exclude each other"),
    "in and out": (["retrieve", "--checkpoint", "r", "--index", "i", "--export", "e"], "give --video with --export"),
    "rank alone": (["retrieve", "--checkpoint", "r", "--index", "i", "--rank", "texts"], "--text: missing; give texts"),
    "other command": (["classify", "--checkpoint", "r", "--video", "a", "--text", "t"], "--text: classify does not use it"),
    "other title": (["retrieve", "--checkpoint", "r", "--video", "a", "--title", "t"], "--title: retrieve does not use it"),
    "export place": (["retrieve", "--checkpoint", "r", "--video", "a", "--export", "{home}/no/i.npz"], "create it first"),
    "export folder": (["retrieve", "--checkpoint", "r", "--video", "a", "--export", "{home}/data"], "a folder, not a file; give a file in it"),
    "export over": (["retrieve", "--checkpoint", "r", "--video", "a", "--export", "{home}/videos/a.mp4"], "is not an index"),
    "sheet kind": (["classify", "--checkpoint", "r", "--video", "a", "--sheet", "{home}/s.bmp"], "cannot draw .bmp; name a file that ends in .png"),
    "sheet place": (["classify", "--checkpoint", "r", "--video", "a", "--sheet", "{home}/no/s.png"], "create it first"),
    "sheet of index": (["retrieve", "--checkpoint", "r", "--index", "i", "--text", "t", "--sheet", "s.png"], "no frames"),
    "index folder": (["retrieve", "--checkpoint", "{home}/retrieve", "--index", "{home}/data", "--text", "t"], "a folder, not a file"),
    "index gone": (["retrieve", "--checkpoint", "{home}/retrieve", "--index", "i", "--text", "t"], "no such file; correct the path"),
    "index kind": (["retrieve", "--checkpoint", "{home}/retrieve", "--index", "{home}/broken.mp4", "--text", "t"], "as an index"),
    "flag": (["classify", "--chekpoint", "r", "--video", "a"], "--chekpoint: unknown flag; did you mean --checkpoint?"),
    "command": (["clasify", "--checkpoint", "r", "--video", "a"], "clasify: unknown command; did you mean classify?"),
    "value": (["classify", "--checkpoint"], "--checkpoint: expected one argument"),
    "missing": (["classify", "--video", "a"], "required: --checkpoint"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(home: Path) -> Path:
    """Folders that `--checkpoint` refuses."""
    (home / "empty").mkdir()
    for name in ("damaged", "no_step", "no_tokenizer", "no_classes"):
        shutil.copytree(home / "classify", home / "bad" / name, copy_function=os.link)
    (home / "bad" / "converted" / "checkpoints" / "converted").mkdir(parents=True)
    shutil.rmtree(home / "bad" / "no_step" / "checkpoints")
    shutil.rmtree(home / "bad" / "no_tokenizer" / "tokenizer")
    settings = (home / "classify" / "config.json").read_text(encoding="utf-8")
    for name, text in (
        ("damaged", settings[:200]),
        ("no_classes", settings.replace('"classes": ""', '"classes": "c.txt"')),
    ):
        (home / "bad" / name / "config.json").unlink()
        (home / "bad" / name / "config.json").write_text(text, encoding="utf-8")
    return home


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(bad: Path, name: str, ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a mistake is found before the model is loaded or a video decoded")

    monkeypatch.setattr(clip_stream, "read_all", fail)
    monkeypatch.setattr(predictor.Predictor, "load", fail)
    before = sorted(bad.rglob("*"))
    flags, message = MISTAKES[name]
    code, out, err = ask(*(flag.replace("{home}", str(bad)) for flag in flags))
    (line,) = err
    assert code == 2 and out == [] and line.startswith("error: ") and message.replace("{home}", str(bad)) in line
    assert sorted(bad.rglob("*")) == before


def test_a_folder_without_videos_ends_in_one_line(home: Path, ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor.Predictor, "load", None)
    code, out, err = ask("caption", "--checkpoint", home / "caption", "--video", home / "data")
    count = len(list((home / "data").iterdir()))
    assert code == 2 and out == [] and len(err) == 1 and count > 2
    assert f"--video: {count} of {count} files are not videos" in err[0]


def test_an_index_of_another_run_is_refused(home: Path, ask: Callable) -> None:
    index = home / "own.npz"
    run = ["retrieve", "--checkpoint", home / "retrieve"]
    assert ask(*run, "--video", home / "videos", "--export", index)[0] == 0
    # A copy of the run elsewhere has the same weights.
    shutil.copytree(home / "retrieve", home / "moved")
    assert ask("retrieve", "--checkpoint", home / "moved", "--index", index, "--text", "红色")[0] == 0
    own, other = (checkpoint_files.fingerprint(str(home / name)) for name in ("moved", "classify"))
    assert own == checkpoint_files.fingerprint(str(home / "retrieve")) != other and len(own) == 64
    # An index of an older version, a damaged one, and one with a NaN.
    arrays = dict(np.load(index))
    nan = np.where(np.arange(2)[:, None] == 1, np.nan, arrays["video"])
    for changed, message in (
        ({key: value for key, value in arrays.items() if key != "fingerprint"}, "export it again"),
        (arrays | {"video": nan}, "non-finite values"),
        (arrays | {"video": arrays["video"][:1]}, "2 names and vectors of shape (1, "),
        (arrays | {"frames": 4}, "4 frames"),
        ({"text": arrays["video"]}, "no video, video_id"),
    ):
        np.savez(home / "changed.npz", **changed)
        code, out, err = ask(*run, "--index", home / "changed.npz", "--text", "红色")
        assert code == 2 and out == [] and len(err) == 1 and message in err[0]
    (home / "changed.npz").write_bytes(index.read_bytes()[:-200])
    code, out, err = ask(*run, "--index", home / "changed.npz", "--text", "红色")
    assert code == 2 and len(err) == 1 and "cannot be read as an index" in err[0]


def test_scores_that_are_not_finite_are_refused(home: Path, ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = predictor.Predictor.rows
    monkeypatch.setattr(
        predictor.Predictor, "rows", lambda self, records: [
            {key: np.full_like(value, np.nan) if value.dtype.kind == "f" else value for key, value in row.items()}
            for row in answered(self, records)
        ],
    )  # fmt: skip
    for command, more in (("classify", []), ("retrieve", ["--text", "红色", "--export", home / "nan.npz"])):
        code, out, err = ask(command, "--checkpoint", home / command, "--video", home / "videos", *more)
        assert code == 2 and out == [] and len(err) == 1
        assert str(home / "videos" / "a.mp4") in err[0] and "not finite" in err[0]
    assert not list(home.glob("nan.npz*"))


def test_the_runs_copies_of_tokenizer_and_class_names_count(home: Path, ask: Callable) -> None:
    """The file that the settings name has changed since."""
    run = home / "own_names"
    shutil.copytree(home / "classify", run, copy_function=os.link)
    names = [f"第{i}类" for i in range(45)]
    (run / "classes.txt").write_bytes("\ufeff".encode() + "\r\n".join(names).encode())
    (home / "t.model").write_bytes(b"another")
    try:
        code, out, _ = ask(
            "classify", "--checkpoint", run, "--video", home / "videos" / "a.mp4", "--json", "--best", 99
        )
    finally:
        (home / "t.model").unlink()
    (answer,) = [json.loads(line) for line in out]
    assert code == 0 and set(answer["best"]) == set(names) and answer["head"] in names
    code, out, _ = ask("classify", "--checkpoint", home / "classify", "--video", home / "videos" / "a.mp4", "--json")
    number = schema.CLASS_NAMES.index(json.loads(out[0])["head"])
    assert answer["head"] == names[number]


def test_evaluation_writes_a_page_and_an_index(home: Path, ask: Callable) -> None:
    shards_of = ["--config.data.path=" + str(home / "data")]
    kept = ["--config.data.tokenizer=" + str(home / "retrieve" / "tokenizer" / "t.model")]
    done = python(
        "ymplug_jax.main", "--config=configs/tiny/retrieve.py", f"--workdir={home / 'retrieve'}", *shards_of, *kept, *SMALL,
        "--mode=eval",
    )  # fmt: skip
    scores = json.loads(done.stdout.splitlines()[-1])
    assert (scores["videos"], scores["texts"], scores["split"]) == (9, 9, "validation")
    folder = home / "retrieve" / "eval" / "validation"
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") >= 9 and "http" not in html.replace("http-equiv", "")
    assert len((folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 9
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        assert set(index) >= {"video", "video_id", "text", "text_of", "text_clip"}
        assert (int(index["step"]), str(index["task"]), str(index["split"])) == (3, "retrieve", "validation")
    # The index of an evaluation can be searched like an exported one.
    flags = ["retrieve", "--checkpoint", home / "retrieve", "--index", folder / "index.npz", "--text", "红色", "--json"]
    code, (line,), _ = ask(*flags)
    assert code == 0 and len(json.loads(line)["ranking"]) == 5


@pytest.mark.slow
def test_seeds_give_mean_and_deviation(home: Path, ask: Callable) -> None:
    data = [
        f"--config.data.path={home / 'data'}",
        f"--config.data.tokenizer={home / 'caption' / 'tokenizer' / 't.model'}",
    ]
    flags = [
        "ymplug_jax.main",
        "--config=configs/tiny/retrieve.py",
        f"--workdir={home / 'many'}",
        *data,
        *SMALL,
        "--seeds=2",
    ]
    python(*flags)
    done = python(*flags, "--mode=eval")
    result = json.loads(done.stdout.splitlines()[-1])
    each = [
        json.loads((home / "many" / f"seed_{seed}" / "eval" / "validation" / "scores.json").read_text())
        for seed in result["seeds"]
    ]
    values = [scores["t2v_mean_rank"] for scores in each]
    assert result["seeds"] == [42, 43] and result["t2v_mean_rank"]["mean"] == pytest.approx(np.mean(values))
    assert result["t2v_mean_rank"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert json.loads((home / "many" / "seeds.json").read_text()) == result
    # Two runs of the same width, task and step: neither takes the index of the other.
    index, folders = home / "of_42.npz", [home / "many" / f"seed_{seed}" for seed in (42, 43)]
    searched = ["--index", folders[0] / "eval" / "validation" / "index.npz", "--text", "红色"]
    assert ask("retrieve", "--checkpoint", folders[0], "--video", home / "videos", "--export", index)[0] == 0
    assert ask("retrieve", "--checkpoint", folders[0], *searched)[0] == 0
    for place in (index, searched[1]):
        code, out, (line,) = ask("retrieve", "--checkpoint", folders[1], "--index", place, "--text", "红色")
        names = [checkpoint_files.fingerprint(str(folder))[:12] for folder in folders]
        assert (
            code == 2
            and out == []
            and line.startswith(f"error: {place}: computed by task 'retrieve', step 3, 2 frames")
        )
        assert (
            names[0] != names[1]
            and f"weights {names[0]}, but {folders[1]} is " in line
            and f"weights {names[1]};" in line
        )
    code, _, (line,) = ask("retrieve", "--checkpoint", home / "many", *searched)
    assert code == 2 and "no config.json here, but runs seed_42, seed_43" in line


@pytest.mark.slow
def test_a_checkpoint_without_training_is_scored_as_it_stands(home: Path) -> None:
    data = [
        f"--config.data.path={home / 'data'}",
        f"--config.data.tokenizer={home / 'caption' / 'tokenizer' / 't.model'}",
        f"--config.train.init_from={home / 'caption'}",
        # More frames than the checkpoint has: its temporal embedding is resized.
        "--config.data.frames=4",
        "--config.model.vision.frames=4",
        "--config.options.new_tokens=6",
    ]
    shards.call(home / "data", "captioning")
    flags = ["ymplug_jax.main", "--config=configs/tiny/caption.py", f"--workdir={home / 'fresh'}", *SMALL, *data]
    done = python(*flags, "--mode=eval")
    assert "no checkpoint; scoring the parameters of config.train.init_from without training" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 0
