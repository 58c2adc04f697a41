"""The data set: its TFDS features, and the Beam step that turns a partition of rows into one whole shard.

TFDS describes the data set (features, splits, metadata), so `tfds.builder_from_directory` loads it. Its own writer cannot
go on after a kill and shuffles everything through Beam, which a build for random access does not need: reading permutes
globally. So a partition of rows becomes a shard in one Beam element, written under a temporary name and then renamed.
"""

import errno
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from tensorflow_datasets.proto import tf_example_pb2

from data_prep.index_shards import frame
from data_prep.rows import Row
from data_prep.video_path import resolve
from ymplug_jax.data import schema
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Clip, DecoderFailed, Reader


class Settings(NamedTuple):
    """What the records depend on; another value makes another data set."""

    kind: str  # pretrain, classification, retrieval or captioning
    num_frames: int
    time_limit: float  # seconds a clip
    allow_links_to: tuple[str, ...] = ()  # folders outside the video root that links may lead to


class PartitionFailed(RuntimeError):
    """The machine failed, not a row: its disk is full, a folder is gone, no decoder starts. The message is one line; Beam
    carries it from process to process as text, so `FAILED` finds it there."""


FAILED = re.compile(r"PartitionFailed: ([^\n]*?)(?: \[while running|\n|$)")


def features(num_frames: int) -> Any:
    """TFDS features; their flat names are the keys of `ymplug_jax.data.schema`."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
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
    """The Example of one clip."""
    message = tf_example_pb2.Example()
    feature = message.features.feature
    texts = {
        schema.IMAGE: clip.frames,
        schema.MEDIA_ID: [row.media_id.encode()],
        schema.TITLE: [row.title.encode()],
        schema.CAPTION: [caption.encode() for caption in row.captions],
        schema.LABEL_TEXT: [row.label_text.encode()],
    }
    numbers = {
        schema.TIMESTAMP: clip.timestamps,
        schema.HEIGHT: [clip.height],
        schema.WIDTH: [clip.width],
        schema.ROW: [row.number],
        schema.LABEL_INDEX: [row.label_index],
    }
    for key, values in texts.items():
        feature[key].bytes_list.value.extend(values)
    for key, values in numbers.items():
        feature[key].int64_list.value.extend(values)
    return message.SerializeToString(deterministic=True)


class BuildPartition(beam.DoFn):
    """(number, rows) -> one shard `part-<number>.tfrecord` and, once that is whole, `part-<number>.json` beside it."""

    def __init__(self, settings: Settings, video_root: str, folder: str):
        self._settings, self._root, self._folder = settings, video_root, folder

    def setup(self) -> None:
        self._reader = Reader(self._settings.time_limit)

    def teardown(self) -> None:
        self._reader.close()

    def process(self, element: tuple[int, list[tuple]]) -> Iterator[int]:
        number, rows = element
        shard = Path(self._folder) / f"part-{number:05d}.tfrecord"
        partial = shard.with_suffix(f".partial-{os.getpid()}")
        try:
            self._write(shard, partial, list(map(Row._make, rows)))
        except (OSError, DecoderFailed) as error:
            partial.unlink(missing_ok=True)
            message = f"{shard.parent}: {error.strerror}" if isinstance(error, OSError) else str(error)
            raise PartitionFailed(" ".join(message.split())) from None
        yield number

    def _write(self, shard: Path, partial: Path, rows: list[Row]) -> None:
        """Raises OSError where the shard cannot be written or the video root is gone."""
        progress = shard.with_suffix(".progress")
        rejects: list[dict] = []
        sizes: list[int] = []
        told = 0.0
        with partial.open("wb") as file:
            for done, row in enumerate(rows):
                if time.monotonic() - told > 0.5:
                    progress.write_text(str(done))
                    told = time.monotonic()
                try:
                    payload = self._record(row)
                except Reject as reject:
                    if reject.reason == "missing_file" and not os.path.isdir(self._root):
                        raise FileNotFoundError(errno.ENOENT, f"the video root {self._root} is gone") from None
                    rejects.append(
                        {"row": row.number, "id": row.media_id, "reason": reject.reason, "detail": reject.detail}
                    )
                    continue
                sizes.append(len(payload))
                file.write(frame(payload))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(shard)
        facts = {"rows": len(rows), "written": len(sizes), "bytes": sum(sizes), "sizes": sizes, "rejects": rejects}
        ready = shard.with_suffix(".json.partial")
        ready.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        ready.rename(shard.with_suffix(".json"))
        progress.unlink(missing_ok=True)

    def _record(self, row: Row) -> bytes:
        if row.problem:
            raise Reject(row.reason, row.problem)
        path = resolve(self._root, row.media_id, self._settings.allow_links_to)
        return serialize(row, self._reader.read(path, self._settings.num_frames))
