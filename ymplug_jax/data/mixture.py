"""Mixtures of several folders: which record comes at which position, as a function of (seed, position, history of the weights).

A position of the stream belongs to a folder by a schedule of the weights, and to a record by that folder's own permutation at the number
of times that the folder was drawn before. So no record comes twice before its folder is through, also if the weights change in
between. See docs/mixtures.md.
"""

import functools
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

from ymplug_jax.core.exits import Mistake

PERIOD = 2**18  # longest period of a schedule; shares are rounded to multiples of 1 / PERIOD if they need a longer one
CHUNK = 4096  # batches whose folders are drawn at once


class Change(NamedTuple):
    """Weights of a mixture from an example on."""

    start: int  # number of examples seen when the weights were set
    weights: tuple[int, ...]  # whole numbers in proportion to the records of each folder, see `whole_weights`
    batch: int  # size of the global batch from then on; matters only where a batch comes from one folder


class Order(Protocol):
    """Position of an example in a run -> its records, as numbers in the joined split. Thread-safe and picklable."""

    def __call__(self, example: int, /) -> tuple[int, ...]:
        """Return the records of an example."""


class Draws(Protocol):
    """Folders by position."""

    def draws(self, positions: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """int64[n] -> (folder of each position, how often it was drawn before), int64[n] each."""

    def counts(self, position: int, /) -> np.ndarray:
        """Return how often each folder is drawn before a position, int64[folders]."""


def whole_weights(weights: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the weights as whole numbers without a common divisor, of sum PERIOD at most.

    Args:
      weights: `config.data.weights`; empty: by size.
      sizes: number of records of each folder that can be drawn.

    Raises:
      Mistake: there is not one weight per folder, one is negative, all are 0, or a folder with a weight has no record to draw.
    """
    if weights and len(weights) != len(sizes):
        raise Mistake(
            f"config.data.weights: has {len(weights)} numbers, but config.data.path has {len(sizes)} folders; give one for each "
            "folder, in their order, or leave it empty"
        )
    if not all(0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
        raise Mistake(
            f"config.data.weights: {tuple(weights)!r} has no meaning; give 0 or more, and more than 0 at least once"
        )
    exact = [Fraction(str(weight)) for weight in weights or sizes]  # str: 0.1 is a tenth
    for number, (weight, size) in enumerate(zip(exact, sizes, strict=True)):
        if not size and (weight or not weights):
            raise Mistake(
                f"config.data.path: folder {number + 1} has no record with a target, so nothing can be drawn from it; leave it out, or "
                "set its weight in config.data.weights to 0"
            )
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = functools.reduce(_lcm, (share.denominator for share in shares))
    if period <= PERIOD:
        return tuple(int(share * period) for share in shares)
    return tuple(max(1, round(share * PERIOD)) if share else 0 for share in shares)


def _lcm(one: int, other: int) -> int:
    return int(np.lcm(one, other)) if one < 2**31 > other else 2**62


class Schedule:
    """Deterministic schedule: at every position, each folder was drawn as often as its share, less than one record off.

    Tijdeman, "The chairman assignment problem", 1980. It repeats after sum(weights) positions.
    """

    def __init__(self, weights: Sequence[int]):
        """Compute one period, which takes about a microsecond per position and folder.

        Args:
          weights: whole numbers, one per folder; at least one is above 0.
        """
        self._weights = np.asarray(weights, np.int64)
        self._table = _period(tuple(int(weight) for weight in weights))
        # How often the folder of each position was drawn before, within the period.
        self._rank = np.zeros(len(self._table), np.int64)
        for folder in range(len(weights)):
            here = self._table == folder
            self._rank[here] = np.arange(int(here.sum()))

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Folders by position, see `Draws`."""
        period, place = np.divmod(positions, len(self._table))
        folder = self._table[place]
        return folder, period * self._weights[folder] + self._rank[place]

    def counts(self, position: int) -> np.ndarray:
        """Counts before a position, see `Draws`."""
        period, place = divmod(position, len(self._table))
        return period * self._weights + np.bincount(self._table[:place], minlength=len(self._weights))


def _period(weights: tuple[int, ...]) -> np.ndarray:
    """Return the folder of each position of one period, int64[sum(weights)].

    Of the folders whose lag is large enough, take the one that must come soonest. All comparisons but the last are between whole
    numbers, and the last one is between correctly rounded quotients, so every machine finds the same schedule.
    """
    active = [folder for folder, weight in enumerate(weights) if weight]
    period, table = sum(weights), []
    if len(active) == 1:
        return np.full(period, active[0], np.int64)
    scale = 2 * len(active) - 2
    lag = dict.fromkeys(active, 0)  # (share * position - draws) * period
    slack = period * scale - period
    for _ in range(period):
        best, soonest = active[0], float("inf")
        for folder in active:
            lag[folder] += weights[folder]
            if lag[folder] * scale >= period:
                due = (slack - lag[folder] * scale) / weights[folder]
                if due < soonest:
                    best, soonest = folder, due
        lag[best] -= period
        table.append(best)
    return np.array(table, np.int64)


class BatchDraws:
    """Random schedule of whole batches: each batch comes from one folder, drawn with the probabilities of the weights."""

    def __init__(self, weights: Sequence[int], batch: int, seed: int, start: int):
        """Prepare the draws.

        Args:
          weights: whole numbers, one per folder; at least one is above 0.
          batch: size of the global batch.
          seed: seed of the run.
          start: example from which these weights count, so that a later change draws anew.
        """
        self._limits = np.cumsum(np.asarray(weights, np.float64)) / sum(weights)
        self._batch, self._key = batch, (seed, start)
        self._before = [np.zeros(len(weights), np.int64)]  # batches of each folder before each chunk

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Folders by position, see `Draws`."""
        batch, row = np.divmod(positions, self._batch)
        folder, number = (np.empty(len(positions), np.int64) for _ in range(2))
        for chunk in np.unique(batch // CHUNK).tolist():
            here = batch // CHUNK == chunk
            table = self._chunk(chunk)
            rank = np.zeros(CHUNK, np.int64)
            for one in range(len(self._limits)):
                rank[table == one] = np.arange(int((table == one).sum()))
            place = batch[here] % CHUNK
            folder[here] = table[place]
            number[here] = (self._counts(chunk)[table[place]] + rank[place]) * self._batch + row[here]
        return folder, number

    def counts(self, position: int) -> np.ndarray:
        """Counts before a position, the start of a batch; see `Draws`."""
        chunk, place = divmod(position // self._batch, CHUNK)
        return (
            self._counts(chunk) + np.bincount(self._chunk(chunk)[:place], minlength=len(self._limits))
        ) * self._batch

    def _counts(self, chunk: int) -> np.ndarray:
        while len(self._before) <= chunk:
            table = self._chunk(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(table, minlength=len(self._limits)))
        return self._before[chunk]

    def _chunk(self, chunk: int) -> np.ndarray:
        draw = np.random.default_rng((*self._key, chunk)).random(CHUNK)
        return np.minimum(np.searchsorted(self._limits, draw, side="right"), len(self._limits) - 1)


class Stream:
    """The records of a mixture by position. Not thread-safe; its users lock it."""

    def __init__(self, usable: Sequence[np.ndarray], seed: int):
        """Prepare the permutations.

        Args:
          usable: numbers of the records to draw from, int64[n], for each folder.
          seed: seed of the run.
        """
        self._usable = usable
        # Hash the seed and the folder first, else neighbouring seeds or folders would share permutations.
        self._keys = [int(np.random.SeedSequence((seed, one)).generate_state(1)[0]) for one in range(len(usable))]
        # (first position, schedule, draws of each folder before it)
        self._parts: list[tuple[int, Draws, np.ndarray]] = []

    def change(self, start: int, draws: Draws) -> None:
        """Use another schedule from position `start` on; changes come in ascending order."""
        before = np.zeros(len(self._usable), np.int64)
        if self._parts:
            first, last, earlier = self._parts[-1]
            before = earlier + last.counts(start - first)
            if first == start:
                self._parts.pop()
        self._parts.append((start, draws, before))

    def folders(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[n] -> (folder of each position, how often it was drawn before since the start of the run), int64[n] each."""
        folder, number = (np.empty(len(positions), np.int64) for _ in range(2))
        starts = np.array([start for start, _, _ in self._parts])
        part = np.searchsorted(starts, positions, side="right") - 1
        for one in np.unique(part).tolist():
            start, draws, before = self._parts[one]
            here = part == one
            folder[here], number[here] = draws.draws(positions[here] - start)
            number[here] += before[folder[here]]
        return folder, number

    def records(self, positions: np.ndarray) -> np.ndarray:
        """Return the records at the positions, int64[n] -> int64[n] numbers in the joined split."""
        from grain.experimental import index_shuffle

        found = np.empty(len(positions), np.int64)
        for i, (folder, number) in enumerate(zip(*(x.tolist() for x in self.folders(positions)), strict=True)):
            size = len(self._usable[folder])
            epoch, place = divmod(number, size)
            key = (self._keys[folder] + epoch) % 2**32
            found[i] = self._usable[folder][index_shuffle(place, max_index=size - 1, seed=key, rounds=4)]
        return found


class Mixed:
    """Order of a mixture without packing: one record per example. Thread-safe and picklable."""

    def __init__(self, usable: Sequence[np.ndarray], seed: int, changes: Sequence[Change], *, apart: bool):
        """Prepare the order.

        Args:
          usable: numbers of the records to draw from, int64[n], for each folder.
          seed: seed of the run.
          changes: history of the weights, in order; the first starts at example 0.
          apart: draw a folder for each batch instead of each example.
        """
        self._stream, self._lock = Stream(usable, seed), threading.Lock()
        for start, weights, batch in changes:
            self._stream.change(start, BatchDraws(weights, batch, seed, start) if apart else Schedule(weights))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def __call__(self, example: int) -> tuple[int, ...]:
        """Return the record of an example, as a number in the joined split."""
        with self._lock:
            return (int(self._stream.records(np.array([example]))[0]),)
