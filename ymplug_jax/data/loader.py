"""Batches as a function of one integer. Order and augmentation depend on (seed, position) alone, never on hosts or threads.

Position p of a run is record order[p]: a permutation of the split keyed by seed and epoch. Global batch b holds the next
`batch_size` positions after `start`; a host loads the rows of it that its devices need. So the data state of a run is
the number of examples seen, and any number of hosts continues the same order.
"""

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from ymplug_jax.data.records import CorruptRecord, Record, Split

Example = dict[str, np.ndarray]
MakeExample = Callable[[Record, np.random.Generator | None], Example]


def batches(
    records: Split,
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
) -> "Batches":
    """This host's rows of every global batch, each a dict of arrays [len(rows), ...] with `valid: bool`.

    Reading starts with the first batch. Two batches ahead are held ready (of this host's rows; at least two examples for
    each thread), twice that with worker processes, which share it.

    Args:
      records: the split.
      example: (record, rng) -> dict of fixed-shape arrays; rng is None in evaluation.
      seed: of the order and of all augmentation, not negative.
      batch_size: of the global batch.
      rows: which rows of the global batch to load, in [0, batch_size), in the order they come out.
      shuffle: True: training, endless, permuted anew every epoch. False: one pass in order without rng; the last batch
        is padded with `valid` False.
      start: examples seen before; the first batch starts there.
      num_examples: without shuffle, stop after this many, if there are more; 0: all.
      threads: that read and decode, in each worker process if there are any.
      workers: processes to spread this over (absl flags must be parsed, `example` go through cloudpickle); the batches
        are the same for any number.
      skip_corrupt: a corrupt record becomes an example with `valid` False instead of an error.

    Raises:
      ValueError: a split without records, or rows outside the batch.
      CorruptRecord: (on iteration) naming shard, record and offset, unless `skip_corrupt`.
    """
    rows = np.asarray(rows, np.int64)
    if not len(records):
        raise ValueError(f"{records.path}: split {records.split!r} has no records")
    if rows.size == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows must be a few of 0..{batch_size - 1}, not {rows.tolist()}")
    size = 2**62 if shuffle else min(num_examples or len(records), len(records))
    source = _Source(records, example, seed, batch_size, rows, shuffle, start, size, skip_corrupt)
    stream = _in_processes(source, len(rows), threads, workers) if workers else _in_threads(source, len(rows), threads)
    return Batches(stream, start + rows, batch_size, size)


