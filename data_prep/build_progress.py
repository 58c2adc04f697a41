"""Progress of a build over all rows."""

import threading
from pathlib import Path

from tqdm import tqdm

from data_prep.flags import Ticks, bar


class Progress:
    """Shows progress over all rows, from the small files that the partitions write."""

    def __init__(self, work: Path, parts: list):
        self._work, self._parts, self._end = work, parts, threading.Event()

    def __enter__(self) -> "Progress":
        total = sum(map(len, self._parts))
        self._bar: tqdm[None] = bar(None, "build", "clip", total=total, initial=self._count(), mininterval=0.5)
        self._ticks = Ticks("build", "clip", total)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._update()
        self._bar.close()

    def _watch(self) -> None:
        while not self._end.wait(0.5):
            self._update()

    def _update(self) -> None:
        count = self._count()
        if self._bar.disable:
            self._ticks.tell(count)
        else:
            self._bar.update(count - self._bar.n)

    def _count(self) -> int:
        count = sum(len(self._parts[int(p.stem[5:])]) for p in self._work.glob("part-*.json"))
        for path in self._work.glob("part-*.progress"):
            try:
                count += int(path.read_text() or 0)
            except (FileNotFoundError, ValueError):  # just renamed, or being written
                continue
        return count
