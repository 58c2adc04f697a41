"""Measure every record of a split once: how much of an example it fills, and whether it has a target at all."""

import logging
from collections.abc import Callable
from contextlib import closing

import numpy as np

from ymplug_jax.core import progress
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.loader import Example, in_processes, in_threads
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import CorruptRecord, Record, Split

CHUNK = 64  # records measured per task of a thread
UNREADABLE = -1  # tokens of a corrupt record


def measure(
    records: Split,
    size: Callable[[Record], Size],
    *,
    threads: int = 8,
    workers: int = 0,
    skip_corrupt: bool = False,
    hidden: bool = True,
    count: int = 0,
) -> np.ndarray:
    """Measure every record.

    Args:
      records: the split.
      size: record -> its size; 0 tokens: the record has no target. With `workers` it must be picklable with cloudpickle.
      threads: threads that read and measure, per worker process if there are any.
      workers: number of worker processes; 0: none. The result does not depend on it.
      skip_corrupt: give corrupt records UNREADABLE tokens instead of raising an error.
      hidden: show no progress.
      count: measure at most this many records, from the start of the split. 0: all.

    Returns:
      int32[records, 3]: tokens, images and videos of each record.

    Raises:
      CorruptRecord: a record is corrupt and `skip_corrupt` is False.
    """
    count = min(count, len(records)) if count else len(records)
    source = _Chunks(records, size, skip_corrupt, count)
    stream = in_processes(source, 1, threads, workers) if workers else in_threads(source, 1, threads)
    title, unit = "measure records", f"{CHUNK} records"
    with closing(stream):
        shown = progress.bar(stream, total=len(source), desc=title, unit=unit, hidden=hidden)
        parts = [chunk["sizes"][0] for chunk in shown]
    return np.concatenate(parts)[:count]


def check_room(sizes: np.ndarray, room: Size, records: Split) -> None:
    """Check that every record fits into an example alone.

    Raises:
      Mistake: one does not; the message names the first and how many there are.
    """
    wrong = np.flatnonzero((sizes > np.asarray(room)).any(axis=1))
    if not len(wrong):
        return
    most = Size(*sizes[wrong].max(axis=0).tolist())
    raise Mistake(
        f"{records[int(wrong[0])].media_id}: one of {len(wrong)} records that are larger than an example (up to {most.tokens} tokens, "
        f"{most.images} images and {most.videos} videos; an example has room for {room.tokens}, {room.images} and {room.videos}); raise "
        "config.data.max_tokens or the rows for images and videos in config.options, or build the shards without them"
    )


class _Chunks:
    """Sizes of CHUNK consecutive records each; the last chunk is padded with zeros."""

    def __init__(self, records: Split, size: Callable[[Record], Size], skip: bool, count: int):
        self._records, self._size, self._skip, self._count = records, size, skip, count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records.path!r}, {self._records.split!r})"

    def __len__(self) -> int:
        return -(-self._count // CHUNK)

    def __getitem__(self, k: int) -> Example:
        sizes = np.zeros((CHUNK, 3), np.int32)
        for row, i in enumerate(range(k * CHUNK, min((k + 1) * CHUNK, self._count))):
            sizes[row] = self._one(i)
        return {"sizes": sizes}

    def _one(self, i: int) -> tuple[int, ...]:
        try:
            record = self._records[i]
        except CorruptRecord as error:
            if not self._skip:
                raise
            logging.warning("%s", error)
            return (UNREADABLE, 0, 0)
        try:
            return tuple(self._size(record))
        except Exception as error:
            error.add_note(f"record {i} of {self._records.path}, split {self._records.split!r}: {record.media_id}")
            raise
