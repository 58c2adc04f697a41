"""Answers about video files from checkpoints of real runs: classify, caption, retrieve, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runs
import shards

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "data_prep"))
import videos  # noqa: E402  the drawn test videos

SMALL = [flag for flag in runs.SMALL if "max_tokens" not in flag and "vocab" not in flag]
SMALL += ["--config.model.llm.vocab=300", "--config.data.max_tokens=40", "--config.train.duration=3 steps"]


def python(*command: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=runs.environment(), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three tasks, and a folder of videos."""
    home = tmp_path_factory.mktemp("predict")
    data = runs.make_data(home)
    for task, kind in (("classify", "classification"), ("caption", "captioning"), ("retrieve", "retrieval")):
        shards.call(home / "data", kind)
        more = ["--config.options.new_tokens=6"] if task == "caption" else []
        python(
            "ymplug_jax.main", f"--config=configs/tiny/{task}.py", f"--workdir={home / task}", *data, *SMALL, *more
        )  # fmt: skip
    (home / "t.model").unlink()  # a run keeps its tokenizer
    (home / "videos").mkdir()
    for name in ("a.mp4", "b.mkv"):
        videos.write(home / "videos" / name)
    (home / "broken.mp4").write_bytes(b"")
    return home


def predict(*flags: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    return python("ymplug_jax.predict", *map(str, flags), code=code)


def test_classify_a_file_and_a_folder(home: Path) -> None:
    done = predict("classify", "--checkpoint", home / "classify", "--video", home / "videos", "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(a["video"]).name for a in answers] == ["a.mp4", "b.mkv"]
    assert all(len(a["best"]) == 5 and a["class"] == next(iter(a["best"])) and a["shown"] == "video" for a in answers)
    file, sheet = home / "videos" / "a.mp4", home / "sheet.png"
    done = predict(
        "classify", "--checkpoint", home / "classify", "--video", file, "--title", "红色的圆形", "--sheet", sheet
    )
    assert "by video and title" in done.stdout and "the head says" in done.stdout
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_caption_goes_on_past_a_broken_file(home: Path) -> None:
    flags = [
        "caption",
        "--checkpoint",
        f"file://{home / 'caption'}",
        "--video",
        home / "broken.mp4",
        home / "videos" / "b.mkv",
    ]
    done = predict(*flags, "--json", code=1)
    (answer,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert Path(answer["video"]).name == "b.mkv" and isinstance(answer["caption"], str)
    assert f"error: {home / 'broken.mp4'}: empty_file: zero bytes" in done.stderr and "Traceback" not in done.stderr


def test_retrieve_from_files_and_from_an_index(home: Path) -> None:
    run, index = ["retrieve", "--checkpoint", home / "retrieve"], home / "index.npz"
    texts = ["红色的圆形在移动", "蓝色"]
    done = predict(*run, "--video", home / "videos", "--text", *texts, "--export", index, "--json")
    from_files = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["text"] for a in from_files] == texts and len(from_files[0]["ranking"]) == 2
    scores = [score for _, score in from_files[0]["ranking"]]
    assert scores == sorted(scores, reverse=True)
    with np.load(index, allow_pickle=False) as stored:
        np.testing.assert_allclose(np.linalg.norm(stored["video"], axis=1), 1, atol=1e-5)
    done = predict(*run, "--index", index, "--text", *texts, "--json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == from_files
    done = predict(*run, "--video", home / "videos" / "a.mp4", "--text", *texts, "--rank", "texts")
    assert done.stdout.count("在移动") == 1 and "1. " in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["classify", "--checkpoint", "nowhere", "--video", "x.mp4"], "nowhere: no config.json here"),
        (["caption", "--checkpoint", "{home}/classify", "--video", "x.mp4"], "is a run of task 'classify'"),
        (["classify", "--checkpoint", "{home}/classify"], "classify: give files with --video"),
        (["retrieve", "--checkpoint", "{home}/retrieve", "--video", "x.mp4"], "give --text to search"),
        (["caption", "--checkpoint", "{home}/caption", "--video", "{home}/data"], "no videos in this folder"),
    ],
)
def test_mistakes_end_in_one_line(home: Path, flags: list[str], message: str) -> None:
    done = predict(*(flag.format(home=home) for flag in flags), code=2)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line and done.stdout == ""


def test_evaluation_writes_a_page_and_an_index(home: Path) -> None:
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
        assert set(index) == {"video", "video_id", "text", "text_of", "text_clip"}


def test_seeds_give_mean_and_deviation(home: Path) -> None:
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


def test_a_checkpoint_without_training_is_scored_as_it_stands(home: Path) -> None:
    data = [
        f"--config.data.path={home / 'data'}",
        f"--config.data.tokenizer={home / 'caption' / 'tokenizer' / 't.model'}",
        f"--config.train.init_from={home / 'caption'}",
        # More frames than the checkpoint knows: its table of times is stretched.
        "--config.data.frames=4",
        "--config.model.vision.frames=4",
        "--config.options.new_tokens=6",
    ]
    shards.call(home / "data", "captioning")
    flags = ["ymplug_jax.main", "--config=configs/tiny/caption.py", f"--workdir={home / 'fresh'}", *SMALL, *data]
    done = python(*flags, "--mode=eval")
    assert "scoring config.train.init_from as it stands" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 0
