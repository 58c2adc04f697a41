"""Batches as a function of one integer. Order and augmentation depend on (seed, position) alone, never on hosts or threads.

Position p of a run is record order[p]: a permutation of the split keyed by seed and epoch. Global batch b holds the next
`batch_size` positions after `start`; a host loads the rows of it that its devices need. So the data state of a run is
the number of examples seen, and any number of hosts continues the same order.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ymplug_jax.data.records import CorruptRecord, Records

Example = dict[str, np.ndarray]
MakeExample = Callable[[Any, np.random.Generator | None], Example]


class Batches:
    """Iterator over this host's part of the global batches; `skipped` counts corrupt records met so far (in threads only)."""

    def __init__(self, stream: Iterator[Example], source: "_Source"):
        self._stream, self._source = stream, source

    @property
    def skipped(self) -> int:
        return self._source.skipped

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Example:
        return next(self._stream)

    def close(self) -> None:
        """Let go of threads and processes."""
        if close := getattr(self._stream, "close", None):
            close()


def batches(
    records: Records,
    example: MakeExample,
    *,
    seed: int,
    batch_size: int,
    rows: Sequence[int] | np.ndarray,
    shuffle: bool,
    start: int = 0,
    num_examples: int = 0,
    threads: int = 8,
    workers: int = 0,
    skip_corrupt: bool = False,
) -> Batches:
    """This host's rows of every global batch, each a dict of arrays [len(rows), ...] with `valid: bool`.

    Args:
      records: the split.
      example: (record, rng) -> dict of fixed-shape arrays; rng is None in evaluation.
      seed: of the order and of all augmentation.
      batch_size: of the global batch.
      rows: which rows of the global batch to load, in [0, batch_size), in the order they come out.
      shuffle: True: training, endless, permuted anew every epoch. False: one pass in order without rng; the last batch
        is padded with `valid` False.
      start: examples seen before; the first batch starts there.
      num_examples: without shuffle, stop after this many; 0: all.
      threads: that read and decode; about 4 x threads examples are held ready.
      workers: processes that do it instead; batches are the same for any number.
      skip_corrupt: a corrupt record becomes an example with `valid` False instead of an error.

    Raises:
      CorruptRecord: (on iteration) naming shard, record and offset, unless `skip_corrupt`.
    """
    rows = np.asarray(rows, np.int64)
    source = _Source(
        records, example, seed, batch_size, rows, shuffle, start, num_examples or len(records), skip_corrupt
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * max(threads, 1))
    stream = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        # Before batching: a batch cut inside a worker would depend on their number.
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4 * threads)
        )
    return Batches(iter(stream.batch(len(rows))), source)


class _Source:
    """Random access to this host's examples: item k is row rows[k % len(rows)] of global batch k // len(rows)."""

    def __init__(
        self,
        records: Records,
        example: MakeExample,
        seed: int,
        batch_size: int,
        rows: np.ndarray,
        shuffle: bool,
        start: int,
        size: int,
        skip: bool,
    ):
        self._records, self._example, self._seed = records, example, seed
        self._batch_size, self._rows, self._shuffle, self._start, self._size, self._skip = (
            batch_size,
            rows,
            shuffle,
            start,
            size,
            skip,
        )
        self._order = grain.MapDataset.range(len(records)).shuffle(seed=seed).repeat() if shuffle else None
        self._lock = threading.Lock()
        self.skipped = 0

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records.path!r}, {self._records.split!r})"

    def __len__(self) -> int:
        if self._shuffle:
            return 2**62 // self._batch_size * len(self._rows)
        return -(-(self._size - self._start) // self._batch_size) * len(self._rows)

    def __getitem__(self, k: int) -> Example:
        batch, row = divmod(int(k), len(self._rows))
        position = self._start + batch * self._batch_size + int(self._rows[row])
        if self._shuffle:
            return self._at(int(self._order[position]), np.random.default_rng((self._seed, position)))
        if position >= self._size:
            return self._invalid()
        return self._at(position, None)

    def _at(self, index: int, rng: np.random.Generator | None) -> Example:
        try:
            return self._example(self._records[index], rng) | {"valid": np.bool_(True)}
        except CorruptRecord:
            if not self._skip:
                raise
            with self._lock:
                self.skipped += 1
            return self._invalid()

    def _invalid(self) -> Example:
        """An example of the right shapes that counts for nothing: the split's first readable record, marked invalid."""
        for index in range(len(self._records)):
            try:
                return self._example(self._records[index], None) | {"valid": np.bool_(False)}
            except CorruptRecord:
                continue
        raise CorruptRecord(f"{self._records.path}: every record of split {self._records.split!r} is corrupt")
