"""Beam steps of a curation: one scores the rows of a partition, the others find near-duplicates among all of them.

The search moves arrays, not rows: a worker reads the keys of one partition and divides them by value into shards; `GroupByKey` brings the
arrays of a shard together, where equal keys meet and give pairs of rows, and divides these by their first row; a second `GroupByKey`
brings them together, and their frames are compared. A shard is one partition of the second work folder, with the files of `part_files`.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from etils import epath

from data_prep import row_table
from data_prep.curation import prints
from data_prep.curation.candidates import bucket_pairs, distinct
from data_prep.curation.score_rows import FILES, RowScorer, Scoring, print_from, read_scores, to_bytes
from data_prep.part_files import GROUP, finished, part_name
from data_prep.partition import BEAT, Desk, Job, MergeGroup, one_line
from data_prep.raw_rows import RawRow
from ymplug_jax.core import places

PAIRS = pa.schema([("one", pa.int64()), ("other", pa.int64()), ("alike", pa.float64())])
HELD = 4  # partitions whose prints a worker holds
MOST_SAME = 1000  # prints of copies whose comparison is remembered
MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads keys over shards

Arrays = tuple[bytes, ...]


class Grouping(NamedTuple):
    """Settings of the job that finds near-duplicates."""

    scores: str  # work folder of the scores
    partitions: int  # of the scores
    size: int  # rows of each of them but the last
    shards: int  # of keys, and of pairs
    max_distance: float
    min_alike: float
    kind: str = row_table.RAW


class Scores:
    """Writes the scores of the rows of partitions, `part-N.parquet`. The settings of the job are `Scoring`."""

    def __init__(self, desk: Desk):
        """Create the decoders of this process."""
        settings = desk.job.settings
        assert isinstance(settings, Scoring)
        self._desk, self._scorer = desk, RowScorer(settings, desk.job.video_root)

    def close(self) -> None:
        """Stop the decoders."""
        self._scorer.close()

    def build(self, number: int, rows: Sequence[RawRow]) -> None:
        """Write the files of a partition. Raises OSError, DecoderFailed."""
        table = self._scorer.table(rows, lambda done: self._desk.note(number, done))
        self._desk.check_token()
        places.write_bytes(self._desk.work / part_name(number, FILES), to_bytes(table))
        kept = sum(reason == "" for reason in table.column("reason").to_pylist())
        self._desk.finish(number, facts(len(rows), kept))


def facts(rows: int, written: int) -> str:
    """Return the content of `part-N.json`."""
    return json.dumps({"rows": rows, "written": written, "bytes": 0, "cut": 0, "rejects": {}})


class ListScores(beam.DoFn):
    """Yields the number of each partition of the scores."""

    def __init__(self, grouping: Grouping):
        self._grouping = grouping

    def process(self, _: None) -> Iterator[int]:
        """List them."""
        yield from range(self._grouping.partitions)


class SpreadKeys(beam.DoFn):
    """Yields (shard of keys, (keys, rows, orders)) of the clips of a partition that the single-row stages keep."""

    def __init__(self, job: Job, grouping: Grouping):
        self._job, self._grouping = job, grouping

    def process(self, number: int) -> Iterator[tuple[int, Arrays]]:
        """Read one partition. Raises PartitionFailed."""
        with one_line(self._job.work):
            columns = ["number", "keys", "order"]
            table = read_scores(epath.Path(self._grouping.scores), number, columns).combine_chunks()
        table = table.filter(table.column("keys").is_valid())
        if not len(table):
            return
        lists = table.column("keys").combine_chunks()
        counts = lists.value_lengths().to_numpy(zero_copy_only=False)
        keys = lists.flatten().to_numpy().astype(np.uint64)
        rows, order = (np.repeat(table.column(name).to_numpy(), counts) for name in ("number", "order"))
        shards = ((keys * MIX) >> np.uint64(40)) % np.uint64(self._grouping.shards)
        for shard in np.unique(shards):
            mine = shards == shard
            yield (
                int(shard),
                tuple(array[mine].tobytes() for array in (keys, rows.astype(np.int64), order.astype(np.uint64))),
            )


class PairKeys(beam.DoFn):
    """Yields (shard of pairs, pairs) for a shard of keys."""

    def __init__(self, grouping: Grouping):
        self._grouping = grouping

    def process(self, element: tuple[int, Iterable[Arrays]]) -> Iterator[tuple[int, bytes]]:
        """Pair the rows of equal keys."""
        parts = list(element[1])
        keys, rows, order = (
            np.concatenate([np.frombuffer(part[i], kind) for part in parts])
            for i, kind in enumerate((np.uint64, np.int64, np.uint64))
        )
        pairs = bucket_pairs(keys, rows, order)
        shards = pairs[:, 0] // self._grouping.size * self._grouping.shards // self._grouping.partitions
        for shard in np.unique(shards):
            yield int(shard), pairs[shards == shard].tobytes()


class ComparePairs(beam.DoFn):
    """Compares the frames of the pairs of a shard, writes those that are alike to `part-N.parquet`, and yields (group, number)."""

    def __init__(self, job: Job, grouping: Grouping):
        self._job, self._grouping = job, grouping

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, int]]:
        """Compare the pairs of one shard. Raises PartitionFailed."""
        shard, work = element[0], epath.Path(self._job.work)
        pairs = distinct(np.concatenate([np.frombuffer(part, np.int64).reshape(-1, 2) for part in element[1]]))
        with one_line(self._job.work):
            if shard not in finished(work)[0]:
                beat = work / part_name(shard, ".progress")
                found = self._alike(pairs, beat)
                places.write_bytes(work / part_name(shard, FILES), to_bytes(pa.Table.from_pylist(found, PAIRS)))
                places.write_text(work / part_name(shard, ".json"), facts(len(pairs), len(found)))
                places.delete(beat)
        yield shard // GROUP, shard

    def _alike(self, pairs: np.ndarray, beat: epath.Path) -> list[dict[str, float]]:
        """Return the pairs that are alike, those left out that earlier ones connect already: a bucket of copies costs one comparison a clip."""
        held = _Held(self._grouping)
        above: dict[int, int] = {}  # row -> another row of its group, up to the first

        def first(row: int) -> int:
            while (up := above.get(row, row)) != row:
                above[row] = above.get(up, up)
                row = up
            return row

        at = pairs // self._grouping.size
        found, told, beats = [], time.monotonic(), 0
        for done, i in enumerate(np.lexsort((pairs[:, 1], pairs[:, 0], at[:, 1], at[:, 0]))):
            if time.monotonic() - told > BEAT:
                told = time.monotonic()
                beats += 1
                places.write_text(beat, str(done) + " " * (beats % 7))
            one, other = int(pairs[i, 0]), int(pairs[i, 1])
            ends = first(one), first(other)
            if ends[0] == ends[1]:
                continue
            share = held.share(one, other, self._grouping.max_distance)
            if share >= self._grouping.min_alike:
                above[max(ends)] = min(ends)
                found.append({"one": one, "other": other, "alike": round(share, 6)})
        return sorted(found, key=lambda pair: (pair["one"], pair["other"]))


class _Held:
    """The prints of the partitions that were needed last."""

    def __init__(self, grouping: Grouping):
        self._grouping = grouping
        self._held: OrderedDict[int, dict[int, prints.Print | None]] = OrderedDict()
        self._same: dict[
            bytes, float
        ] = {}  # content of a print -> how much it is like itself: copies need no comparison

    def share(self, one: int, other: int, max_distance: float) -> float:
        """Return how much two rows are alike, 0 to 1; 0 without prints. Raises OSError."""
        a, b = self.print_of(one), self.print_of(other)
        if a is None or b is None:
            return 0.0
        key = _content(a)
        if key != _content(b):
            return prints.alike(a, b, max_distance)
        if key not in self._same:
            if len(self._same) >= MOST_SAME:
                self._same.clear()
            self._same[key] = prints.alike(a, a, max_distance)
        return self._same[key]

    def print_of(self, row: int) -> prints.Print | None:
        number = row // self._grouping.size
        if number not in self._held:
            columns = ["number", "seconds", "signs", "strong", "weight"]
            table = read_scores(epath.Path(self._grouping.scores), number, columns)
            table = table.filter(table.column("weight").is_valid())
            self._held[number] = {found["number"]: print_from(found) for found in table.to_pylist()}
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number].get(row)


def _content(one: prints.Print) -> bytes:
    return one.signs.tobytes() + one.strong.tobytes() + one.weight.tobytes()


def add_grouping(pipeline: beam.Pipeline, job: Job) -> None:
    """Add the steps of the search for near-duplicates to a pipeline."""
    grouping = job.settings
    assert isinstance(grouping, Grouping)
    paired = (
        pipeline
        | "begin" >> beam.Create([None])
        | "list scores" >> beam.ParDo(ListScores(grouping))
        | "spread" >> beam.Reshuffle()
        | "keys" >> beam.ParDo(SpreadKeys(job, grouping))
        | "equal keys" >> beam.GroupByKey()
        | "pair" >> beam.ParDo(PairKeys(grouping))
    )
    every = pipeline | "every shard" >> beam.Create([(shard, b"") for shard in range(grouping.shards)])
    _ = (
        (paired, every)
        | "with empty shards" >> beam.Flatten()
        | "pairs of a shard" >> beam.GroupByKey()
        | "compare" >> beam.ParDo(ComparePairs(job, grouping))
        | "group" >> beam.GroupByKey()
        | "merge" >> beam.ParDo(MergeGroup(job))
    )
