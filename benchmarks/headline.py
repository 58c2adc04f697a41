"""Draws the table and the chart at the top of BENCHMARKS.md from BENCHMARKS.json.

    python -m benchmarks.headline

BENCHMARKS.json holds the headline figures, each with the command that measured it; after a new measurement, change the figure there
and in the section of BENCHMARKS.md that it comes from.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import chart

ROOT = Path(__file__).parents[1]
DATA, PAGE, CHART = ROOT / "BENCHMARKS.json", ROOT / "BENCHMARKS.md", ROOT / "docs" / "images" / "benchmarks.svg"
BEGIN, END = "<!-- headline -->", "<!-- /headline -->"
VERDICTS = {False: "**missed**", True: "met", None: ""}


def anchor(section: str) -> str:
    """Name of a heading's link on GitHub and in the site."""
    kept = "".join(c for c in section.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def table(figures: list[dict[str, Any]]) -> str:
    """The headline figures, missed goals first."""
    lines = ["| | figure | compared with | goal | |", "|---|---|---|---|---|"]
    for one in sorted(figures, key=lambda one: one["met"] is not False):
        name = f"[{one['what']}](#{anchor(one['section'])})"
        lines.append(f"| {name} | {one['figure']} | {one['compared_with']} | {one['goal']} | {VERDICTS[one['met']]} |")
    return "\n".join(lines)


def draw(figures: list[dict[str, Any]]) -> str:
    """The chart of all figures that are a ratio to something else."""
    rows = [
        chart.Bar(one["what"], one["ratio"], one["figure"], one["met"] is False, one["goal_ratio"])
        for one in sorted(figures, key=lambda one: one["ratio"] or 0)
        if one["ratio"]
    ]
    note = "Ratio to what it is compared with, logarithmic; dashed: equal; black mark: goal; red: goal missed"
    return chart.bars("Headline figures", note, rows, log=True, line=1.0)


def page(text: str, figures: list[dict[str, Any]]) -> str:
    """BENCHMARKS.md with the table and the chart between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    made = f"{BEGIN}\n\n{table(figures)}\n\n![Headline figures as ratios](docs/images/{CHART.name})\n\n{END}"
    return head + made + tail


def main() -> None:
    """Write chart and page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = json.loads(DATA.read_text(encoding="utf-8"))
    CHART.parent.mkdir(parents=True, exist_ok=True)
    CHART.write_text(draw(figures), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()
