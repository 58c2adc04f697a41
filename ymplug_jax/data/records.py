"""Random access to the records of a data set: one ranged read per record, verified and parsed without TensorFlow."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ymplug_jax.core import places
from ymplug_jax.data import joined_set, schema, shard_files, tf_example

if TYPE_CHECKING:
    import tensorstore


class Medium(NamedTuple):
    """One image or clip of a conversation."""

    still: bool  # a still image, with one frame; a clip may have one frame too
    name: str  # its file, as the row names it
    frames: Sequence[bytes]  # JPEG, in time order, one or more


class Record(NamedTuple):
    """One clip, or one conversation with any number of images and clips, as stored."""

    media_id: str  # FILE column of the CSV; of a conversation its first file, or FILE.jsonl:LINE without media
    frames: Sequence[bytes]  # JPEG, in time order; a frame is copied out of the record on access; of all media in order
    timestamps: np.ndarray  # int64[T], microseconds from the start of the clip; each medium starts at 0
    title: str
    captions: list[str]
    label_text: str
    label_index: int  # -1: unknown or withheld
    text: str = ""  # the conversation with its placeholders; "" for other kinds
    media: tuple[Medium, ...] = ()  # of a conversation, in the order of its placeholders
    task_type: str = ""  # of a conversation
    options: tuple[str, ...] = ()  # of a conversation: answers to choose from in evaluation; (): none are given


class Split(Protocol):
    """Interface of the records of one split. Picklable and thread-safe, as threads and worker processes share it."""

    path: str
    split: str
    kind: str  # one of schema.KINDS; "text" for a text file; "" if unknown

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


class CorruptRecord(ValueError):
    """A record with a wrong checksum or invalid content. The message names the shard, the record in it and the byte offset."""


class Records:
    """Records of one split in TFRecord shards. Thread-safe; pickles no open connection, so worker processes open their own."""

    def __init__(self, path: str, split: str):
        """Find the shards and read their indices.

        Args:
          path: folder of the data set, local or gs://bucket/folder.
          split: "train", "validation" or "test".

        Raises:
          FileNotFoundError: the folder, the split, a shard or an index is missing; the message gives the fix.
          ValueError: the schema version is unknown, the shards are of two builds, or an index is damaged.
        """
        self.path, self.split = path.rstrip("/"), split
        place = places.place(self.path, "config.data.path")
        self._folder = _Bucket(str(place)) if places.is_remote(place) else _Disk(str(place))
        names = self._folder.names()
        self.kind = ""  # stays empty without a manifest
        self._entry: Any = None  # entry of the split in the manifest
        manifest: dict[str, Any] = {}
        if schema.MANIFEST in names:
            manifest = _manifest(f"{self.path}/{schema.MANIFEST}", self._folder.read_all([schema.MANIFEST])[0])
            self.kind = _kind(manifest, split)
            splits = manifest.get("splits")
            self._entry = splits.get(split) if isinstance(splits, dict) else None
        if joined_set.is_joined(manifest):
            self._shards, names = shard_files.shards_of_parts(self.path, manifest, split, self._folder)
        else:
            self._shards = shard_files.shards_of(self.path, split, names)
        indices = shard_files.indices_of(self.path, self._shards, names, self._folder)  # int64[n, 2] each
        self._places = np.concatenate(indices)  # int64[records, 2]: 16 bytes of memory per record
        self._ends = np.cumsum([len(index) for index in indices])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def facts(self) -> bytes:
        """Return what identifies the split without reading its records: place and size of each, and the entry in the manifest."""
        entry = json.dumps(self._entry, sort_keys=True)
        return json.dumps([self.kind, self._ends.tolist(), entry]).encode() + self._places.tobytes()

    def __getitem__(self, i: int) -> Record:
        """Read record i of the split, 0 <= i < len.

        Raises:
          IndexError: i is out of range.
          CorruptRecord: the checksum or the content is wrong.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: record {i} is out of range; split {self.split!r} has {len(self)} records")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        offset, size = (int(value) for value in self._places[i])
        number = i - (int(self._ends[shard - 1]) if shard else 0)
        where = f"{self.path}/{self._shards[shard]}: record {number} at byte {offset}"
        framed = self._folder.read(self._shards[shard], offset, schema.HEADER_BYTES + size + schema.FOOTER_BYTES)
        _check(framed, size, where)
        return _parse(framed, size, where)


