"""TFDS features of the data set, and the Beam step that builds one shard from a partition of rows.

The data set has TFDS metadata, so `tfds.builder_from_directory` loads it. The TFDS writer is not used, because it cannot resume
after a kill and shuffles all records through Beam, which is unnecessary: the loader permutes globally. Instead, one Beam element
writes one shard under a temporary name and then renames it.
"""

import errno
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from tensorflow_datasets.proto import tf_example_pb2

from data_prep.conversations import Talk
from data_prep.index_shards import frame
from data_prep.rows import Row
from ymplug_jax.data import conversation, schema
from ymplug_jax.data.text import Tokenizer, load_tokenizer
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Clip, DecoderFailed, Reader
from ymplug_jax.data.video_path import resolve

KEPT = 64  # decoded files that a partition keeps for further rows with the same file


class Settings(NamedTuple):
    """Settings that determine the content of the records."""

    kind: str  # one of schema.KINDS
    num_frames: int  # frames stored per clip
    time_limit: float  # seconds per clip
    allow_links_to: tuple[str, ...] = ()  # folders outside the video root that symbolic links may point to
    tokenizer: str = ""  # conversations: file of the tokenizer that their length is measured with; "": not measured
    max_tokens: int = 0  # conversations: L
    slots: int = 0  # conversations: tokens of an image or clip


class PartitionFailed(RuntimeError):
    """The machine failed, not a row: the disk is full, a folder is missing or no decoder starts.

    The message is one line. Beam passes errors between processes as text, where `FAILED` finds the message.
    """


FAILED = re.compile(r"PartitionFailed: ([^\n]*?)(?: \[while running|\n|$)")


