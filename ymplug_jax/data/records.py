"""Random access to the records of a data set: record i is one ranged read, checked and parsed, without TensorFlow."""

import json
import re
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2  # the Example message alone; TensorFlow stays out

from ymplug_jax.data import schema


class Record(NamedTuple):
    """One clip as stored."""

    media_id: str  # the FILE column of the CSV
    frames: list[bytes]  # JPEG, in time order
    timestamps: np.ndarray  # int64[T], microseconds from the start of the clip
    title: str
    captions: list[str]
    label_text: str
    label_index: int  # -1: unknown or withheld


class CorruptRecord(ValueError):
    """A record whose checksum or content is broken; the message names shard, index in the shard and byte offset."""


class Records:
    """The records of one split. Files are opened at the first read and dropped when pickled (for worker processes)."""

    def __init__(self, path: str, split: str):
        """Find the shards and read their indices.

        Args:
          path: folder of the data set, local or gs://.
          split: "train", "validation" or "test".

        Raises:
          FileNotFoundError: no such folder, split, shard or index, with what to do.
          ValueError: written with a schema that this reader does not know.
        """
        self.path, self.split = path, split
        self._shards = _find_shards(epath.Path(path), split)
        indices = [_read_index(shard) for shard in self._shards]  # int64[n, 2] each
        self._places = np.concatenate(indices)  # int64[records, 2]
        self._ends = np.cumsum([len(index) for index in indices])
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        """Record i of the split.

        Raises:
          CorruptRecord: a checksum does not fit.
        """
        shard = int(np.searchsorted(self._ends, i, side="right"))
        offset, size = (int(value) for value in self._places[i])
        number = i - (int(self._ends[shard - 1]) if shard else 0)
        framed = self._read(shard, offset, schema.HEADER_BYTES + size + schema.FOOTER_BYTES)
        where = f"{self._shards[shard]}: record {number} at byte {offset}"
        return _parse(_payload(framed, size, where), where)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _open(self._shards[shard])
        return file(offset, size)


def _open(shard: epath.Path) -> Any:
    """A function (offset, size) -> bytes that threads may share: positioned reads, no seek."""
    if "://" not in str(shard):
        import os

        handle = os.open(shard, os.O_RDONLY)
        return lambda offset, size: os.pread(handle, size, offset)
    import tensorstore as ts

    bucket, _, key = str(shard).removeprefix("gs://").partition("/")
    store = ts.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
    return lambda offset, size: store.read(key, byte_range=ts.KvStore.ByteRange(offset, offset + size)).result().value


def _find_shards(folder: epath.Path, split: str) -> list[epath.Path]:
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder; build it with python -m data_prep.build_shards and set config.data.path"
        )
    manifest = folder / schema.MANIFEST
    if manifest.exists():
        version = json.loads(manifest.read_text()).get("schema_version", schema.SCHEMA_VERSION)
        if version.split(".")[0] != schema.SCHEMA_VERSION.split(".")[0]:
            raise ValueError(
                f"{manifest}: schema {version}, this reader knows {schema.SCHEMA_VERSION}; build the shards again"
            )
    pattern = re.compile(r".+-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")
    found: dict[str, dict[int, epath.Path]] = {}
    totals: dict[str, int] = {}
    for file in folder.iterdir():
        if match := pattern.fullmatch(file.name):
            found.setdefault(match[1], {})[int(match[2])] = file
            totals[match[1]] = int(match[3])
    if split not in found:
        there = ", ".join(sorted(found)) or "no shards at all"
        raise FileNotFoundError(
            f"{folder}: no split {split!r} here, there are: {there}; change config.data or build that split"
        )
    if missing := [i for i in range(totals[split]) if i not in found[split]]:
        raise FileNotFoundError(
            f"{folder}: shard {missing[0]} of {totals[split]} of split {split!r} is missing; copy it or build again"
        )
    return [found[split][i] for i in range(totals[split])]


def _read_index(shard: epath.Path) -> np.ndarray:
    file = shard.with_name(shard.name + schema.INDEX_SUFFIX)
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; make it with python -m data_prep.index_shards {shard.parent}")
    with file.open("rb") as stream:
        index = np.lib.format.read_array(stream, allow_pickle=False)
    if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2:
        raise ValueError(
            f"{file} is no index (int64[n, 2]); make it again with python -m data_prep.index_shards {shard.parent}"
        )
    return index


def _payload(framed: bytes, size: int, where: str) -> bytes:
    """The payload of one framed record, both checksums verified."""
    header, payload, footer = (
        framed[:8],
        framed[schema.HEADER_BYTES : schema.HEADER_BYTES + size],
        framed[-schema.FOOTER_BYTES :],
    )
    if len(framed) != schema.HEADER_BYTES + size + schema.FOOTER_BYTES or int.from_bytes(header, "little") != size:
        raise CorruptRecord(f"{where}: length does not fit the index; the shard was cut or replaced")
    for data, stored in ((header, framed[8:12]), (payload, footer)):
        if schema.masked_crc(google_crc32c.value(data)) != int.from_bytes(stored, "little"):
            raise CorruptRecord(f"{where}: checksum does not fit; restore the shard, or set config.data.skip_corrupt")
    return payload


def _parse(payload: bytes, where: str) -> Record:
    example = tf_example_pb2.Example.FromString(payload)
    features = example.features.feature

    def strings(key: str) -> list[bytes]:
        return list(features[key].bytes_list.value) if key in features else []

    def text(key: str) -> str:
        return next((value.decode("utf-8") for value in strings(key)), "")

    frames = strings(schema.IMAGE)
    if not frames:
        raise CorruptRecord(f"{where}: no {schema.IMAGE}; it was not written by data_prep")
    label = features[schema.LABEL_INDEX].int64_list.value if schema.LABEL_INDEX in features else ()
    return Record(
        media_id=text(schema.MEDIA_ID),
        frames=frames,
        timestamps=np.array(features[schema.TIMESTAMP].int64_list.value, np.int64),
        title=text(schema.TITLE),
        captions=[value.decode("utf-8") for value in strings(schema.CAPTION)],
        label_text=text(schema.LABEL_TEXT),
        label_index=label[0] if label else -1,
    )
