"""Progress of a build over all rows."""

import threading
from pathlib import Path

from tqdm import tqdm

from data_prep.flags import Ticks, bar
from data_prep.part_files import finished
from data_prep.work_folder import Work
from ymplug_jax.core import places

LOCAL_SECONDS, BUCKET_SECONDS = 2.0, 60.0  # between two looks into the work folder


class Progress:
    """Shows progress over all rows, from the files of finished partitions and, on a local disk, small files of those in work."""

    def __init__(self, work: Work, what: str = "build"):
        self._work, self._what, self._end = work, what, threading.Event()
        self._seconds = BUCKET_SECONDS if places.is_remote(work.folder) else LOCAL_SECONDS

    def __enter__(self) -> "Progress":
        total = self._work.rows
        self._bar: tqdm[None] = bar(None, self._what, "clip", total=total, initial=self._count(), mininterval=0.5)
        self._ticks = Ticks(self._what, "clip", total)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._bar.close()

    def _watch(self) -> None:
        while not self._end.wait(self._seconds):
            count = self._count()
            if self._bar.disable:
                self._ticks.tell(count)
            else:
                self._bar.update(count - self._bar.n)

    def _count(self) -> int:
        try:
            parts, _, files = finished(self._work.folder)
        except OSError:  # the build itself reports it
            return 0
        count = min(len(parts) * self._work.size, self._work.rows)
        for name in files:
            if name.endswith(".progress") and not places.is_remote(self._work.folder):
                try:
                    count += int((Path(self._work.folder) / name).read_text() or 0)
                except (FileNotFoundError, ValueError):  # the partition is complete, or being written
                    continue
        return count