def features(kind: str, num_frames: int) -> Any:
    """Return the TFDS features of a kind. Their flattened names are the keys in `ymplug_jax.data.schema`."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
    if kind == schema.INSTRUCT:
        texts, numbers = tfds.features.Sequence(text), tfds.features.Sequence(number)
        return tfds.features.FeaturesDict(
            {
                # JPEG as bytes: the images and clips of a record differ in size, so TFDS could not stack them.
                "image": {"encoded": texts, "timestamp": numbers, "height": numbers, "width": numbers},
                "clip": {"media_id": text, "row": number},
                "chat": {"text": text, "task_type": text, "options": texts},
                "medium": {"name": texts, "still": numbers, "frames": numbers},
            }
        )
    return tfds.features.FeaturesDict(
        {
            "image": {
                "encoded": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg"), length=num_frames),
                "timestamp": tfds.features.Sequence(number, length=num_frames),
                "height": number,
                "width": number,
            },
            "clip": {"media_id": text, "row": number, "title": text, "label": {"text": text, "index": number}},
            "caption": {"string": tfds.features.Sequence(text)},
        }
    )


def serialize(row: Row, clip: Clip) -> bytes:
    """Serialise a clip and its row as a tf.train.Example."""
    return _example(
        {
            schema.IMAGE: clip.frames,
            schema.MEDIA_ID: [row.media_id.encode()],
            schema.TITLE: [row.title.encode()],
            schema.CAPTION: [caption.encode() for caption in row.captions],
            schema.LABEL_TEXT: [row.label_text.encode()],
        },
        {
            schema.TIMESTAMP: clip.timestamps,
            schema.HEIGHT: [clip.height],
            schema.WIDTH: [clip.width],
            schema.ROW: [row.number],
            schema.LABEL_INDEX: [row.label_index],
        },
    )


def serialize_talk(talk: Talk, clips: Sequence[Clip]) -> bytes:
    """Serialise a conversation and its images and clips, in the order of the placeholders, as a tf.train.Example."""
    return _example(
        {
            schema.IMAGE: [jpeg for clip in clips for jpeg in clip.frames],
            schema.MEDIA_ID: [talk.media_id.encode()],
            schema.CHAT_TEXT: [talk.text.encode()],
            schema.CHAT_TASK: [talk.task_type.encode()],
            schema.CHAT_OPTIONS: [option.encode() for option in talk.options],
            schema.MEDIUM_NAME: [name.encode() for _, name in talk.media],
        },
        {
            schema.TIMESTAMP: [moment for clip in clips for moment in clip.timestamps],
            schema.HEIGHT: [clip.height for clip in clips],
            schema.WIDTH: [clip.width for clip in clips],
            schema.ROW: [talk.number],
            schema.MEDIUM_STILL: [int(still) for still, _ in talk.media],
            schema.MEDIUM_FRAMES: [len(clip.frames) for clip in clips],
        },
    )


def _example(texts: dict[str, list[bytes]], numbers: dict[str, list[int]]) -> bytes:
    message = tf_example_pb2.Example()
    feature = message.features.feature
    for key, pieces in texts.items():
        feature[key].bytes_list.value.extend(pieces)
    for key, values in numbers.items():
        feature[key].int64_list.value.extend(values)
    return message.SerializeToString(deterministic=True)


class Media:
    """Decoder of images and clips in a child process. Keeps the latest KEPT results, since many rows may share a file."""

    def __init__(self, settings: Settings, root: str):
        self._settings, self._root = settings, root
        self._reader = Reader(settings.time_limit)
        self._kept: OrderedDict[tuple[bool, str], Clip | Reject] = OrderedDict()

    def read(self, name: str, *, still: bool = False) -> Clip:
        """Read a file below the video root. Raises Reject and, as `Reader.read`, DecoderFailed."""
        key = (still, name)
        if key not in self._kept:
            try:
                path = resolve(self._root, name, self._settings.allow_links_to)
                self._kept[key] = self._reader.read(path, self._settings.num_frames, still=still)
            except Reject as reject:
                self._kept[key] = reject
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        found = self._kept[key]
        if isinstance(found, Reject):
            raise Reject(found.reason, found.detail)
        return found

    def forget(self) -> None:
        """Drop the results, e.g. because files may have changed since."""
        self._kept.clear()

    def close(self) -> None:
        """Stop the decoder process."""
        self._reader.close()


def is_cut(text: str, tokenizer: Tokenizer, slots: int, limit: int) -> bool:
    """Whether a conversation is longer than a row of `limit` tokens. Raises Reject if the row then holds no token of an answer."""
    if len(conversation.for_training(text, tokenizer, slots, 2**31).ids) <= limit + 1:
        return False
    if not conversation.for_training(text, tokenizer, slots, limit).answer.any():
        raise Reject("no_answer", f"no token of an answer fits into --max_tokens {limit}")
    return True


def _rows_file(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.json"


def write_rows(folder: Path, number: int, rows: Sequence[Row | Talk]) -> None:
    """Write the rows of a partition for its worker. Raises OSError."""
    _rows_file(folder, number).write_text(json.dumps(rows), encoding="utf-8")


class BuildPartition(beam.DoFn):
    """Writes the rows of a partition to a shard `part-<number>.tfrecord` and then, once it is complete, `part-<number>.json`.

    The rows come from a file, see `write_rows`: Beam compresses elements into its graph, which takes longer than writing records of text.
    """

    def __init__(self, settings: Settings, video_root: str, folder: str):
        self._settings, self._root, self._folder = settings, video_root, folder

    def setup(self) -> None:
        """Create the decoder of this worker and load the tokenizer."""
        self._media = Media(self._settings, self._root)
        self._tokenizer = load_tokenizer(self._settings.tokenizer) if self._settings.tokenizer else None

    def teardown(self) -> None:
        """Stop the decoder process."""
        self._media.close()

    def process(self, number: int) -> Iterator[int]:
        """Build one partition and yield its number.

        Raises:
          PartitionFailed: a disk or the decoder failed.
        """
        shard = Path(self._folder) / f"part-{number:05d}.tfrecord"
        partial = shard.with_suffix(f".partial-{os.getpid()}")
        try:
            make = Talk._make if self._settings.kind == schema.INSTRUCT else Row._make
            rows = json.loads(_rows_file(shard.parent, number).read_bytes())
            self._write(shard, partial, [make(row) for row in rows])
        except (OSError, DecoderFailed) as error:
            partial.unlink(missing_ok=True)
            message = f"{shard.parent}: {error.strerror}" if isinstance(error, OSError) else str(error)
            raise PartitionFailed(" ".join(message.split())) from None
        yield number

    def _write(self, shard: Path, partial: Path, rows: list[Row | Talk]) -> None:
        """Write the shard and its summary. Raises OSError if a file cannot be written or the video root is missing."""
        progress = shard.with_suffix(".progress")
        rejects: list[dict] = []
        sizes: list[int] = []
        told = 0.0
        self._cut = 0  # conversations of this partition that are longer than a row
        self._media.forget()
        with partial.open("wb") as file:
            for done, row in enumerate(rows):
                if time.monotonic() - told > 0.5:
                    progress.write_text(str(done))
                    told = time.monotonic()
                try:
                    payload = self._record(row)
                except Reject as reject:
                    if reject.reason == "missing_file" and not os.path.isdir(self._root):
                        raise FileNotFoundError(errno.ENOENT, f"the video root {self._root} is missing") from None
                    rejects.append(
                        {"row": row.number, "id": row.media_id, "reason": reject.reason, "detail": reject.detail}
                    )
                    continue
                sizes.append(len(payload))
                file.write(frame(payload))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(shard)
        facts = {
            "rows": len(rows),
            "written": len(sizes),
            "bytes": sum(sizes),
            "sizes": sizes,
            "rejects": rejects,
            "cut": self._cut,
        }
        ready = shard.with_suffix(".json.partial")
        ready.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        ready.rename(shard.with_suffix(".json"))
        progress.unlink(missing_ok=True)

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


class Partitions(NamedTuple):
    """The missing partitions of a build, for `runners.run`."""

    settings: Settings
    video_root: str
    folder: str
    numbers: tuple[int, ...]

    def _missing(self, share: int, shares: int) -> list[int]:
        return [i for i in self.numbers[share::shares] if not (Path(self.folder) / f"part-{i:05d}.json").exists()]

    def graph(self, pipeline: beam.Pipeline, share: int, shares: int) -> None:
        """Add the steps that build the missing partitions of a share."""
        step = BuildPartition(self.settings, self.video_root, self.folder)
        _ = pipeline | beam.Create(self._missing(share, shares)) | beam.Reshuffle() | beam.ParDo(step)

    def state(self, share: int, shares: int) -> tuple[int, Hashable]:
        """Return the number of missing partitions of a share, and a value that changes with every finished row."""
        missing = self._missing(share, shares)
        rows = []
        for i in missing:
            try:
                rows.append((i, (Path(self.folder) / f"part-{i:05d}.progress").stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return len(missing), tuple(rows)
