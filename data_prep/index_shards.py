"""Verify the checksums of all shards of a folder, local or in a bucket, and write their indices: `python -m data_prep.index_shards DIR`."""

import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import google_crc32c
import numpy as np
from etils import epath

from data_prep.flags import Parser, bar, place_of, run
from data_prep.parts import folders_in
from ymplug_jax.core import places
from ymplug_jax.data import schema

SHARD = re.compile(r".+\.tfrecord-\d{5}-of-\d{5}")
BLOCK = 16 << 20  # bytes of a request to a bucket
THREADS = 8  # shards of a bucket that are read at a time; each holds a block and a record


class BrokenShard(ValueError):
    """A truncated or damaged shard. The message names the file, the record and the byte offset."""


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Object:
    """An object of a bucket as a stream, read in blocks."""

    def __init__(self, path: epath.Path, total: int):
        self._path, self._total, self._next, self._block = path, total, 0, b""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes; fewer at the end."""
        while len(self._block) < size and self._next < self._total:
            stop = min(self._next + max(BLOCK, size), self._total)
            block = places.read_bytes(self._path, self._next, stop)
            if not block:
                break
            self._block, self._next = self._block + block, self._next + len(block)
        found, self._block = self._block[:size], self._block[size:]
        return found


def index_of(shard: Path) -> np.ndarray:
    """Return (offset of the header, payload bytes) of each record of a local shard, int64[n, 2].

    Raises:
      BrokenShard: a length or a checksum is wrong.
    """
    with shard.open("rb") as file:
        return _index(file, shard.stat().st_size, str(shard))


def _index(file: _Stream, total: int, shard: str) -> np.ndarray:
    found: list[tuple[int, int]] = []
    offset = 0
    while offset < total:
        where = f"{shard}: record {len(found)} at byte {offset}"
        header = file.read(schema.HEADER_BYTES)
        size = int.from_bytes(header[:8], "little")
        if len(header) < schema.HEADER_BYTES or offset + schema.HEADER_BYTES + size + schema.FOOTER_BYTES > total:
            raise BrokenShard(f"{where}: the file ends inside this record; build or copy the shard again")
        payload, footer = file.read(size), file.read(schema.FOOTER_BYTES)
        for data, stored in ((header[:8], header[8:]), (payload, footer)):
            if schema.masked_crc(google_crc32c.value(data)) != int.from_bytes(stored, "little"):
                raise BrokenShard(f"{where}: wrong checksum; build or copy the shard again")
        found.append((offset, size))
        offset += schema.HEADER_BYTES + size + schema.FOOTER_BYTES
    return np.array(found, np.int64).reshape(-1, 2)


def index_bytes(index: np.ndarray) -> bytes:
    """Return the content of an index file."""
    file = io.BytesIO()
    np.save(file, index)
    return file.getvalue()


def write_index(shard: epath.Path, size: int) -> int:
    """Write the index `<shard>.index.npy` beside a shard of `size` bytes, atomically, and return the number of records.

    Raises:
      BrokenShard: the shard is damaged; no index is written.
      OSError: a file cannot be read or written.
    """
    remote = places.is_remote(shard)
    index = _index(_Object(shard, size), size, str(shard)) if remote else index_of(Path(shard))
    places.write_bytes(shard.with_name(shard.name + schema.INDEX_SUFFIX), index_bytes(index))
    return len(index)


def frame(payload: bytes) -> bytes:
    """Return a payload in TFRecord framing."""
    size = len(payload).to_bytes(8, "little")
    head, body = (schema.masked_crc(google_crc32c.value(data)).to_bytes(4, "little") for data in (size, payload))
    return size + head + payload + body


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    """Index every shard of a folder and, if it holds parts, of the folders in it."""
    parser = Parser("index_shards", __doc__)
    parser.add_argument("folder", type=place_of("folder"), help="folder of the shards, local or in a bucket")
    folder = parser.parse_args(argv).folder
    sizes = {
        place / name: size
        for place in (folder, *folders_in(folder))
        for name, size in places.sizes(place).items()
        if SHARD.fullmatch(name)
    }
    if not sizes:
        raise ValueError(f"{folder}: no shards (*.tfrecord-00000-of-00001) here; give the folder of a data set")
    shards = bar(sorted(sizes), "index", "shard")
    with ThreadPoolExecutor(THREADS if places.is_remote(folder) else 1) as pool:
        records = sum(pool.map(lambda shard: write_index(shard, sizes[shard]), shards))
    print(f"{records:,} records in {len(sizes)} shards")


if __name__ == "__main__":
    sys.exit(main())
