"""Beam steps of a build: one writes, checks and indexes the shard of a partition, one merges the facts of a group of partitions.

The TFDS writer is not used, because it cannot resume after a kill and shuffles all records through Beam, which is unnecessary: the loader
permutes globally. Instead, one Beam element is one partition of the rows and becomes one shard, with the files of `part_files`.
A partition that is built again, because a worker died or a cluster started it twice, gets the same bytes.
"""

import contextlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import apache_beam as beam
from etils import epath

from data_prep import row_table
from data_prep.builder import Media, Settings, is_cut, serialize, serialize_talk
from data_prep.conversations import Talk
from data_prep.index_shards import BrokenShard, frame, index_bytes, index_of
from data_prep.part_files import GROUP, TOKEN, finished, group_name, part_name
from data_prep.rows import Row
from data_prep.scratch import Scratch
from ymplug_jax.core import places
from ymplug_jax.data import schema
from ymplug_jax.data.text import load_tokenizer
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import DecoderFailed

BEAT = 30.0  # seconds between notes about progress in a bucket; on a disk they are frequent
ENCODE = json.JSONEncoder(ensure_ascii=False).encode


class StepSettings(Protocol):
    """What the workers of one kind of job need besides: those of `builder`, or of a step of a curation."""

    @property
    def kind(self) -> str:
        """One of schema.KINDS or row_table.RAW."""
        ...


class Job(NamedTuple):
    """What the workers need to know. Travels in the pipeline, so it does not grow with the rows."""

    work: str  # folder of the partitions: absolute, or in a bucket
    video_root: str
    split: str
    rows: int  # of the whole table
    size: int  # rows of all partitions but the last
    settings: StepSettings
    token: str  # of this attempt; workers of an earlier one stop
    step: str = "all"  # "build" partitions, "merge" the facts of groups, or "all" of it
    share: int = (
        0  # jobs side by side: this one builds the partitions, or merges the groups, i with i % shares == share
    )
    shares: int = 1


class PartitionFailed(RuntimeError):
    """The machine failed, not a row: the disk is full, a folder is missing, a bucket does not answer or no decoder starts.

    The message is one line. Beam passes errors between processes as text, where `FAILED` finds the message.
    """


FAILED = re.compile(r"PartitionFailed: ([^\n]*?)(?: \[while running|\n|$)")


@contextlib.contextmanager
def one_line(work: str) -> Iterator[None]:
    """Turn a failure of the machine into PartitionFailed."""
    try:
        yield
    except (OSError, DecoderFailed, BrokenShard) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename or work}: {error.strerror}"
        message = " ".join(message.split()).removesuffix(", then run the same command again")  # the driver adds it
        raise PartitionFailed(message) from None


