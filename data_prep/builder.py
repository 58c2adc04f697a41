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
    """Settings that determine the content of the records."""

    kind: str  # a kind of CSV, see schema.COLUMNS
    num_frames: int  # frames stored per clip
    time_limit: float  # seconds per clip
    allow_links_to: tuple[str, ...] = ()  # folders outside the video root that symbolic links may point to


class PartitionFailed(RuntimeError):
    """The machine failed, not a row: the disk is full, a folder is missing or no decoder starts.

    The message is one line. Beam passes errors between processes as text, where `FAILED` finds the message.
    """


FAILED = re.compile(r"PartitionFailed: ([^\n]*?)(?: \[while running|\n|$)")


def features(num_frames: int) -> Any:
    """Return the TFDS features. Their flattened names are the keys in `ymplug_jax.data.schema`."""
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
    """Serialise a clip and its row as a tf.train.Example."""
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
    for key, pieces in texts.items():
        feature[key].bytes_list.value.extend(pieces)
    for key, values in numbers.items():
        feature[key].int64_list.value.extend(values)
    return message.SerializeToString(deterministic=True)


class BuildPartition(beam.DoFn):
    """Writes (number, rows) to a shard `part-<number>.tfrecord` and then, once it is complete, `part-<number>.json`."""

    def __init__(self, settings: Settings, video_root: str, folder: str):
        self._settings, self._root, self._folder = settings, video_root, folder

    def setup(self) -> None:
        """Create the reader of this worker."""
        self._reader = Reader(self._settings.time_limit)

    def teardown(self) -> None:
        """Stop the decoder process."""
        self._reader.close()

    def process(self, element: tuple[int, list[tuple[Any, ...]]]) -> Iterator[int]:
        """Build one partition and yield its number.

        Raises:
          PartitionFailed: a disk or the decoder failed.
        """
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
        """Write the shard and its summary. Raises OSError if a file cannot be written or the video root is missing."""
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
