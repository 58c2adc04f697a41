"""The command of the graded evaluation: a sheet of real files, a run that answers, the results, and its refusals."""

import json
from pathlib import Path

import pytest

import videos
from ymplug_jax import grade, predict
from ymplug_jax.core import exits

QUESTIONS = [("a.mp4", "谁？", "scene"), ("a.mp4", "几个？", "detail"), ("sub/b.mp4", "哪里？", "scene")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, three questions about them and the answers of two systems."""
    root = tmp_path_factory.mktemp("grade")
    videos.write(root / "videos" / "a.mp4", 24)
    videos.write(root / "videos" / "sub" / "b.mp4", 3)
    rows = [
        {"id": i, "video": video, "question": text, "category": kind} for i, (video, text, kind) in enumerate(QUESTIONS)
    ]
    lines(root / "q.jsonl", rows)
    lines(root / "base.jsonl", [{"id": i, "answer": f"旧{i}"} for i in range(3)])
    lines(root / "tuned.jsonl", [{"id": i, "answer": "旧0" if i == 0 else f"新{i}"} for i in range(3)])
    return root


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sheet(folder: Path, out: Path, *more: str, systems: tuple[str, ...] = ("base", "tuned")) -> int:
    named = [word for name in systems for word in ("--system", f"{name}={folder / name}.jsonl")]
    flags = ["--questions", str(folder / "q.jsonl"), "--video_root", str(folder / "videos"), "--out", str(out)]
    return grade.main(["sheet", *flags, *named, *more])


def test_from_videos_to_results(folder: Path, tmp_path: Path, capsys) -> None:
    assert sheet(folder, tmp_path / "s.html", "--frames", "5", "--seed", "x") == 0
    html, key = (tmp_path / "s.html").read_text(), json.loads((tmp_path / "s.key.json").read_text())
    assert (
        html.count("data:image/jpeg") == 5 + 3 and html.count('class="answer open"') == 5
    )  # the short clip has three frames
    assert "base" not in html.replace("base64", "") and "tuned" not in html and key["systems"] == ["base", "tuned"]
    names = [f"{one['id']}/{i + 1}" for one in key["questions"] for i in range(len(one["answers"]))]
    best = {f"{one['id']}/{i + 1}": "A" if "tuned" in own["systems"] else "C" for one in key["questions"] for i, own in enumerate(one["answers"])}  # fmt: skip
    files = []
    for grader, marks in (("甲", best), ("乙", best), ("丙", dict.fromkeys(names, "B"))):
        files.append(tmp_path / f"{grader}.json")
        files[-1].write_text(json.dumps({"sheet": key["sheet"], "grader": grader, "grades": marks}))
    flags = ["--key", str(tmp_path / "s.key.json"), "--out", str(tmp_path / "r.json"), "--samples", "200"]
    capsys.readouterr()
    assert grade.main(["aggregate", *flags, "--grades", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["systems"]["tuned"]["mean"] == pytest.approx((3 + 3 + 2) / 3)
    assert found["systems"]["base"]["grades"] == {"A": 2, "B": 3, "C": 4, "D": 0}
    (pair,) = found["pairs"]
    assert (pair["better"], pair["equal"], pair["worse"]) == (0, 1, 2)  # base against tuned
    assert "base - tuned: -0.89" in printed and not list(tmp_path.glob("*.partial"))


def test_a_run_answers_the_questions_itself(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run, asked = tmp_path / "run", []
    run.mkdir()

    def answer(argv: list[str], fail: int = 0) -> int:
        asked.append(argv)
        flags = dict(zip(argv[1::2], argv[2::2], strict=True))
        rows = [json.loads(line) for line in Path(flags["--questions"]).read_text().splitlines()]
        lines(Path(flags["--out"]), [row | {"line": i, "answer": "新"} for i, row in enumerate(rows)])
        return fail

    monkeypatch.setattr(predict, "main", answer)
    flags = ["--questions", str(folder / "q.jsonl"), "--video_root", str(folder / "videos")]
    named = [
        "--system",
        f"base={folder / 'base.jsonl'}",
        "--system",
        f"my run={run}",
        "--out",
        str(tmp_path / "s.html"),
    ]
    assert grade.main(["sheet", *flags, *named]) == 0
    assert asked[0][:3] == ["chat", "--checkpoint", str(run)] and asked[0][-1] == str(tmp_path / "s.my_run.jsonl")
    key = json.loads((tmp_path / "s.key.json").read_text())
    assert {"text": "新", "systems": ["my run"]} in key["questions"][0]["answers"]
    monkeypatch.setattr(predict, "main", lambda argv: answer(argv, 1))
    assert grade.main(["sheet", *flags, *named]) == exits.MISTAKE
    assert "not all questions are answered" in capsys.readouterr().err


def test_mistakes_end_in_one_line_and_leave_no_file(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "s.html"
    lines(folder / "missing.jsonl", [{"id": 0, "answer": "a"}])
    outside = tmp_path / "outside.mp4"
    videos.write(outside, 3)
    (folder / "videos" / "link.mp4").symlink_to(outside)
    (folder / "videos" / "text.mp4").write_text("no video")
    sets = {}
    for name, video in (("gone", "gone.mp4"), ("link", "link.mp4"), ("text", "text.mp4")):
        sets[name] = lines(folder / f"q_{name}.jsonl", [{"video": video, "question": "谁？"}])
        lines(folder / f"{name}.jsonl", [{"id": "1", "answer": "a"}])

    def said(*argv: object) -> str:
        assert grade.main([str(word) for word in argv]) == exits.MISTAKE
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert not out.exists() and not out.with_suffix(".key.json").exists()
        return captured.err

    def refused(*more: object, questions: object = folder / "q.jsonl") -> str:
        base = ["--system", f"a={folder / 'base.jsonl'}"] if "--system" not in more else []
        named = ["--questions", questions, "--video_root", folder / "videos"]
        where = [] if "--out" in more else ["--out", out]
        return said("sheet", *named, *where, *base, *more)

    two = ["--system", f"b={folder / 'tuned.jsonl'}"]
    assert "--system: only one system" in refused()
    both = ["--system", f"a={folder / 'base.jsonl'}", *two]
    assert "the name 'a' is used twice" in refused(*both[:2], *both[:2])
    assert "not NAME=PATH" in refused("--system", "a")
    assert "2 questions have no answer, the first is '1'" in refused(*both, "--system", f"c={folder / 'missing.jsonl'}")
    assert "--frames: 17 is out of range" in refused(*both, "--frames", 17)
    assert "not the name of an HTML file" in refused(*both, "--out", tmp_path / "s.txt")
    assert "no such folder" in refused(*both, "--out", tmp_path / "none" / "s.html")
    for name, message in (
        ("gone", "gone.mp4: no such file"),
        ("link", "a link leads outside"),
        ("text", "not_a_video"),
    ):
        one = ["--system", f"a={folder / name}.jsonl", "--system", f"b={folder / name}.jsonl"]
        assert message in refused(*one, questions=sets[name])
    key = ["aggregate", "--key", tmp_path / "k.json", "--grades", "x"]
    assert "k.json: no such file" in said(*key)
    assert "--samples: 5 is out of range" in said(*key, "--samples", 5)
    assert "--seed: -1 is negative" in said(*key, "--seed", -1)
    assert "invalid choice" in said("nothing") and "--nothing" in said(*key, "--nothing")
