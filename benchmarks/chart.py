"""Bar charts as SVG text, drawn without a library so that the same figures give the same file."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

LEFT, WIDTH, ROW, TOP, RIGHT = 260, 360, 26, 54, 90
BLUE, RED, GREY, TEXT = "#3f6fb5", "#c2593f", "#8a8f98", "#20242b"


class Bar(NamedTuple):
    """One bar."""

    label: str
    value: float
    shown: str  # text in the last column
    missed: bool = False  # whether it falls short of its goal
    goal: float | None = None


def bars(title: str, note: str, rows: Sequence[Bar], *, log: bool = False, line: float | None = None) -> str:
    """Horizontal bars.

    Args:
      title: first line.
      note: second line, smaller: what the axis shows.
      rows: from top to bottom; values above 0.
      log: logarithmic axis from 1/4; else linear from 0.
      line: value that a vertical line marks, such as equal speed.
    """
    most = max(max(row.value, row.goal or 0) for row in rows)

    def x(value: float) -> float:
        share = math.log(max(value, 0.25) * 4) / math.log(most * 4) if log else value / most
        return LEFT + WIDTH * share

    height = TOP + ROW * len(rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" '
        f'viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" font-family="sans-serif" font-size="13" fill="{TEXT}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="12" y="41" font-size="12" fill="{GREY}">{html.escape(note)}</text>',
    ]
    if line is not None:
        parts.append(
            f'<line x1="{x(line):.1f}" x2="{x(line):.1f}" y1="{TOP}" y2="{height - 8}" stroke="{GREY}" stroke-dasharray="4 3"/>'
        )
    for i, row in enumerate(rows):
        y = TOP + ROW * i
        colour = RED if row.missed else BLUE
        parts.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{html.escape(row.label)}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y + 4}" width="{x(row.value) - LEFT:.1f}" height="16" fill="{colour}"/>')
        if row.goal is not None:
            parts.append(f'<rect x="{x(row.goal) - 1:.1f}" y="{y + 1}" width="2.5" height="22" fill="{TEXT}"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 10}" y="{y + 16}">{html.escape(row.shown)}</text>')
    return "\n".join([*parts, "</svg>", ""])