def _in_threads(source: "_Source", width: int, threads: int) -> Generator[Example]:
    """Batches of `width` items. The thread that makes an item copies it into its row, so that nothing is left to do for
    the one that takes the batch, and the memory of items stays with the thread."""
    pool = ThreadPoolExecutor(threads, "loader")
    ahead = max(2, -(-2 * threads // width))
    numbers = iter(range(len(source) // width))
    begun: deque[tuple[_Rows, list[Future[None]]]] = deque()
    try:
        while True:
            for number in islice(numbers, ahead + 1 - len(begun)):
                batch = _Rows(width)
                begun.append(
                    (batch, [pool.submit(batch.fill, row, source, number * width + row) for row in range(width)])
                )
            if not begun:
                return
            batch, fills = begun.popleft()
            for fill in fills:
                fill.result()
            yield batch.arrays
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Rows:
    """A batch that threads fill row by row; its first item says what the arrays are."""

    def __init__(self, width: int):
        self.arrays: Example = {}
        self._width, self._lock = width, threading.Lock()

    def fill(self, row: int, source: "_Source", k: int) -> None:
        example = {key: np.asarray(value) for key, value in source[k].items()}
        with self._lock:
            if not self.arrays:
                self.arrays = {
                    key: np.empty((self._width, *value.shape), value.dtype) for key, value in example.items()
                }
        for key, array in self.arrays.items():
            value = example[key]
            if (value.shape, value.dtype) != (array.shape[1:], array.dtype):
                raise ValueError(
                    f"{key}: an example has {value.dtype}{list(value.shape)}, another of its batch "
                    f"{array.dtype}{list(array.shape[1:])}; all examples of a task must be alike"
                )
            array[row] = value


def _in_processes(source: "_Source", width: int, threads: int, workers: int) -> Generator[Example]:
    """The same from worker processes, each with so many threads."""
    import grain
    from absl import flags

    if (
        not flags.FLAGS.is_parsed()
    ):  # Grain's workers ask for flags of its own; a program without absl's parser leaves the defaults
        flags.FLAGS.mark_as_parsed()
    share = -(-max(2 * width, 2 * threads) // workers)
    stream = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(threads, share))
    # Before batching: a batch cut inside a worker would depend on their number.
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=share))
    iterator = iter(stream.batch(width))
    try:
        yield from iterator
    finally:
        iterator.close()


class Batches:
    """Iterator over this host's part of the global batches. Threads and processes end with it: at its end, at an error or
    at `close`."""

    def __init__(self, stream: Generator[Example], positions: np.ndarray, step: int, size: int):
        self.skipped = 0  # corrupt records in the batches given out so far
        self._batches = self._given_out(stream, positions, step, size)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Example:
        return next(self._batches)

    def close(self) -> None:
        """Let go of threads and processes; there are no more batches after it."""
        self._batches.close()

    def _given_out(self, stream: Generator[Example], positions: np.ndarray, step: int, size: int) -> Generator[Example]:
        with closing(stream):
            for batch in stream:
                self.skipped += int(np.sum(~batch["valid"] & (positions < size)))  # beyond it is padding
                positions = positions + step
                yield batch


class _Source:
    """Random access to this host's examples: item k is row rows[k % len(rows)] of global batch k // len(rows)."""

    def __init__(
        self,
        records: Split,
        example: MakeExample,
        seed: int,
        batch_size: int,
        rows: np.ndarray,
        shuffle: bool,
        start: int,
        size: int,
        skip: bool,
    ):
        self._records, self._example, self._seed, self._shuffle = records, example, seed, shuffle
        self._batch_size, self._rows, self._start, self._size, self._skip = batch_size, rows, start, size, skip
        # Epoch e has the seed + e, so that neighbouring seeds of a run would share orders: spread them first.
        self._key = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._filler: Example | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}
        if multiprocessing.parent_process() and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the run decides when these end

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records.path!r}, {self._records.split!r})"

    def __len__(self) -> int:
        return -(-max(self._size - self._start, 0) // self._batch_size) * len(self._rows)

    def __getitem__(self, k: int) -> Example:
        batch, row = divmod(int(k), len(self._rows))
        position = self._start + batch * self._batch_size + int(self._rows[row])
        if position >= self._size:
            return self._invalid()
        index, rng = position, None
        if self._shuffle:
            index, rng = self._shuffled(position), np.random.default_rng((self._seed, position))
        try:
            return self._make(index, rng) | {"valid": np.array(True)}
        except CorruptRecord:
            if not self._skip:
                raise
            return self._invalid()

    def _shuffled(self, position: int) -> int:
        """The record at a position: any item of a permutation is computed on the spot."""
        from grain.experimental import index_shuffle

        epoch, place = divmod(position, len(self._records))
        return index_shuffle(place, max_index=len(self._records) - 1, seed=(self._key + epoch) % 2**32, rounds=4)

    def _make(self, index: int, rng: np.random.Generator | None) -> Example:
        record = self._records[index]
        try:
            return self._example(record, rng)
        except Exception as error:
            error.add_note(f"record {index} of {self._records.path}, split {self._records.split!r}: {record.media_id}")
            raise

    def _invalid(self) -> Example:
        """An example of the right shapes that counts for nothing: the split's first readable record, marked invalid."""
        with self._lock:
            if self._filler is None:
                self._filler = self._first_readable() | {"valid": np.array(False)}
            return self._filler

    def _first_readable(self) -> Example:
        for index in range(len(self._records)):
            try:
                return self._make(index, None)
            except CorruptRecord:
                continue
        raise CorruptRecord(f"{self._records.path}: every record of split {self._records.split!r} is corrupt")
