"""Score tables for people: ordered labels, three significant digits, units and chance levels."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ymplug_jax.tasks.presentation import Score


class Shown(NamedTuple):
    """One line of the table."""

    group: str
    name: str
    value: float | None  # in the shown unit; None: not counted or not finite
    unit: str
    higher_is_better: bool | None  # None: not a score of the task
    chance: float | None  # in the shown unit

    @property
    def text(self) -> str:
        """The value and its unit."""
        return with_unit(self.value, self.unit)

    @property
    def chance_text(self) -> str:
        """The chance level and its unit; empty if it is not known."""
        return "" if self.chance is None else with_unit(self.chance, self.unit)


def three_digits(value: float | None) -> str:
    """Three significant digits, without an exponent if possible: 57.1, 5.26, 0.0123, 1234; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    if round(abs(value), places) >= 10 ** (3 - places):  # 9.996 rounds to 10.0
        places -= 1
    return f"{value:.2e}" if places > 6 else f"{value:.{max(0, places)}f}"


def with_unit(value: float | None, unit: str) -> str:
    """`three_digits` and the unit."""
    text = three_digits(value)
    return f"{text} {unit}" if unit and text != "–" else text


def table(scores: Mapping[str, Any], known: Sequence[Score], chance: Mapping[str, float] | None = None) -> list[Shown]:
    """Table rows of the scores in the order of `known`, with groups kept together. Texts and counts are left out.

    Args:
      scores: Content of scores.json: floats are scores, None is a score that was not counted.
      known: Scores of the task. Other scores follow under their own names, without a unit.
      chance: Chance levels by score name, in the stored unit.
    """
    named = {score.name: score for score in known}
    there = {
        key: value for key, value in scores.items() if isinstance(value, float) or (value is None and key in named)
    }
    lines = []
    for key in [*(name for name in named if name in there), *(key for key in there if key not in named)]:
        score, value, by_chance = named.get(key, Score(key, key)), there[key], (chance or {}).get(key)
        number = None if value is None or not math.isfinite(value) else score.factor * value
        better = score.higher_is_better if key in named else None
        guess = None if by_chance is None else score.factor * by_chance
        lines.append(Shown(score.group, score.label, number, score.unit, better, guess))
    order = {group: i for i, group in enumerate(dict.fromkeys(line.group for line in lines))}
    return sorted(lines, key=lambda line: order[line.group])


def text(lines: Sequence[Shown]) -> str:
    """Format the table for a terminal, with aligned columns."""
    if not lines:
        return ""
    names = [f"{line.group}: {line.name}" if line.group else line.name for line in lines]
    width, wide = max(map(len, names)), max(len(line.text) for line in lines)
    rows = []
    for name, line in zip(names, lines, strict=True):
        chance = f"   chance {line.chance_text}" if line.chance is not None else ""
        rows.append(f"{name:<{width}}  {line.text:>{wide}}{chance}")
    return "\n".join(rows)


def columns_of(text: str) -> int:
    """Width of a text on a terminal in columns: Chinese characters take two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)
