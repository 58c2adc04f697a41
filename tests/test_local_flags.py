"""Flags that take local files refuse a bucket in one line, instead of a local folder called gs:."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ymplug_jax import grade, predict
from ymplug_jax.convert import __main__ as convert

CHECKPOINT = "--checkpoint=run"


def code_of(program: Callable[[list[str]], int], flags: list[str]) -> int:
    try:
        return program(flags)
    except SystemExit as error:  # of argparse
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        (predict.main, ["chat", CHECKPOINT, "--video=gs://clips/a.mp4"], "chat reads local files"),
        (predict.main, ["chat", CHECKPOINT, "--questions=gs://clips/q.jsonl", "--out=a"], "is not a local file"),
        (predict.main, ["caption", CHECKPOINT, "--video=a.mp4", "--sheet=gs://clips/a.png"], "is not a local file"),
        (predict.main, ["caption", CHECKPOINT, "--video=gs:/clips/a.mp4"], "not a place; write gs://clips/a.mp4"),
        (predict.main, ["retrieve", CHECKPOINT, "--text=a", "--index=ftp://x/a.npz"], "ftp:// is not supported"),
        (predict.main, ["caption", "--checkpoint=gs:/runs/a", "--video=a.mp4"], "not a place; write gs://runs/a"),
        (convert.main, ["--model=gpt3", "--source=gs:/a/x.pt", "--out=x"], "not a place; write gs://a/x.pt"),
        (grade.main, ["aggregate", "--key=gs://a/k.json", "--grades=a.json"], "is not a local file"),
    ],
)
def test_a_bucket_is_refused(
    program: Callable, flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    assert code_of(program, flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