class _Disk:
    """A local folder. Opens a file for each read, which takes microseconds, so thousands of shards need no file descriptors."""

    def __init__(self, path: str):
        self._path = Path(path).expanduser()

    def names(self) -> set[str]:
        if not self._path.is_dir():
            raise FileNotFoundError(_no_folder(self._path))
        return {file.name for file in self._path.iterdir()}

    def names_below(self, parts: list[str]) -> list[set[str]]:
        folders = [self._path / part for part in parts]
        return [set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders]

    def read(self, name: str, offset: int, size: int) -> bytes:
        file = os.open(os.path.join(self._path, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, size, offset)
            while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more  # some file systems return fewer bytes per read
            return data
        finally:
            os.close(file)

    def read_all(self, names: list[str]) -> list[bytes]:
        return [(self._path / name).read_bytes() for name in names]


class _Bucket:
    """A folder in a bucket, read through TensorStore, which retries on its own. Connects at the first use."""

    def __init__(self, url: str):
        self._url = url
        self._connection: tensorstore.KvStore | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_connection": None}

    @property
    def _store(self) -> "tensorstore.KvStore":
        if self._connection is None:
            import tensorstore  # imported here: only buckets need it

            self._connection = tensorstore.KvStore.open(f"{self._url}/").result()
        return self._connection

    def names(self) -> set[str]:
        try:
            names = {key.decode() for key in self._store.list().result()}
        except ValueError as error:
            raise OSError(f"{self._url}: cannot be listed ({error}); check the name and your credentials") from error
        if not names:
            raise FileNotFoundError(_no_folder(self._url))
        return names

    def names_below(self, parts: list[str]) -> list[set[str]]:
        import tensorstore

        ranges = [tensorstore.KvStore.KeyRange(f"{part}/", f"{part}0") for part in parts]  # "0" follows "/"
        pending = [self._store.list(one, len(part) + 1) for one, part in zip(ranges, parts, strict=True)]
        return [{key.decode() for key in keys.result()} for keys in pending]

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            result = self._store.read(name, byte_range=slice(offset, offset + size)).result()
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                return b""  # the shard is shorter than its index says; as a local read past the end
            raise OSError(
                f"{self._url}/{name}: cannot be read ({error}); check the bucket and your credentials"
            ) from error
        return self._value(name, result)

    def read_all(self, names: list[str]) -> list[bytes]:
        pending = [self._store.read(name) for name in names]  # concurrently: there may be thousands
        return [self._value(name, result.result()) for name, result in zip(names, pending, strict=True)]

    def _value(self, name: str, result: "tensorstore.KvStore.ReadResult") -> bytes:
        if result.state != "value":
            raise FileNotFoundError(f"{self._url}/{name}: missing; copy it again or build the shards again")
        return result.value


def _no_folder(path: Path | str) -> str:
    return f"{path}: no such folder; build it with python -m data_prep.build_shards and set config.data.path"


def _manifest(file: str, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        version = str(manifest["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a manifest of data_prep ({error!r}); build the shards again") from None
    if manifest.get(schema.PUBLISHING):
        raise ValueError(
            f"{file}: split {manifest[schema.PUBLISHING]!r} is being published; wait until data_prep.build_shards ends, or run its command again if it was stopped"
        )
    if version.split(".")[0] != schema.SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{file}: schema_version {version}, but this version reads {schema.SCHEMA_VERSION}; build the shards again"
        )
    return manifest


def _kind(manifest: Mapping[str, Any], split: str) -> str:
    """Return the kind of a split: its own entry in the manifest, else that of the data set."""
    splits = manifest.get("splits")
    own = splits.get(split) if isinstance(splits, dict) else None
    return str((own.get("kind") if isinstance(own, dict) else None) or manifest.get("kind") or "")


def _check(framed: bytes, size: int, where: str) -> None:
    """Verify the length and both checksums of a framed record."""
    import google_crc32c

    if len(framed) != schema.HEADER_BYTES + size + schema.FOOTER_BYTES or int.from_bytes(framed[:8], "little") != size:
        raise CorruptRecord(f"{where}: length differs from the index; copy or build the shard again")
    data = np.frombuffer(framed, np.uint8)  # slices of it are views, not copies
    end = schema.HEADER_BYTES + size
    for part, crc in (
        (data[:8], framed[8 : schema.HEADER_BYTES]),
        (data[schema.HEADER_BYTES : end], framed[end:]),
    ):
        if schema.masked_crc(google_crc32c.value(part)) != int.from_bytes(crc, "little"):
            raise CorruptRecord(
                f"{where}: wrong checksum; copy or build the shard again, or set config.data.skip_corrupt=True"
            )


def _parse(framed: bytes, size: int, where: str) -> Record:
    try:
        features = tf_example.parse_example(framed, schema.HEADER_BYTES, schema.HEADER_BYTES + size)
    except ValueError as error:
        raise CorruptRecord(f"{where}: not a tf.train.Example ({error}); use shards written by data_prep") from None

    def values(key: str) -> list[bytes]:
        return list(tf_example.Slices(framed, features[key].slices)) if key in features else []

    def integers(key: str) -> list[int]:
        return features[key].integers if key in features else []

    frames = tf_example.Slices(framed, features[schema.IMAGE].slices if schema.IMAGE in features else [])
    if not len(frames) and schema.CHAT_TEXT not in features:  # conversations may have no media
        raise CorruptRecord(f"{where}: no {schema.IMAGE} in it; use shards written by data_prep")
    try:
        return Record(
            media_id=b"".join(values(schema.MEDIA_ID)[:1]).decode(),
            frames=frames,
            timestamps=np.array(integers(schema.TIMESTAMP), np.int64),
            title=b"".join(values(schema.TITLE)[:1]).decode(),
            captions=[value.decode() for value in values(schema.CAPTION)],
            label_text=b"".join(values(schema.LABEL_TEXT)[:1]).decode(),
            label_index=next(iter(integers(schema.LABEL_INDEX)), -1),
            text=b"".join(values(schema.CHAT_TEXT)[:1]).decode(),
            media=_media(
                [name.decode() for name in values(schema.MEDIUM_NAME)],
                integers(schema.MEDIUM_STILL),
                integers(schema.MEDIUM_FRAMES),
                frames if schema.CHAT_TEXT in features else (),
                where,
            ),
            task_type=b"".join(values(schema.CHAT_TASK)[:1]).decode(),
            options=tuple(value.decode() for value in values(schema.CHAT_OPTIONS)),
        )
    except UnicodeDecodeError as error:
        raise CorruptRecord(f"{where}: text is not UTF-8 ({error}); use shards written by data_prep") from None


def _media(
    names: list[str], still: list[int], counts: list[int], frames: Sequence[bytes], where: str
) -> tuple[Medium, ...]:
    """Divide the frames of a conversation among its media."""
    if not (names or still or counts or frames):
        return ()
    whole = len(names) == len(still) == len(counts) and sum(counts) == len(frames)
    if not whole or any(count < 1 or (count > 1 and image) for image, count in zip(still, counts, strict=True)):
        raise CorruptRecord(f"{where}: its frames do not agree with its images and clips; build the shards again")
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return tuple(
        Medium(bool(image), name, frames[end - count : end])
        for name, image, count, end in zip(names, still, counts, ends, strict=True)
    )
