"""Scores as people read them: names in an order, three digits and a unit, the chance level beside."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Patterns of the last part of a score's name, full match -> (factor to the shown number, unit, whether more is better).
UNITS: tuple[tuple[str, float, str, bool | None], ...] = (
    (r".*top\d+|((v2t|t2v)_)?r(\d+|_mean)", 1, "%", True),  # stored in percent
    (r"bleu\d|meteor|rouge_l|.*_(share|accuracy)|accuracy|precision|recall", 100, "%", True),  # stored as fractions
    (r"cider", 1, "", True),
    (r".*loss", 1, "nats", False),
    (r".*_rank", 1, "", False),
)
FACTS = ("modalities", "task", "split", "step", "search", "note")


class Shown(NamedTuple):
    """One line of the table."""

    group: str  # what stands before the last slash, and the direction of a retrieval
    name: str
    value: float | None  # in the shown unit; None: nothing was counted, or not finite
    unit: str
    higher_is_better: bool | None
    chance: float | None  # in the shown unit

    @property
    def text(self) -> str:
        return with_unit(self.value, self.unit)

    @property
    def chance_text(self) -> str:
        return "" if self.chance is None else with_unit(self.chance, self.unit)


def three_digits(value: float | None) -> str:
    """Three significant digits without an exponent where it can be: 57.1, 5.26, 0.0123, 1234; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    if round(abs(value), places) >= 10 ** (3 - places):  # 9.996 has become 10.0
        places -= 1
    return f"{value:.2e}" if places > 6 else f"{value:.{max(0, places)}f}"


def with_unit(value: float | None, unit: str) -> str:
    """`three_digits` and the unit."""
    text = three_digits(value)
    return f"{text} {unit}" if unit and text != "–" else text


def unit_of(name: str) -> tuple[float, str, bool | None]:
    """(factor, unit, whether more is better) of a score by its name; (1, "", None) where nothing is known of it."""
    last = name.rpartition("/")[2]
    return next((tuple(rest) for pattern, *rest in UNITS if re.fullmatch(pattern, last)), (1, "", None))


def table(scores: Mapping[str, Any], chance: Mapping[str, float] | None = None) -> list[Shown]:
    """The scores in the order in which they stand, groups together; texts and counts are left out.

    Args:
      scores: as in scores.json: floats are scores, None a score that was not counted.
      chance: name -> score by chance, in the stored unit.
    """
    lines = []
    for key, value in scores.items():
        if key in FACTS or not (value is None or isinstance(value, float)):
            continue
        factor, unit, better = unit_of(key)
        group, _, name = key.rpartition("/")
        if direction := re.match(r"(v2t|t2v)_", name):
            words = {"v2t": "video to text", "t2v": "text to video"}[direction[1]]
            group, name = f"{group}, {words}" if group else words, name.removeprefix(direction[0])
        by_chance = (chance or {}).get(key)
        number = None if value is None or not math.isfinite(value) else factor * value
        lines.append(Shown(group, label(name), number, unit, better, None if by_chance is None else factor * by_chance))
    order = {group: i for i, group in enumerate(dict.fromkeys(line.group for line in lines))}
    return sorted(lines, key=lambda line: order[line.group])


def label(name: str) -> str:
    """The last part of a score's name in words: "r5" -> "R@5", "likelihood_top1" -> "likelihood, top-1"."""
    name = re.sub(r"^r(\d+)$", r"R@\1", name)
    name = re.sub(r"_?top(\d+)$", r" top-\1", name)
    name = re.sub(r"^bleu(\d)$", r"BLEU-\1", name)
    fixed = {"cider": "CIDEr", "meteor": "METEOR", "rouge_l": "ROUGE-L", "r_mean": "mean of the recalls"}
    return fixed.get(name, name.replace("_", " ").strip())


def text(lines: Sequence[Shown]) -> str:
    """The table for a terminal, with aligned columns."""
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
    """Columns that a text takes on a terminal: Chinese characters take two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)
