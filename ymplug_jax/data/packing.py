"""Packing of several records into one example, so that short records leave little padding.

Windows of WINDOW consecutive records of a mixture's stream are packed by best-fit decreasing. The examples of a window come in a seeded
order, so that full and half-empty ones are spread over the window. Example k of a run is found by the number of examples in each
window before it; only the sizes of the records are needed for this, no record is read. See docs/mixtures.md, "Packing".
"""

import bisect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ymplug_jax.data.mixture import Change, Schedule, Stream

WINDOW = 1024  # consecutive records of the stream that are packed together
KEPT = 4  # windows whose examples stay in memory


class Size(NamedTuple):
    """Size of a record, or capacity of an example."""

    tokens: int  # tokens of the text, media slots included; 0: the record has no target
    images: int  # still images
    videos: int  # clips


def pack(sizes: np.ndarray, room: Size) -> list[list[int]]:
    """Pack records by best-fit decreasing.

    The records are taken in the order of the largest share of the capacity that they need, ties by tokens and then by position. Each
    goes into the example with the fewest tokens left that can hold it, ties into the older example.

    Args:
      sizes: int[n, 3], tokens, images and videos of each record; none exceeds `room`.
      room: capacity of an example.

    Returns:
      The records of each example, ascending. Every record is in exactly one example.
    """
    need = np.asarray(sizes, np.int64).reshape(-1, 3)
    share = (need / np.maximum(np.asarray(room, np.int64), 1)).max(axis=1)
    order = np.lexsort((np.arange(len(need)), -need[:, 0], -share))
    least = int(need[:, 0].min(initial=room.tokens))  # an example with fewer tokens left is full
    examples: list[list[int]] = []
    # (images left, videos left) -> sorted (tokens left, number of the example). There are few such pairs, and each search is a
    # bisection, so a window takes milliseconds however many examples are open.
    free: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, (tokens, images, videos) in zip(order.tolist(), need[order].tolist(), strict=True):
        best: tuple[int, int] | None = None
        place, at = (room.images, room.videos), 0
        for left, bins in free.items():
            if left[0] >= images and left[1] >= videos:
                found = bisect.bisect_left(bins, (tokens, -1))
                if found < len(bins) and (best is None or bins[found] < best):
                    best, place, at = bins[found], left, found
        if best is None:
            best = (room.tokens, len(examples))
            examples.append([])
        else:
            del free[place][at]
            if not free[place]:
                del free[place]
        examples[best[1]].append(number)
        if best[0] - tokens >= least:
            rest = (place[0] - images, place[1] - videos)
            bisect.insort(free.setdefault(rest, []), (best[0] - tokens, best[1]))
    return [sorted(example) for example in examples]


class Packed:
    """Order of a packed run: example -> its records. Thread-safe and picklable.

    New weights take effect with the first window that has not begun when they are set, so that no packed record is lost.
    """

    def __init__(
        self,
        usable: Sequence[np.ndarray],
        sizes: np.ndarray,
        room: Size,
        seed: int,
        changes: Sequence[Change],
        window: int = WINDOW,
    ):
        """Prepare the order.

        Args:
          usable: numbers of the records to draw from, int64[n], for each folder.
          sizes: int32[records, 3], tokens, images and videos of every record.
          room: capacity of an example.
          seed: seed of the run.
          changes: history of the weights, in order; the first starts at example 0.
          window: number of records that are packed together.
        """
        self._stream = Stream(usable, seed)
        self._sizes, self._room, self._seed, self._window = sizes, room, seed, window
        self._ends: list[int] = []  # number of examples up to and including each window
        self._kept: dict[int, list[tuple[int, ...]]] = {}
        self._lock = threading.Lock()
        for change in changes:
            first = self._window_of(change.start, inside=False) if change.start else 0
            self._stream.change(first * window, Schedule(change.weights))
            del self._ends[first:]
            self._kept = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def __call__(self, example: int) -> tuple[int, ...]:
        """Return the records of an example, as numbers in the joined split, in the order of the stream."""
        with self._lock:
            window = self._window_of(example)
            return self._examples(window)[example - (self._ends[window - 1] if window else 0)]

    def examples_in(self, records: int) -> int:
        """Return how many examples the first `records` records of the stream make."""
        windows, rest = divmod(records, self._window)
        while len(self._ends) < windows:
            self._extend()
        whole = self._ends[windows - 1] if windows else 0
        return whole + (len(pack(self._sizes[self._records(windows)[:rest]], self._room)) if rest else 0)

    def _window_of(self, example: int, *, inside: bool = True) -> int:
        """Return the window that holds an example; with `inside` False, the first window of which no example comes before it."""
        while not self._ends or self._ends[-1] <= example:
            self._extend()
        window = bisect.bisect_right(self._ends, example)
        begins = example == (self._ends[window - 1] if window else 0)
        return window if inside or begins else window + 1

    def _extend(self) -> None:
        count = len(self._examples(len(self._ends)))
        self._ends.append(count + (self._ends[-1] if self._ends else 0))

    def _records(self, window: int) -> np.ndarray:
        return self._stream.records(np.arange(window * self._window, (window + 1) * self._window))

    def _examples(self, window: int) -> list[tuple[int, ...]]:
        """Return the examples of a window in their seeded order."""
        if window not in self._kept:
            records = self._records(window)
            packed = pack(self._sizes[records], self._room)
            order = np.random.default_rng((self._seed, window)).permutation(len(packed))
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[window] = [tuple(records[packed[i]].tolist()) for i in order]
        return self._kept[window]
