"""`benchmarks.video_memory` at a small size: a video longer than a block takes less memory, and one that fits a block the same."""

import json

import pytest

from benchmarks import video_memory
from ymplug_jax.models import plain_attention

LONG = 6 * plain_attention.BLOCK  # tokens, more than are computed at once


def rows(capsys: pytest.CaptureFixture[str], tokens: int) -> tuple[list[dict], list[str]]:
    video_memory.main(["--size=tiny", f"--tokens={tokens}", "--batch", "2", "--on", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])["rows"], lines[:-1]


def test_a_long_video_takes_less_memory_than_all_its_logits(capsys: pytest.CaptureFixture[str]) -> None:
    (row,), table = rows(capsys, LONG)
    whole, blocks = (row[way] for way in video_memory.WAYS)
    assert whole > 4 * 2 * 4 * LONG**2, "float32 logits of two videos and four heads exist"
    assert 2 * blocks < whole
    assert f"| {100 * blocks / whole:.0f} % |" in table[-1]


def test_a_short_video_is_computed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    (row,), _ = rows(capsys, 64)
    assert row[video_memory.WAYS[0]] == row[video_memory.WAYS[1]]
