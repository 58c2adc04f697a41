"""Random access to the records of a data set: record i is one ranged read, checked and parsed, without TensorFlow."""

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ymplug_jax.data import schema, tf_example

SHARD = re.compile(r"([^/]+)-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")


class Record(NamedTuple):
    """One clip as stored."""

    media_id: str  # the FILE column of the CSV
    frames: Sequence[bytes]  # JPEG, in time order; each is copied out of the record when it is asked for
    timestamps: np.ndarray  # int64[T], microseconds from the start of the clip
    title: str
    captions: list[str]
    label_text: str
    label_index: int  # -1: unknown or withheld


class Split(Protocol):
    """The records of one split, wherever they come from; threads and worker processes share it, so it can be pickled."""

    path: str
    split: str
    kind: str  # of the CSV that it was built from, see schema.COLUMNS; "text" for a text file; "": nobody knows

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


class CorruptRecord(ValueError):
    """A record whose checksum or content is broken; the message names shard, index in the shard and byte offset."""


class Records:
    """The records of one split, for any number of threads; pickles small state only (worker processes open their own)."""

    def __init__(self, path: str, split: str):
        """Find the shards and read their indices.

        Args:
          path: folder of the data set, local or gs://bucket/folder.
          split: "train", "validation" or "test".

        Raises:
          FileNotFoundError: no such folder, split, shard or index, with what to do.
          ValueError: written with a schema that this reader does not know, shards of two builds, or a broken index.
        """
        self.path, self.split = path.rstrip("/"), split
        self._folder = _Bucket(self.path) if "://" in path else _Disk(self.path)
        names = self._folder.names()
        self.kind = ""  # of the CSV that the split was built from, see schema.COLUMNS; "" without a manifest
        if schema.MANIFEST in names:
            manifest = _manifest(f"{self.path}/{schema.MANIFEST}", self._folder.read_all([schema.MANIFEST])[0])
            self.kind = _kind(manifest, split)
        self._shards = _shards_of(self.path, split, names)
        indices = _indices_of(self.path, self._shards, names, self._folder)  # int64[n, 2] each
        self._places = np.concatenate(indices)  # int64[records, 2]: 16 bytes a record stay in memory
        self._ends = np.cumsum([len(index) for index in indices])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        """Record i of the split, 0 <= i < len.

        Raises:
          IndexError: no such record.
          CorruptRecord: a checksum or the content does not fit.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: no record {i} in split {self.split!r}, which has {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        offset, size = (int(value) for value in self._places[i])
        number = i - (int(self._ends[shard - 1]) if shard else 0)
        where = f"{self.path}/{self._shards[shard]}: record {number} at byte {offset}"
        framed = self._folder.read(self._shards[shard], offset, schema.HEADER_BYTES + size + schema.FOOTER_BYTES)
        _check(framed, size, where)
        return _parse(framed, size, where)


class _Disk:
    """A local folder. A file is opened for each read: that takes microseconds, and thousands of shards cost no file descriptors."""

    def __init__(self, path: str):
        self._path = Path(path).expanduser()

    def names(self) -> set[str]:
        if not self._path.is_dir():
            raise FileNotFoundError(_no_folder(self._path))
        return {file.name for file in self._path.iterdir()}

    def read(self, name: str, offset: int, size: int) -> bytes:
        file = os.open(os.path.join(self._path, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, size, offset)
            while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more  # some file systems give less at a time
            return data
        finally:
            os.close(file)

    def read_all(self, names: list[str]) -> list[bytes]:
        return [(self._path / name).read_bytes() for name in names]


class _Bucket:
    """A folder of a bucket, through TensorStore, which retries by itself. The connection is opened at the first use."""

    def __init__(self, url: str):
        self._url, self._connection = url, None

    def __getstate__(self) -> dict:
        return {"_url": self._url, "_connection": None}

    @property
    def _store(self) -> Any:
        if self._connection is None:
            import tensorstore  # only where a bucket is used

            self._connection = tensorstore.KvStore.open(f"{self._url}/").result()
        return self._connection

    def names(self) -> set[str]:
        try:
            names = {key.decode() for key in self._store.list().result()}
        except ValueError as error:
            raise OSError(f"{self._url}: cannot be listed; check the name and your credentials: {error}") from error
        if not names:
            raise FileNotFoundError(_no_folder(self._url))
        return names

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            result = self._store.read(name, byte_range=slice(offset, offset + size)).result()
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                return b""  # the shard is shorter than its index says; like a local read past the end
            raise OSError(f"{self._url}/{name}: cannot be read: {error}") from error
        return self._value(name, result)

    def read_all(self, names: list[str]) -> list[bytes]:
        pending = [self._store.read(name) for name in names]  # side by side: there may be thousands
        return [self._value(name, result.result()) for name, result in zip(names, pending, strict=True)]

    def _value(self, name: str, result: Any) -> bytes:
        if result.state != "value":
            raise FileNotFoundError(f"{self._url}/{name} is gone; copy it or build again")
        return result.value


def _no_folder(path: Path | str) -> str:
    return f"{path}: no such folder; build it with python -m data_prep.build_shards and set config.data.path"


def _manifest(file: str, content: bytes) -> dict:
    try:
        manifest = json.loads(content)
        version = str(manifest["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no manifest of data_prep ({error!r}); build the shards again") from None
    if version.split(".")[0] != schema.SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{file}: schema_version {version}, this reader knows {schema.SCHEMA_VERSION}; build the shards again"
        )
    return manifest


def _kind(manifest: dict, split: str) -> str:
    """Kind of a split: its own where the manifest says so, as splits are built one by one."""
    splits = manifest.get("splits")
    own = splits.get(split) if isinstance(splits, dict) else None
    return str((own.get("kind") if isinstance(own, dict) else None) or manifest.get("kind") or "")


def _shards_of(path: str, split: str, names: set[str]) -> list[str]:
    """File names of the shards of a split, in order, all of one build and none missing."""
    found: dict[str, dict[tuple[str, int], set[int]]] = {}  # split -> (prefix, count) -> shards
    for name in names:
        if match := SHARD.fullmatch(name):
            found.setdefault(match[2], {}).setdefault((match[1], int(match[4])), set()).add(int(match[3]))
    if split not in found:
        there = ", ".join(sorted(found)) or "no shards at all"
        raise FileNotFoundError(
            f"{path}: no split {split!r} here, there are: {there}; build it or name another "
            "(config.data.train_split, config.data.eval_split; with an empty eval_split nothing is evaluated in training)"
        )
    if len(found[split]) > 1:
        builds = ", ".join(f"{prefix}-{split} of {count} shards" for prefix, count in sorted(found[split]))
        raise ValueError(f"{path}: split {split!r} holds several builds ({builds}); keep one of them in this folder")
    (prefix, count), there = next(iter(found[split].items()))
    if missing := sorted(set(range(count)) - there):
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {count} shards of split {split!r} are missing, the first is "
            f"{schema.shard_name(prefix, split, missing[0], count)}; copy them or build again"
        )
    return [schema.shard_name(prefix, split, shard, count) for shard in range(count)]


def _indices_of(path: str, shards: list[str], names: set[str], folder: _Disk | _Bucket) -> list[np.ndarray]:
    """int64[n, 2] for each shard."""
    files = [shard + schema.INDEX_SUFFIX for shard in shards]
    fix = f"python -m data_prep.index_shards {path}"
    if missing := [file for file in files if file not in names]:
        raise FileNotFoundError(f"{path}/{missing[0]} is missing (one of {len(missing)}); make it with {fix}")
    indices = []
    for file, data in zip(files, folder.read_all(files), strict=True):
        try:
            index = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}/{file} is broken ({error}); make it again with {fix}") from None
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2:
            raise ValueError(f"{path}/{file} is no index (int64[n, 2]); make it again with {fix}")
        indices.append(index)
    return indices


def _check(framed: bytes, size: int, where: str) -> None:
    """Length and both checksums of one framed record."""
    import google_crc32c

    if len(framed) != schema.HEADER_BYTES + size + schema.FOOTER_BYTES or int.from_bytes(framed[:8], "little") != size:
        raise CorruptRecord(f"{where}: length does not fit the index; the shard was cut, replaced or damaged")
    data = np.frombuffer(framed, np.uint8)  # what it cuts is not copied
    end = schema.HEADER_BYTES + size
    for part, crc in (
        (data[:8], framed[8 : schema.HEADER_BYTES]),
        (data[schema.HEADER_BYTES : end], framed[end:]),
    ):
        if schema.masked_crc(google_crc32c.value(part)) != int.from_bytes(crc, "little"):
            raise CorruptRecord(f"{where}: checksum does not fit; restore the shard, or set config.data.skip_corrupt")


def _parse(framed: bytes, size: int, where: str) -> Record:
    try:
        features = tf_example.parse_example(framed, schema.HEADER_BYTES, schema.HEADER_BYTES + size)
    except ValueError as error:
        raise CorruptRecord(f"{where}: no tf.train.Example ({error}); it was not written by data_prep") from None

    def values(key: str) -> list[bytes]:
        return list(tf_example.Slices(framed, features[key].slices)) if key in features else []

    def integers(key: str) -> list[int]:
        return features[key].integers if key in features else []

    frames = features[schema.IMAGE].slices if schema.IMAGE in features else []
    if not frames:
        raise CorruptRecord(f"{where}: no {schema.IMAGE}; it was not written by data_prep")
    try:
        return Record(
            media_id=b"".join(values(schema.MEDIA_ID)[:1]).decode(),
            frames=tf_example.Slices(framed, frames),
            timestamps=np.array(integers(schema.TIMESTAMP), np.int64),
            title=b"".join(values(schema.TITLE)[:1]).decode(),
            captions=[value.decode() for value in values(schema.CAPTION)],
            label_text=b"".join(values(schema.LABEL_TEXT)[:1]).decode(),
            label_index=next(iter(integers(schema.LABEL_INDEX)), -1),
        )
    except UnicodeDecodeError as error:
        raise CorruptRecord(f"{where}: text that is not UTF-8 ({error}); it was not written by data_prep") from None
