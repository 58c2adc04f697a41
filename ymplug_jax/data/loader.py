"""Deterministic loader: order and augmentation depend on (seed, position) only, not on hosts, processes or threads.

Position p of a run is a record in a permutation of the split, keyed by seed and epoch. Global batch b holds `batch_size`
consecutive positions from `start + b * batch_size`; each host loads the rows that its devices need. The data state of a run is
therefore one integer, the number of examples seen, and a run can resume on any number of hosts. A mixture or packing replaces the
permutation by an `Order`, a function of (seed, position, history of the weights).
"""

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ymplug_jax.data.buffers import RESULTS, Arrays
from ymplug_jax.data.mixture import Order
from ymplug_jax.data.records import CorruptRecord, Split

Example = dict[str, np.ndarray]
# (record, rng) -> example, or (records, rng) -> example where several records are packed into one
MakeExample = Callable[[Any, np.random.Generator | None], Example]


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
    order: Order | None = None,
    packed: bool = False,
) -> "Batches":
    """Iterate over this host's rows of every global batch, as dicts of arrays [len(rows), ...] with the key `valid`, bool.

    Reading starts when the first batch is requested. The loader prefetches two batches of this host's rows, and at least two
    examples per thread; worker processes together prefetch twice as much.

    Args:
      records: the split.
      example: (record, rng) -> dict of fixed-shape arrays; rng is None in evaluation.
      seed: seed of order and augmentation, at least 0.
      batch_size: size of the global batch.
      rows: rows of the global batch to load, in [0, batch_size), in output order.
      shuffle: True: training, endless, with a new permutation every epoch. False: one pass in order, with rng None; the last
        batch is padded with examples whose `valid` is False.
      start: number of examples seen before, where the first batch starts.
      num_examples: without shuffle, stop after at most this many examples. 0: all.
      threads: threads that read and decode, per worker process if there are any.
      workers: number of worker processes; 0: none. Batches do not depend on it. `example` must be picklable with cloudpickle.
      skip_corrupt: turn a corrupt record into an example with `valid` False instead of raising an error.
      order: with shuffle, the records of each position. None: permutations of the split, one record each.
      packed: call `example` with a tuple of records: those of the position with shuffle, otherwise a single one.

    Raises:
      ValueError: the split has no records, or `rows` are outside the batch.
      CorruptRecord: (on iteration) a record is corrupt and `skip_corrupt` is False; names shard, record and byte offset.
    """
    rows = np.asarray(rows, np.int64)
    if not len(records):
        raise ValueError(f"{records.path}: split {records.split!r} has no records; build the shards again")
    if rows.size == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows: {rows.tolist()} is empty or outside the batch; give rows from 0 to {batch_size - 1}")
    size = 2**62 if shuffle else min(num_examples or len(records), len(records))
    source = _Source(records, example, seed, batch_size, rows, shuffle, start, size, skip_corrupt, order, packed)
    stream = in_processes(source, len(rows), threads, workers) if workers else in_threads(source, len(rows), threads)
    return Batches(stream, start + rows, batch_size, size)