class ListPartitions(beam.DoFn):
    """Yields (number, first byte, last byte + 1, whether it is complete) of the job's share of the partitions in groups not yet merged."""

    def __init__(self, job: Job):
        self._job = job

    def process(self, _: None) -> Iterator[tuple[int, int, int, bool]]:
        """List the work folder once. Raises PartitionFailed."""
        work = epath.Path(self._job.work)
        with one_line(self._job.work):
            offsets = row_table.read_offsets(work)
            parts, groups, _files = finished(work)
        numbers = range(len(offsets) - 1)
        open_groups = {number // GROUP for number in numbers if number not in parts} | (
            {number // GROUP for number in numbers} - groups
        )
        for number in numbers:
            unit = number // GROUP if self._job.step == "merge" else number
            done = self._job.step == "build" and number in parts
            if number // GROUP in open_groups and unit % self._job.shares == self._job.share and not done:
                yield number, int(offsets[number]), int(offsets[number + 1]), number in parts


class Desk:
    """What a worker has for its partitions: the work folder, a local folder for files on the way to a bucket, notes about progress."""

    def __init__(self, job: Job):
        self.job, self.work = job, epath.Path(job.work)
        self.scratch = Scratch() if places.is_remote(self.work) else None
        self._told, self._beats = 0.0, 0

    @property
    def folder(self) -> Path:
        """Local folder for unfinished files."""
        return Path(self.job.work) if self.scratch is None else self.scratch.path

    def check_token(self) -> None:
        """Raise OSError if another attempt has begun: the driver was killed and started again while this worker went on."""
        if self.job.token not in places.read_bytes(self.work / TOKEN).decode().split():
            raise OSError(f"{self.job.work}: another run of the same build has begun; wait for that one")

    def begin(self) -> None:
        """Begin a partition: nothing of it was noted yet."""
        self._told, self._beats = time.monotonic(), 0

    def note(self, number: int, done: int) -> None:
        """Write for the driver how many rows of the partition are done, now and then. Raises OSError."""
        if time.monotonic() - self._told <= (0.5 if self.scratch is None else BEAT):
            return
        self._beats += 1
        text = str(done) + " " * (self._beats % 7)  # another size each time, which a listing shows
        file = self.work / part_name(number, ".progress")
        if self.scratch is None:
            Path(file).write_text(text)
        else:
            places.write_text(file, text)
        self._told = time.monotonic()

    def finish(self, number: int, facts: str) -> None:
        """Write `part-N.json`, which makes the partition complete, and delete the note. Raises OSError."""
        places.write_text(self.work / part_name(number, ".json"), facts)
        if self.scratch is None or self._beats:
            places.delete(self.work / part_name(number, ".progress"))

    def close(self) -> None:
        """Delete temporary files."""
        if self.scratch is not None:
            self.scratch.close()


class Worker(Protocol):
    """Does the work of partitions, one after the other, in one process."""

    def build(self, number: int, rows: Sequence[Any]) -> None:
        """Write the files of a partition and finish it, see `Desk.finish`. Raises OSError, BrokenShard, DecoderFailed."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...


class BuildPartition(beam.DoFn):
    """Lets a worker build a partition, unless it is complete, and yields (group, number)."""

    def __init__(self, job: Job, make: Callable[[Desk], Worker]):
        """`make` makes the worker of a process; it travels in the pipeline."""
        self._job, self._make = job, make

    def setup(self) -> None:
        """Make the worker of this process. Raises PartitionFailed."""
        with one_line(self._job.work):
            self._desk = Desk(self._job)
            self._worker = self._make(self._desk)

    def teardown(self) -> None:
        """Stop the worker and delete temporary files."""
        self._worker.close()
        self._desk.close()

    def process(self, element: tuple[int, int, int, bool]) -> Iterator[tuple[int, int]]:
        """Build one partition.

        Raises:
          PartitionFailed: a disk, a bucket or the decoder failed.
        """
        number, start, end, done = element
        if not done:
            with one_line(self._job.work):
                self._desk.check_token()
                self._desk.begin()
                count = min(self._job.size, self._job.rows - number * self._job.size)
                rows = row_table.read_slice(self._desk.work, self._job.settings.kind, start, end, count)
                self._worker.build(number, rows)
        yield number // GROUP, number


class Shards:
    """Builds the partitions of a data set, see the head of this module. The settings of the job are those of `builder`."""

    def __init__(self, desk: Desk):
        """Create the decoder of this process and load the tokenizer."""
        settings = desk.job.settings
        assert isinstance(settings, Settings)
        self._desk, self._settings = desk, settings
        self._media = Media(settings, desk.job.video_root)
        self._tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None

    def close(self) -> None:
        """Stop the decoder process."""
        self._media.close()

    def build(self, number: int, rows: Sequence[Row | Talk]) -> None:
        """Write the files of a partition. Raises OSError, BrokenShard, DecoderFailed."""
        desk = self._desk
        partial = desk.folder / part_name(number, f".partial-{secrets.token_hex(4)}")
        try:
            sizes, rejects, cut = self._write(number, partial, rows)
            facts = {"rows": len(rows), "written": len(sizes), "bytes": 0, "cut": cut}
            if sizes:
                facts["bytes"] = partial.stat().st_size
                index = index_of(partial)
                if index[:, 1].tolist() != sizes:
                    raise BrokenShard(f"{partial}: holds other records than were written; check the disk")
                name = part_name(number, ".tfrecord")
                desk.check_token()
                places.write_bytes(desk.work / (name + schema.INDEX_SUFFIX), index_bytes(index))
                if desk.scratch is None:
                    partial.rename(desk.folder / name)
                else:
                    places.upload(partial, desk.work / name)
        finally:
            partial.unlink(missing_ok=True)
        if rejects:
            lines = (ENCODE({**line, "split": desk.job.split}) for line in rejects)
            # Half a surrogate pair, which UTF-8 cannot hold, becomes an escape that JSON reads.
            text = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
            places.write_bytes(desk.work / part_name(number, ".rejects.jsonl"), text)
        reasons = Counter(line["reason"] for line in rejects)
        desk.finish(number, json.dumps({**facts, "rejects": dict(reasons)}))

    def _write(self, number: int, partial: Path, rows: Sequence[Row | Talk]) -> tuple[list[int], list[dict], int]:
        """Write the shard, which is not made if no row gives a record. Returns (payload bytes of each record, rejects, number of cut rows)."""
        rejects: list[dict] = []
        sizes: list[int] = []
        self._cut = 0  # conversations of this partition that are longer than a row
        self._media.forget()
        file: BinaryIO | None = None
        with contextlib.ExitStack() as stack:
            for done, row in enumerate(rows):
                self._desk.note(number, done)
                try:
                    payload = self._record(row)
                except Reject as reject:
                    rejects.append(
                        {"row": row.number, "id": row.media_id, "reason": reject.reason, "detail": reject.detail}
                    )
                    continue
                sizes.append(len(payload))
                file = file or stack.enter_context(partial.open("wb"))
                file.write(frame(payload))
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        return sizes, rejects, self._cut

    def _record(self, row: Row | Talk) -> bytes:
        if row.problem:
            raise Reject(row.reason, row.problem)
        if isinstance(row, Row):
            return serialize(row, self._media.read(row.media_id))
        cut = self._tokenizer is not None and is_cut(
            row.text, self._tokenizer, self._settings.slots, self._settings.max_tokens
        )
        clips = []
        for still, name in row.media:
            try:
                clips.append(self._media.read(name, still=still))
            except Reject as reject:
                raise Reject(reject.reason, f"{name}: {reject.detail}") from None
        self._cut += cut
        return serialize_talk(row, clips)


class MergeGroup(beam.DoFn):
    """Merges the facts and rejects of a group of partitions into `group-N.json` and `group-N.rejects.jsonl`, and yields the group.

    So the driver reads one small file for 256 partitions, and adds up a few numbers.
    """

    def __init__(self, job: Job):
        self._job = job

    def process(self, element: tuple[int, Iterable[int]]) -> Iterator[int]:
        """Merge one group. Raises PartitionFailed."""
        group, numbers = element[0], sorted(set(element[1]))
        work = epath.Path(self._job.work)
        with one_line(self._job.work), Scratch() as scratch:
            reasons: Counter[str] = Counter()
            parts = []
            local = scratch.path / "rejects"
            with local.open("wb") as rejects:
                for number in numbers:
                    facts = self._facts(work, number)
                    parts.append([number, facts["rows"], facts["written"], facts["bytes"], facts["cut"]])
                    reasons.update(facts["rejects"])
                    if facts["rejects"]:
                        rejects.write(places.read_bytes(work / part_name(number, ".rejects.jsonl")))
            places.upload(local, work / group_name(group, ".rejects.jsonl"))
            text = json.dumps({"parts": parts, "rejects": reasons})
            places.write_text(work / group_name(group, ".json"), text)
        yield group

    @staticmethod
    def _facts(work: epath.Path, number: int) -> dict:
        file = work / part_name(number, ".json")
        try:
            facts: dict = json.loads(places.read_bytes(file))
            _ = facts["rows"], facts["written"], facts["bytes"], facts["cut"], facts["rejects"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # after a loss of power
            places.delete(file)
            raise OSError(f"{file}: damaged ({error}); the partition is built again") from None
        return facts
