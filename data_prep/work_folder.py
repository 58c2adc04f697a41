"""The work folder of a build, OUT/.building/SPLIT: whether it can be continued, and the first pass over the CSV that fills it.

build.json    settings and counts; written last, so a folder without it is empty for us
rows.jsonl, rows.npy    the table of rows, see `row_table`
attempt       token of the attempt whose workers may write
part-*, group-*    see `partition`
publish.json  see `publish`
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from data_prep import row_table
from data_prep.build_flags import BuildError
from data_prep.row_table import OFFSETS, TABLE, AnyRow
from data_prep.scratch import Scratch
from ymplug_jax.core import places

NOTE = "build.json"
SHARD_BYTES, FRAME_BYTES = 350e6, 37e3  # size of a shard to aim at; measured size of a stored frame
MOST_SHARDS = 99_999  # five digits in the names of shards


class Work(NamedTuple):
    """A work folder that is ready for workers."""

    folder: epath.Path
    rows: int
    size: int  # rows of all partitions but the last
    repeated: int  # files, or conversations, in more than one row
    examples: list[tuple[str, int]]  # (file, rows) of some of them

    @property
    def partitions(self) -> int:
        """Number of partitions."""
        return -(-self.rows // self.size)


def default_size(rows: int, num_frames: int) -> int:
    """Return the rows of a partition: a sixteenth of the CSV, at least 16, and at most what fills a shard of 350 MB."""
    fits = max(16, round(SHARD_BYTES / (FRAME_BYTES * num_frames)))
    return min(fits, max(16, -(-rows // 16)))


def open_work(
    out: epath.Path,
    folder: epath.Path,
    settings: dict,
    rows: Callable[[], Iterable[AnyRow]],
    size: Callable[[int], int],
) -> Work:
    """Return the work folder of an interrupted build with equal settings, or make a new one from the rows.

    Args:
      out: folder of the data set.
      folder: the work folder in it.
      settings: whatever the content of the partitions depends on, the CSV's checksum included.
      rows: gives the rows; called only if there is no such folder, and read to the end before anything changes.
      size: rows of a partition for a number of rows.

    Raises:
      ValueError: an error in the rows, or too many shards; nothing was changed.
      BuildError: the folder cannot be made or written.
      OSError: a bucket cannot be read or written.
    """
    same = json.dumps(settings)
    try:
        if NOTE in places.sizes(folder):
            note = json.loads(places.read_bytes(folder / NOTE))
            if note["settings"] == same:
                _tidy(folder)
                return _work(folder, note)
    except (ValueError, KeyError, TypeError, NotADirectoryError):
        pass  # damaged, or no folder: it is made anew
    with _staging(out, folder) as staging:
        table, offsets = row_table.write_table(rows(), staging)
        partition_rows = size(table.rows)
        count = row_table.write_offsets(offsets, partition_rows, staging / OFFSETS)
        if count > MOST_SHARDS:
            least = -(-table.rows // MOST_SHARDS)
            raise BuildError(
                f"--partition_rows {partition_rows}: gives {count:,} shards, more than {MOST_SHARDS:,}; give {least} or more"
            )
        note = {
            "settings": same,
            "rows": table.rows,
            "size": partition_rows,
            "repeated": table.repeated,
            "examples": table.examples,
        }
        places.delete_folder(folder)  # of another CSV or other settings
        if not places.is_remote(folder):
            os.mkdir(folder)
        for name in (TABLE, OFFSETS):
            if places.is_remote(folder):
                places.upload(staging / name, folder / name)
            else:
                os.rename(staging / name, folder / name)
        places.write_text(folder / NOTE, json.dumps(note))
    return _work(folder, note)


def _work(folder: epath.Path, note: dict) -> Work:
    examples = [(name, count) for name, count in note["examples"]]
    return Work(folder, note["rows"], note["size"], note["repeated"], examples)


def _tidy(folder: epath.Path) -> None:
    """Delete what killed workers left; in a bucket nothing is left, as objects appear whole."""
    if places.is_remote(folder):
        return
    for pattern in ("*.partial*", ".*.partial", "*.progress"):
        for leftover in Path(folder).glob(pattern):
            leftover.unlink()


@contextlib.contextmanager
def _staging(out: epath.Path, folder: epath.Path) -> Iterator[Path]:
    """Give a local folder for the table, on the disk of a local `out`. After an error nothing stays that was not there before.

    Raises:
      BuildError: `out` cannot be made or written.
    """
    if places.is_remote(out):
        with Scratch() as scratch:
            yield scratch.path
        return
    staging = Path(folder).with_name(f".{folder.name}.table")
    missing = [path for path in (staging, *staging.parents) if not path.exists()]
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise BuildError(
            f"--out {out}: cannot be created or written ({error.strerror}); choose another folder"
        ) from None
    try:
        yield staging
        staging_made = staging
    except BaseException:
        staging_made = missing[-1] if missing else staging
        raise
    finally:
        shutil.rmtree(staging_made, ignore_errors=True)
