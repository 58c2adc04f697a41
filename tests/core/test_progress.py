"""Progress display: a bar on a terminal, plain lines in a file."""

import io

import pytest

from ymplug_jax.core import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_log_has_a_line_every_30_seconds(clock: list[float]):
    log = io.StringIO()
    for _ in progress.bar(range(100), desc="evaluate test", unit="batch", file=log):
        clock[0] += 1
    assert log.getvalue().splitlines() == [
        "evaluate test: 30 of 100 batches (30 %), 30 s",
        "evaluate test: 60 of 100 batches (60 %), 60 s",
        "evaluate test: 90 of 100 batches (90 %), 90 s",
        "evaluate test: 100 of 100 batches (100 %), 100 s",
    ]


def test_short_loop_is_silent_unless_leave_is_set(clock: list[float]):
    log = io.StringIO()
    assert list(progress.bar("abc", desc="read", unit="clip", file=log)) == ["a", "b", "c"]
    assert log.getvalue() == ""
    with progress.bar(total=50, initial=40, desc="train", unit="step", leave=True, file=log) as steps:
        clock[0] += 5
        steps.update(10)
        steps.set_postfix_str("loss 1.5")
    assert log.getvalue() == "train: 50 of 50 steps (100 %), 5 s, loss 1.5\n"


def test_hidden_scaled_and_without_total(clock: list[float]):
    log = io.StringIO()
    with progress.bar(total=3, desc="x", unit="step", leave=True, hidden=True, file=log) as steps:
        steps.update(3)
        assert steps.disable
    with progress.bar(total=2_500_000, desc="convert", unit="B", scale=True, file=log) as steps:
        clock[0] += 31
        steps.update(1_250_000)
    clips = progress.bar((i for i in range(2)), desc="draw", unit="clip", leave=True, file=log)
    assert list(clips) == [0, 1]
    assert log.getvalue().splitlines() == [
        "convert: 1.25 M of 2.5 M B (50 %), 31 s",
        "draw: 2 clips, 0 s",
    ]


def test_control_codes_go_to_terminals_only():
    terminal, log = Terminal(), io.StringIO()
    for place in (terminal, log):
        for _ in progress.bar(range(3), desc="x", unit="step", leave=True, file=place):
            progress.write("one line", place)
    assert "\r" in terminal.getvalue()
    assert log.getvalue().splitlines()[:3] == ["one line"] * 3
    assert not set("\r\x1b") & set(log.getvalue())
