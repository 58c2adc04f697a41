"""Loss curves: training loss, evaluation loss and learning rate of one or several runs, as an image."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ymplug_jax.core.metrics import read_metrics
from ymplug_jax.reports import fonts

MARKED = 40  # up to this many points, each has a marker; longer curves are smoothed
COLOURS = ("#3b6fb6", "#d9730d", "#2e8b57", "#a23b72", "#8c6d1f", "#5b5bd6", "#00838f", "#b3261e", "#6b7280", "#7cb518")


class Curve(NamedTuple):
    """Points of one run by step; values that were not finite are NaN."""

    train: np.ndarray  # f64[N, 2]: step, loss
    evaluation: np.ndarray  # f64[M, 2]: step, loss
    rate: np.ndarray  # f64[K, 2]: step, learning rate

    @property
    def empty(self) -> bool:
        """Whether no loss was logged."""
        return not (len(self.train) or len(self.evaluation))


def draw_curve(workdir: epath.Path) -> epath.Path | None:
    """Write `loss.png` of a run: training loss, evaluation loss and learning rate over steps.

    Returns:
      The path of the file; None if the run logged no loss.
    """
    curve = read(workdir)
    if curve.empty:
        return None
    path = workdir / "loss.png"
    path.write_bytes(picture({workdir.name: curve}, title=workdir.name))
    return path


def read(workdir: epath.Path) -> Curve:
    """Read the curve of a run from `metrics.jsonl`. A training interval without a finite loss is NaN."""
    train, evaluation, rate = [], [], []
    for line in read_metrics(workdir):
        step = line["step"]
        if any(name.startswith("eval/") for name in line):
            if "eval/loss" in line:
                evaluation.append((step, _number(line["eval/loss"])))
        else:
            train.append((step, _number(line.get("loss"))))
            if line.get("lr") is not None:
                rate.append((step, line["lr"]))
    return Curve(*(np.array(points, float).reshape(-1, 2) for points in (train, evaluation, rate)))


def picture(curves: Mapping[str, Curve], *, title: str = "", width: float = 8.0) -> bytes:
    """Render `figure` as a PNG."""
    buffer = io.BytesIO()
    figure(curves, title=title, width=width).savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def figure(curves: Mapping[str, Curve], *, title: str = "", width: float = 8.0) -> Any:
    """Matplotlib figure of the losses of one or several runs, with the learning rates below if they were logged.

    Args:
      curves: Curves by name; empty curves are left out.
      title: Title of the figure.
      width: Width in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = {name: curve for name, curve in curves.items() if not curve.empty}
    alone = len(shown) == 1
    rates = [curve.rate for curve in shown.values() if len(curve.rate)]
    drawn = Figure(figsize=(width, 5.4 if rates else 4.2), layout="constrained")
    panels = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1)) if rates else [drawn.subplots()]
    axes = panels[0]
    families = list(fonts.families()) if any(not text.isascii() for text in (title, *shown)) else [fonts.LATIN]
    for number, (name, curve) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        _draw(axes, curve, colour, COLOURS[1] if alone else colour, "" if alone else f"{name}: ", alone)
        if len(curve.rate):
            panels[1].plot(*curve.rate.T, color="0.35" if alone else colour, **_marks(curve.rate[:, 1]))
    axes.set_ylabel("loss (nats)")
    if _wide(list(shown.values())):
        axes.set_yscale("log")
        axes.set_ylabel("loss (nats, log scale)")
    # A text may hold dollar signs, which must not be read as mathematics.
    axes.set_title(title, fontfamily=families, parse_math=False)
    if rates:
        panels[1].set(ylabel="learning rate")
        panels[1].set_ylim(bottom=0)
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    first, last = axes.dataLim.intervalx
    if first == last:  # a single step: keep integer ticks around it
        axes.set_xlim(first - 1, last + 1)
    for panel in panels:
        panel.grid(alpha=0.25)
    style = {"prop": {"family": families, "size": 9 if alone else 8}}
    legend = axes.legend(**style) if alone else drawn.legend(loc="outside right upper", **style)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return drawn


def _draw(axes: Any, curve: Curve, colour: str, second: str, prefix: str, alone: bool) -> None:
    """Draw the losses of one run, with labels for the legend."""
    if len(curve.train):
        steps, losses = curve.train.T
        smoothed, window = smooth(losses)
        if window == 1:
            axes.plot(steps, losses, color=colour, label=f"{prefix}training", **_marks(losses))
        else:
            if alone:
                axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=0.8, label="training")
            axes.plot(steps, smoothed, color=colour, linewidth=1.6, label=f"{prefix}training, mean of {window} points")
        bad = steps[~np.isfinite(losses)]
        if len(bad):  # marked at the lower edge on any scale
            edge = np.zeros(len(bad))
            axes.plot(
                bad, edge, "x", color="#c4322b" if alone else colour, clip_on=False, transform=axes.get_xaxis_transform(),
                label=f"{prefix}training, not finite ({len(bad)})",
            )  # fmt: skip
    if len(curve.evaluation):
        style = {"linestyle": "--", "color": second, "label": f"{prefix}evaluation"}
        many = len(curve.evaluation) > MARKED
        axes.plot(*curve.evaluation.T, **style, **({} if many else {"marker": "o", "markersize": 4}))


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Centred moving mean over a twentieth of the points: f64[N] -> (f64[N], window). NaN stays NaN.

    At the ends and beside NaN the mean is over the points that exist. Up to MARKED points, the window is 1 (no smoothing).
    """
    count = len(values)
    window = 1 if count <= MARKED else 2 * max(1, count // 40) + 1
    if window == 1:
        return values, 1
    there = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(there, values, 0.0), ones, mode="same")
    weight = np.convolve(there.astype(float), ones, mode="same")
    return np.where(there, total / np.maximum(weight, 1), np.nan), window


def _marks(values: np.ndarray) -> dict[str, Any]:
    """Markers on every point of a short curve; on a long curve only on points without a finite neighbour."""
    if len(values) <= MARKED:
        return {"marker": "o", "markersize": 3}
    there = np.concatenate([[False], np.isfinite(values), [False]])
    lonely = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    return {"marker": "o", "markersize": 3, "markevery": lonely.tolist()} if len(lonely) else {}


def _wide(curves: Sequence[Curve]) -> bool:
    """Whether the losses span more than two orders of magnitude, which needs a log scale."""
    losses = np.concatenate([points[:, 1] for curve in curves for points in (curve.train, curve.evaluation)])
    losses = losses[np.isfinite(losses)]
    return len(losses) > 0 and losses.min() > 0 and losses.max() > 100 * losses.min()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
