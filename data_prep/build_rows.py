"""First step of a build: the rows to build, all of the CSV or those of a part, and the work folder with their table."""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from data_prep import part_rows, work_folder
from data_prep.archives import Tar, Zip
from data_prep.conversations import Talk
from data_prep.part_rows import PartRows
from data_prep.parts import rows_name, taken_rows
from data_prep.publish import frames_of
from data_prep.rows import Row
from data_prep.videos import open_videos
from data_prep.work_folder import Work
from ymplug_jax.core import places
from ymplug_jax.data import schema

ARCHIVE_INDEX = "members.npy"  # in the work folder: index of a .tar, which the workers read


def absolute(path: epath.Path) -> str:
    """Return a place as workers with another working directory find it."""
    return os.fspath(path) if places.is_remote(path) else os.path.abspath(path)


def open_rows(
    args: argparse.Namespace,
    split: str,
    folder: epath.Path,
    facts: dict,
    rows: Callable[[], Iterator[Row] | Iterator[Talk]],
) -> tuple[Work, str, dict[str, str]]:
    """Select the rows of a part, if it is one, and prepare the work folder.

    Args:
      args: flags, checked.
      split: split to build.
      folder: the work folder.
      facts: settings of the build.
      rows: gives all rows of the CSV, again at each call.

    Returns:
      (work folder, file of the index of a .tar or "", further files to publish). The rows of a part are added to `facts`.

    Raises:
      BuildError, ValueError: the rows, the part or the archive cannot be used.
      OSError: a place cannot be read or written.
    """
    part = None
    files: dict[str, str] = {}
    select: Callable[[], Iterable[Row | Talk]] = rows
    with contextlib.closing(open_videos(args.video_root, args.allow_links_to, args.time_limit)) as videos:
        if isinstance(videos, Tar | Zip) and videos.skipped:
            print(
                f"{args.video_root}: {len(videos.skipped):,} members are left out (links, absolute names, names with '..'), "
                f"the first is {videos.skipped[0]}",
                file=sys.stderr,
            )
        if args.part:
            known = {"schema_version": schema.SCHEMA_VERSION, "kind": args.config, "frames": frames_of(args.num_frames)}
            classes = {"classes": facts["classes"]} if "classes" in facts else {}
            taken = taken_rows(args.whole, args.part, split, {**known, **classes, "splits": {split: facts}})
            part = PartRows(rows(), videos, taken, texts=args.with_text_rows)
            part.check(args.part, str(args.video_root))
            facts.update(part.facts())
            select = functools.partial(_selected, part, rows)
            files[part_rows.FILE] = rows_name(split)
        roots = [absolute(path) for path in (args.video_root, *args.allow_links_to)]
        settings = {**facts, "places": roots, "time_limit": args.time_limit}
        work = work_folder.open_work(
            args.out,
            folder,
            settings,
            select,
            lambda count: args.partition_rows or work_folder.default_size(count, args.num_frames),
        )
        if part is not None:
            part.save(work.folder)
        if isinstance(videos, Tar):
            videos.save_index(work.folder / ARCHIVE_INDEX)
            return work, absolute(work.folder / ARCHIVE_INDEX), files
    return work, "", files


def _selected(part: PartRows, rows: Callable[[], Iterator[Row] | Iterator[Talk]]) -> Iterator[Row | Talk]:
    return part.select(rows())
