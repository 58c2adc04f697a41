"""Loss curves: every point is drawn, NaN leaves a gap, and the legend matches the lines."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from ymplug_jax.core import metrics
from ymplug_jax.reports import curves


def run(folder: Path, lines: list[dict]) -> epath.Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return epath.Path(folder)


def train(step: int, loss: float | None, lr: float = 1e-4) -> dict:
    return {"step": step, "time": 0.0, "loss": loss, "lr": lr}


def drawn(workdir: epath.Path) -> tuple[list, dict]:
    """(lines of the loss panel, legend: label -> (colour, line style, marker, alpha))."""
    figure = curves.figure({workdir.name: curves.read(workdir)})
    axes = figure.axes[0]
    figure.canvas.draw()
    legend = axes.get_legend()
    handles = zip(legend.get_texts(), legend.get_lines(), strict=True)
    return axes.get_lines(), {
        text.get_text(): (line.get_color(), line.get_linestyle(), line.get_marker(), line.get_alpha())
        for text, line in handles
    }


def test_three_points_with_evaluation_and_rate(tmp_path: Path):
    lines = [
        {"step": 0, "eval/loss": 6.0},
        *(train(s, 5.0 - s, s * 1e-4) for s in (1, 2, 3)),
        {"step": 3, "eval/loss": 2.5},
    ]
    workdir = run(tmp_path / "run", lines)
    found, legend = drawn(workdir)
    assert set(legend) == {"training", "evaluation"}
    for line in found:  # legend entries have the style of their lines
        style = (line.get_color(), line.get_linestyle(), line.get_marker(), line.get_alpha())
        assert legend[line.get_label()] == style and line.get_marker() == "o"
    by_label = {line.get_label(): line.get_xydata().tolist() for line in found}
    assert by_label == {"training": [[1, 4], [2, 3], [3, 2]], "evaluation": [[0, 6], [3, 2.5]]}
    assert legend["training"][:2] != legend["evaluation"][:2]
    figure = curves.figure({"run": curves.read(workdir)})
    assert figure.axes[1].get_ylabel() == "learning rate"
    assert figure.axes[1].get_lines()[0].get_ydata() == pytest.approx([1e-4, 2e-4, 3e-4])


def test_three_thousand_points_are_smoothed(tmp_path: Path):
    noise = np.random.default_rng(0).normal(size=3000)
    workdir = run(tmp_path / "run", [train(s + 1, 3.0 + 0.5 * noise[s]) for s in range(3000)])
    found, legend = drawn(workdir)
    assert list(legend) == ["training", "training, mean of 151 points"]
    raw, smooth = (line.get_ydata() for line in found)
    assert len(raw) == len(smooth) == 3000 and raw.std() > 0.4 and smooth.std() < 0.1
    # A value in the middle is the mean of the 151 points around it.
    assert smooth[1500] == pytest.approx(np.mean(3.0 + 0.5 * noise[1425:1576]))
    assert smooth[0] == pytest.approx(np.mean(3.0 + 0.5 * noise[:76]))
    assert found[0].get_marker() in ("None", "", None)


def test_a_loss_that_is_not_finite_leaves_a_marked_gap(tmp_path: Path):
    workdir = run(tmp_path / "run", [train(s, None if s in (4, 5, 7) else 5.0) for s in range(1, 11)])
    found, legend = drawn(workdir)
    assert set(legend) == {"training", "training, not finite (3)"}
    assert [s for s, y in found[0].get_xydata() if math.isnan(y)] == [4, 5, 7]
    assert found[1].get_xdata().tolist() == [4, 5, 7]
    # An interval in which all steps were skipped has no loss.
    skipped = run(tmp_path / "skipped", [train(1, 5.0), {"step": 2, "skipped": 1.0, "lr": 1e-4}, train(3, 4.0)])
    assert np.isnan(curves.read(skipped).train[1, 1])
    # On a long curve, a value between two gaps still has a marker.
    lonely = np.full(100, 2.0)
    lonely[[49, 51]] = np.nan
    assert curves._marks(lonely)["markevery"] == [50] and np.isnan(curves.smooth(lonely)[0][49])


def test_a_single_point_is_drawn(tmp_path: Path):
    for name, line in (("train", train(7, 5.0)), ("evaluation", {"step": 0, "eval/loss": 6.0})):
        workdir = run(tmp_path / name, [line])
        path = curves.draw_curve(workdir)
        assert path is not None and path.read_bytes().startswith(b"\x89PNG")
        assert all(label.is_integer() for label in curves.figure({"": curves.read(workdir)}).axes[-1].get_xticks())
    assert curves.draw_curve(run(tmp_path / "empty", [])) is None and not (tmp_path / "empty" / "loss.png").exists()
    (tmp_path / "none").mkdir()
    assert curves.draw_curve(epath.Path(tmp_path / "none")) is None


def test_a_resumed_run_replaces_repeated_steps(tmp_path: Path):
    first = [train(2, 9.0), train(4, 8.0), {"step": 4, "eval/loss": 8.5}, {"step": 4, "eval/cider": 0.5}]
    lost = [train(6, 7.0), train(8, 6.0), {"step": 8, "eval/loss": 6.5}]
    again = [train(5, 7.5), train(10, 5.0), {"step": 10, "eval/loss": 5.5}]
    workdir = run(tmp_path / "run", [*first, *lost, *again])
    curve = curves.read(workdir)
    assert curve.train.tolist() == [[2, 9], [4, 8], [5, 7.5], [10, 5]]
    assert curve.evaluation.tolist() == [[4, 8.5], [10, 5.5]]
    assert [line["eval/cider"] for line in metrics.read_metrics(workdir) if "eval/cider" in line] == [0.5]
    # A run killed between the log line of step 6 and its checkpoint logs the step twice; it is read once.
    twice = run(tmp_path / "twice", [train(6, 7.0), {"step": 6, "eval/loss": 1.0}, train(6, 7.0)])
    assert curves.read(twice).train.tolist() == [[6, 7]] and not len(curves.read(twice).evaluation)


def test_names_are_not_parsed_as_math(tmp_path: Path):
    """Parsing dollar signs as math would fail on an unbalanced one."""
    workdir = run(tmp_path / "a$b_{圆形} $\\frac", [train(1, 5.0), train(2, 4.0)])
    assert curves.draw_curve(workdir) is not None
    two = {
        "a$x": curves.read(workdir),
        "b$\\frac": curves.read(workdir),
        "empty": curves.Curve(*3 * [np.empty((0, 2))]),
    }
    axes = curves.figure(two).axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["a$x: training", "b$\\frac: training"]
    assert len({line.get_color() for line in axes.get_lines()}) == 2
    assert curves.picture(two).startswith(b"\x89PNG")


def test_losses_over_orders_of_magnitude_use_a_log_scale(tmp_path: Path):
    workdir = run(tmp_path / "run", [train(s, 10.0 ** (2 - s)) for s in range(1, 6)])
    assert curves.figure({"": curves.read(workdir)}).axes[0].get_yscale() == "log"
    negative = run(tmp_path / "negative", [train(1, 1000.0), train(2, -1.0)])
    assert curves.figure({"": curves.read(negative)}).axes[0].get_yscale() == "linear"
