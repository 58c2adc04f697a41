"""Whether an annotator makes too many errors, by an exact binomial test on gold items, and how often the test finds one who does."""

import functools
from typing import NamedTuple

from scipy.stats import binom

BOUND = 0.025  # error rate of the paper above which annotators are dropped
SIGNIFICANCE = 0.05
RATES = (0.01, 0.025, 0.05, 0.075, 0.10, 0.15, 0.20)  # of the printed table of power


class GoldTest(NamedTuple):
    """A test on a number of gold items. An annotator fails with `critical` errors or more."""

    items: int
    bound: float  # largest error rate that is allowed
    significance: float  # largest probability that an annotator of exactly that rate fails

    @property
    def critical(self) -> int:
        """Fewest errors that an annotator at the bound makes with at most the probability `significance`; items + 1 if none."""
        return _critical(*self)

    def p_value(self, errors: int) -> float:
        """Probability that an annotator at the bound makes so many errors or more."""
        return float(binom.sf(errors - 1, self.items, self.bound))

    def fails(self, errors: int) -> bool:
        """Whether an annotator with so many errors is over the bound."""
        return errors >= self.critical

    def power(self, rate: float) -> float:
        """Probability that an annotator with this true error rate fails."""
        return float(binom.sf(self.critical - 1, self.items, rate))


@functools.lru_cache(maxsize=1024)
def _critical(items: int, bound: float, significance: float) -> int:
    return int(binom.isf(significance, items, bound)) + 1 if items else 1


@functools.lru_cache(maxsize=1024)
def powers(test: GoldTest) -> dict[float, float]:
    """The power of a test at each of RATES."""
    return {rate: test.power(rate) for rate in RATES}


def table(test: GoldTest) -> str:
    """The power of a test in words, for a terminal."""
    if test.items == 0:
        return "no gold items: errors of annotators are not tested, and nobody is dropped"
    if test.critical > test.items:
        return f"{test.items} gold items are too few: no number of errors is evidence of an error rate above {test.bound:.1%}"
    lines = [
        f"{test.items} gold items: an annotator with {test.critical} errors or more is over {test.bound:.1%} (exact binomial test at "
        f"{test.significance:g}). One whose true error rate is p is found with the probability"
    ]
    lines += [f"  p = {rate:6.1%}: {power:.3f}" for rate, power in powers(test).items()]
    return "\n".join(lines)