class Source(Protocol):
    """Random access to examples. Thread-safe and picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> Example: ...


def in_threads(source: Source, width: int, threads: int) -> Generator[Example]:
    """Yield batches of `width` examples, made by threads; examples beyond the last whole batch are left out.

    The thread that makes an example also copies it into its row, so that the consumer does no work and the memory of an example
    is allocated and freed by the same thread.
    """
    pool = ThreadPoolExecutor(threads, "loader")
    ahead = max(2, -(-2 * threads // width))
    numbers = iter(range(len(source) // width))
    begun: deque[tuple[_Rows, list[Future[None]]]] = deque()
    memory = Arrays(keep=64)
    try:
        while True:
            for number in islice(numbers, ahead + 1 - len(begun)):
                batch = _Rows(width, memory)
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
    """A batch filled row by row by threads. Its arrays are allocated with the shapes and dtypes of the first example."""

    def __init__(self, width: int, memory: Arrays):
        self.arrays: Example = {}
        self._width, self._memory, self._lock = width, memory, threading.Lock()

    def fill(self, row: int, source: Source, k: int) -> None:
        """Put example k into a row. Its largest array may be made in the row itself; else it is copied there last."""
        largest = max(self.arrays, key=lambda key: self.arrays[key].nbytes, default="")
        place = self.arrays[largest][row] if largest else None
        RESULTS.offer(place)
        try:
            example = {key: np.asarray(value) for key, value in source[k].items()}
        finally:
            RESULTS.offer(None)
        with self._lock:
            if not self.arrays:
                self.arrays = {
                    key: self._memory.empty((self._width, *value.shape), value.dtype) for key, value in example.items()
                }
        for key in sorted(self.arrays, key=lambda key: key == largest):
            value, array = example[key], self.arrays[key]
            if (value.shape, value.dtype) != (array.shape[1:], array.dtype):
                raise ValueError(
                    f"{key}: an example has {value.dtype}{list(value.shape)}, another one in its batch "
                    f"{array.dtype}{list(array.shape[1:])}; make all examples of a task alike in shape and dtype"
                )
            if key != largest or value is not place:
                array[row] = value


def in_processes(source: Source, width: int, threads: int, workers: int) -> Generator[Example]:
    """Yield batches of `width` examples, made by `workers` processes with `threads` threads each."""
    import grain
    from absl import flags

    # Grain's workers read absl flags. A program that does not parse them uses the defaults.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    share = -(-max(2 * width, 2 * threads) // workers)
    stream = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(threads, share))
    # Batching comes last: batches made inside the workers would depend on the number of workers.
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=share))
    iterator = iter(stream.batch(width))
    try:
        yield from iterator
    finally:
        iterator.close()


class Batches:
    """Iterator over this host's rows of the global batches. Its threads and processes stop at the end, on an error or on `close`."""

    def __init__(self, stream: Generator[Example], positions: np.ndarray, step: int, size: int):
        self.skipped = 0  # number of corrupt records in the batches returned so far
        self._batches = self._given_out(stream, positions, step, size)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Example:
        return next(self._batches)

    def close(self) -> None:
        """Stop the threads and processes. The iterator ends."""
        self._batches.close()

    def _given_out(self, stream: Generator[Example], positions: np.ndarray, step: int, size: int) -> Generator[Example]:
        with closing(stream):
            for batch in stream:
                self.skipped += int(np.sum(~batch["valid"] & (positions < size)))  # positions beyond `size` are padding
                positions = positions + step
                yield batch


class _Source:
    """Random access to this host's examples. Item k is row rows[k % len(rows)] of global batch k // len(rows)."""

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
        order: Order | None,
        packed: bool,
    ):
        self._order, self._packed = order or self._shuffled, packed
        self._records, self._example, self._seed, self._shuffle = records, example, seed, shuffle
        self._batch_size, self._rows, self._start, self._size, self._skip = batch_size, rows, start, size, skip
        # Epoch e uses key + e. Hash the seed first, else runs with neighbouring seeds would share permutations.
        self._key = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._filler: Example | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}
        if multiprocessing.parent_process() and threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # Ctrl-C reaches every process, but the main process decides when workers stop

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records.path!r}, {self._records.split!r})"

    def __len__(self) -> int:
        return -(-max(self._size - self._start, 0) // self._batch_size) * len(self._rows)

    def __getitem__(self, k: int) -> Example:
        batch, row = divmod(int(k), len(self._rows))
        position = self._start + batch * self._batch_size + int(self._rows[row])
        if position >= self._size:
            return self._invalid()
        indices: tuple[int, ...] = (position,)
        rng = None
        if self._shuffle:
            indices, rng = self._order(position), np.random.default_rng((self._seed, position))
        try:
            return self._make(indices, rng) | {"valid": np.array(True)}
        except CorruptRecord:
            if not self._skip:
                raise
            return self._invalid()

    def _shuffled(self, position: int) -> tuple[int, ...]:
        """Return the record index at a position. The permutation is computed per item and never stored."""
        from grain.experimental import index_shuffle

        epoch, place = divmod(position, len(self._records))
        key = (self._key + epoch) % 2**32
        return (int(index_shuffle(place, max_index=len(self._records) - 1, seed=key, rounds=4)),)

    def _make(self, indices: tuple[int, ...], rng: np.random.Generator | None) -> Example:
        records = tuple(self._records[index] for index in indices)
        try:
            return self._example(records if self._packed else records[0], rng)
        except Exception as error:
            for index, record in zip(indices, records, strict=True):
                error.add_note(
                    f"record {index} of {self._records.path}, split {self._records.split!r}: {record.media_id}"
                )
            raise

    def _invalid(self) -> Example:
        """Return padding: the example of the split's first readable record, with `valid` False."""
        with self._lock:
            if self._filler is None:
                RESULTS.offer(None)  # it is kept, so that it must not lie in a batch
                self._filler = self._first_readable() | {"valid": np.array(False)}
            return self._filler

    def _first_readable(self) -> Example:
        for index in range(len(self._records)):
            try:
                return self._make((index,), None)
            except CorruptRecord:
                continue
        raise CorruptRecord(
            f"{self._records.path}: every record of split {self._records.split!r} is corrupt; build or copy the shards again"
        )
