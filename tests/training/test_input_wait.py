"""The share of time that the loop waits for batches, measured with a simulated clock."""

import types
from pathlib import Path

import jax.numpy as jnp
import pytest

import runs
from ymplug_jax.core import metrics
from ymplug_jax.training import loop


class Clock:
    """A clock that advances only when `now` is changed."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def run_log(folder: Path, monkeypatch: pytest.MonkeyPatch, wait: float, work: float, pause: float = 0.0) -> list[dict]:
    """Return the metrics of ten steps, logged every five steps.

    Args:
      folder: where metrics.jsonl is written.
      monkeypatch: replaces the clock.
      wait: seconds that each step waits for its batch.
      work: seconds that each step computes.
      pause: seconds of the evaluation after each log line.
    """
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    settings = types.SimpleNamespace(batch_size=4, max_bad_steps=3)
    experiment = types.SimpleNamespace(train=settings)
    run = types.SimpleNamespace(total_steps=10, steps_per_epoch=5, experiment=experiment, mixture=None)
    out = metrics.Writer(folder, active=True)
    log = loop._Log(run, out, types.SimpleNamespace(workdir=folder), 0)
    one = jnp.float32(1)
    means = {"loss": metrics.Mean(one, one), "skipped": metrics.Mean(0 * one, one)}
    for step in range(1, 11):
        with log.waiting():
            clock.now += wait
        clock.now += work
        log.add(step, means)
        if step % 5 == 0:
            log.flush(step)
            clock.now += pause
            log.restart_clock()
    log.close()
    out.close()
    return metrics.read_metrics(folder)


@pytest.mark.parametrize(
    ("wait", "work", "share"), [(0.0, 2.0, 0.0), (0.001, 1.0, 0.001), (9.0, 1.0, 0.9), (3.0, 0.0, 1.0)]
)
def test_share_of_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: float, work: float, share: float):
    lines = run_log(tmp_path, monkeypatch, wait, work)
    assert [line["step"] for line in lines] == [5, 10]
    for line in lines:
        assert line["input_wait"] == pytest.approx(share, abs=1e-4)
        assert line["samples_per_second"] == pytest.approx(4 / (wait + work))


def test_evaluation_time_is_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = run_log(tmp_path, monkeypatch, 1.0, 3.0, pause=500.0)
    assert [line["input_wait"] for line in lines] == pytest.approx([0.25, 0.25])


@pytest.mark.slow
def test_a_run_logs_input_wait(tmp_path: Path):
    """A real run with worker processes, which the thread of the feed starts."""
    data = runs.make_data(tmp_path)
    runs.run(tmp_path / "run", data, "--config.train.duration=3 steps", "--config.data.workers=1")
    shares = [line["input_wait"] for line in metrics.read_metrics(tmp_path / "run") if "loss" in line]
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)
