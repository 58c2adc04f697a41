"""Comparison of runs: best scores, differing settings, seeds, and errors in one line."""

import json
from pathlib import Path

import pytest

from ymplug_jax import compare

SCORES = {"task": "classify", "split": "validation", "step": 40, "examples": 8}


def run(
    folder: Path, seed: int = 42, lr: float = 1e-3, task: str = "classify", points: int = 3, **splits: dict
) -> Path:
    folder.mkdir(parents=True)
    settings = {"task": task, "optim": {"lr": lr}, "train": {"seed": seed}, "data": {"path": "shards"}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    lines = [{"step": s, "loss": 5.0 - s, "lr": lr} for s in range(1, points + 1)]
    if points:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split, scores in splits.items():
        (folder / "eval" / split).mkdir(parents=True)
        (folder / "eval" / split / "scores.json").write_text(
            json.dumps(SCORES | {"task": task, "split": split} | scores)
        )
    return folder


def call(capsys: pytest.CaptureFixture, *args, code: int = 0) -> tuple[str, str]:
    assert compare.main([str(arg) for arg in args]) == code
    done = capsys.readouterr()
    return done.out, done.err


def test_scores_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture):
    a = run(
        tmp_path / "runs" / "a", validation={"loss": 2.0, "both/head_top1": 50.0, "t2v_median_rank": 3.0, "odd": 1.0}
    )
    b = run(tmp_path / "runs" / "乙 <b>", lr=3e-3, validation={"loss": 1.5, "both/head_top1": 25, "t2v_median_rank": 3.0, "odd": 2.0}, test={"loss": None})  # fmt: skip
    out, _ = call(capsys, a, b, "--out", tmp_path / "c.html", "--json")
    lines = [" ".join(line.split()) for line in out.split("\n")]
    assert "classify on validation a 乙 <b>" in lines and "classify on test 乙 <b>" in lines
    assert "loss 2.00 nats 1.50 nats *" in lines and "both: head top-1 50.0 % * 25.0 %" in lines
    assert "text to video: median rank 3.00 3.00" in lines  # equal values: none is marked
    assert "odd 1.00 2.00" in lines  # an unknown score has no direction
    assert "config.optim.lr 0.001 0.003" in lines and "config.train.seed 42 42" in lines
    assert not any("config.data.path" in line for line in lines)
    found = json.loads(out.strip().split("\n")[-1])
    assert found["runs"][1]["eval"]["validation"]["both/head_top1"] == 25 and found["differ"]["optim.lr"] == [
        "0.001",
        "0.003",
    ]
    assert {(one["score"], *one["runs"]) for one in found["best"]} == {("loss", str(b)), ("both: head top-1", str(a))}
    html = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "乙 &lt;b&gt;" in html and "乙 <b>" not in html and "http" not in html
    assert html.count("data:image/png;base64,") == 1 and html.count('class="number best"') == 2


def test_only_comparable_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture):
    a = run(tmp_path / "a", validation={"loss": 2.0})
    few = run(tmp_path / "few", validation={"loss": 1.0, "examples": 3})
    other = run(tmp_path / "other", task="caption", validation={"loss": 0.5, "cider": 1.0})
    fresh = run(tmp_path / "fresh", points=0)
    out, err = call(capsys, a, few, other, fresh, "--out", tmp_path / "c.html")
    assert "different numbers of examples: no best score is marked" in out and " *" not in out and err == ""
    assert "fresh: no evaluation yet" in out and "caption on validation" in out
    html = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "No loss was logged by" in html and "not yet" in html
    out, _ = call(capsys, fresh, "--out", tmp_path / "c.html")
    assert "no evaluation yet" in out and "settings that differ" not in out


def test_seeds_give_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed, value in ((9, 40.0), (10, 50.0), (11, 60.0)):
        run(tmp_path / "many" / f"seed_{seed}", seed=seed, validation={"t2v_r1": value})
    run(tmp_path / "other", lr=1.0, validation={"t2v_r1": 99.0})
    out, _ = call(capsys, tmp_path / "many", tmp_path / "other", "--out", tmp_path / "c.html", "--json")
    assert "seeds 9, 10, 11" in out and "50.0 ± 10.0 %" in out
    assert [one["seed"] for one in json.loads(out.strip().split("\n")[-1])["runs"]] == [9, 10, 11, 42]
    assert "over seeds 9, 10, 11" in (tmp_path / "c.html").read_text(encoding="utf-8")


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    a = run(tmp_path / "a", validation={"loss": 1.0})
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "empty").mkdir()
    damaged = run(tmp_path / "damaged")
    (damaged / "config.json").write_text('{"task": ')
    listed = run(tmp_path / "listed", validation={})
    (listed / "eval" / "validation" / "scores.json").write_text("[1]")
    out = ["--out", tmp_path / "c.html"]
    for args, message in (
        ([tmp_path / "none", *out], "none: no such folder; give the --workdir of a run"),
        ([tmp_path / "empty", *out], "empty: no config.json here"),
        ([a / "config.json", *out], "config.json: a file, not a folder"),
        ([a, f"{a}/", *out], "the same run as"),
        ([a, tmp_path / "link", *out], "the same run as"),
        ([damaged, *out], "config.json: damaged or unreadable"),
        ([listed, *out], "scores.json: holds no JSON object"),
        ([a, "--out", tmp_path / "c.png"], "not the name of an HTML file"),
        ([a, "--out", tmp_path / "none" / "c.html"], "no such folder"),
        ([], "the following arguments are required: RUN"),
        ([a, "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ):
        said, err = call(capsys, *args, code=2)
        assert said == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err, err
        assert not (tmp_path / "c.html").exists()
