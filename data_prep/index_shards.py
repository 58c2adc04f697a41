"""Verify the checksums of all shards and write their indices: `python -m data_prep.index_shards DIR`."""

import sys
from pathlib import Path

import google_crc32c
import numpy as np

from data_prep.flags import Parser, bar, local_path, run
from ymplug_jax.data import schema


class BrokenShard(ValueError):
    """A truncated or damaged shard. The message names the file, the record and the byte offset."""


def index_of(shard: Path) -> np.ndarray:
    """Return (offset of the header, payload bytes) of each record, int64[n, 2].

    Raises:
      BrokenShard: a length or a checksum is wrong.
    """
    places: list[tuple[int, int]] = []
    total = shard.stat().st_size
    with shard.open("rb") as file:
        offset = 0
        while offset < total:
            where = f"{shard}: record {len(places)} at byte {offset}"
            header = file.read(schema.HEADER_BYTES)
            size = int.from_bytes(header[:8], "little")
            if len(header) < schema.HEADER_BYTES or offset + schema.HEADER_BYTES + size + schema.FOOTER_BYTES > total:
                raise BrokenShard(f"{where}: the file ends inside this record; build or copy the shard again")
            payload, footer = file.read(size), file.read(schema.FOOTER_BYTES)
            for data, stored in ((header[:8], header[8:]), (payload, footer)):
                if schema.masked_crc(google_crc32c.value(data)) != int.from_bytes(stored, "little"):
                    raise BrokenShard(f"{where}: wrong checksum; build or copy the shard again")
            places.append((offset, size))
            offset += schema.HEADER_BYTES + size + schema.FOOTER_BYTES
    return np.array(places, np.int64).reshape(-1, 2)


def write_index(shard: Path) -> int:
    """Write the index `<shard>.index.npy` beside a shard, atomically, and return the number of records.

    Raises:
      BrokenShard: the shard is damaged; no index is written.
    """
    index = index_of(shard)
    target = shard.with_name(shard.name + schema.INDEX_SUFFIX)
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.save(file, index)
        partial.rename(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from None
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
    parser.add_argument("folder", type=local_path, help="folder of the shards")
    folder = parser.parse_args(argv).folder
    found = (path for below in ("", "[A-Za-z0-9]*/") for path in folder.glob(f"{below}*.tfrecord-*-of-*"))
    shards = sorted(path for path in found if not path.name.endswith((schema.INDEX_SUFFIX, ".partial")))
    if not shards:
        raise ValueError(f"{folder}: no shards (*.tfrecord-00000-of-00001) here; give the folder of a data set")
    records = sum(write_index(shard) for shard in bar(shards, "index", "shard"))
    print(f"{records:,} records in {len(shards)} shards")


if __name__ == "__main__":
    sys.exit(main())
