"""Durations in settings: "2000 steps", "10 epochs" or "5%" of the run."""

import re
from fractions import Fraction

from ymplug_jax.core.exits import Mistake


def steps_in(duration: str, *, steps_per_epoch: int, total: int = 0, setting: str = "") -> int:
    """Return the number of optimizer steps in "2000 steps", "10 epochs" or "5%" (of `total` steps).

    Fractions of a step are rounded down, as in the reference: 10% of 57 steps are 5 steps.

    Args:
      duration: the text. Its number consists of digits with at most one decimal point; surrounding spaces are ignored.
      steps_per_epoch: steps in one epoch.
      total: steps of the run; 0 where a percentage makes no sense.
      setting: name of the setting in messages, e.g. "config.train.duration".

    Raises:
      Mistake: the text has another form, or is more than 100%.
    """
    name = f"{setting}: " if setting else ""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(steps?|epochs?|%)\s*", duration)
    if not match:
        raise Mistake(f'{name}cannot read the duration {duration!r}; write "2000 steps", "10 epochs" or "5%"')
    number, unit = Fraction(match[1]), match[2]  # exact: with floats, 7% of 100 is 7.000000000000001
    if unit != "%":
        return int(number * (steps_per_epoch if unit.startswith("epoch") else 1))
    if number > 100:
        raise Mistake(f"{name}{duration!r} is more than the whole run; give at most 100%")
    return int(number * total / 100)


def is_zero(duration: str) -> bool:
    """Return whether a duration is zero: "0 steps", "0 epochs" or "0%"."""
    return steps_in(duration, steps_per_epoch=10**9, total=10**9) == 0
