"""Video files to records: which files a command names, and their frames in the order of the files.

Several processes decode ahead of the model. At most `AHEAD` decoded clips wait for it, so that memory does not grow with the number of
files.
"""

import contextlib
import os
import queue
import stat
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ymplug_jax.core import place_copies, places
from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.data import video_file
from ymplug_jax.data.records import Record
from ymplug_jax.data.video_file import Clip, Reject

STORED = 16  # frames read from a file, as many as data_prep stores by default; the model takes its own from these
TIME_LIMIT = 120  # seconds to decode one file
AHEAD = 16  # decoded clips that wait for the model, about 0.6 MB each
PATIENCE = 1.0  # seconds that decoded clips wait for the next one to fill their batch
# Reject reasons of files that are not videos. Such a file in a folder is skipped, unless it is named like a video.
NO_VIDEO = ("not_a_video", "no_video_stream", "empty_file")
VIDEO_NAMES = (
    ".mp4", ".flv", ".f4v", ".mkv", ".avi", ".mov", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob", ".m4v",
    ".wmv", ".asf", ".3gp", ".ogv", ".rm", ".rmvb",
)  # fmt: skip


class File(NamedTuple):
    """One file to read."""

    name: str  # as the user gave it, or below the folder that the user gave
    named: bool  # True: the user gave this file; False: it was found in a folder


class Read(NamedTuple):
    """A file and its clip, or the reason why there is none."""

    number: int  # position in the list of files
    file: File
    clip: Clip | Reject


def files_of(names: Sequence[str]) -> list[File]:
    """List the files of `names` in order; a folder stands for all files below it.

    Linked folders are not followed; hidden files and folders (".name") are skipped. The files of a folder are sorted by their path
    below it, part by part, each part by its bytes.

    Raises:
      Mistake: a name is empty, a folder cannot be listed or is empty, or a file is given twice.
    """
    files: list[File] = []
    for name in names:
        if not name:
            raise Mistake("--video: a name is empty; give files or folders")
        place = places.place(name, "--video")
        if places.is_remote(place):
            files += _files_below(str(place))
            continue
        name = str(place) if name.startswith("file://") else name
        files += _files_in(name) if os.path.isdir(name) else [File(name, True)]
    seen: set[str] = set()
    for file in files:
        place = file.name if places.is_remote(file.name) else os.path.abspath(file.name)
        if place in seen:
            raise Mistake(f"--video {file.name}: given twice; give each file once")
        seen.add(place)
    return files


def _files_in(folder: str) -> list[File]:
    def stop(error: OSError) -> None:
        raise Mistake(f"--video {error.filename}: cannot be listed ({error.strerror}); check its permissions")

    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    # A pipe or socket would block the reader. A broken link stays in the list and is reported as a missing file.
    found = [file for file in found if os.path.isfile(file) or not os.path.exists(file)]
    if not found:
        raise Mistake(f"--video {folder}: no files in this folder; give a folder of videos")
    found.sort(key=lambda file: tuple(os.fsencode(part) for part in Path(os.path.relpath(file, folder)).parts))
    return [File(file, False) for file in found]


def _files_below(url: str) -> list[File]:
    """The files of a name in a bucket: of a folder all files below it, sorted as those of a local folder."""
    with place_copies.failing():
        found = places.below(url)
    if "" in found or not found:  # a missing file is reported when it is read
        return [File(url, True)]
    parts = [name.split("/") for name in found]
    return [
        File(f"{url}/{'/'.join(one)}", False) for one in sorted(parts) if not any(part.startswith(".") for part in one)
    ]


def left_out(read: Read) -> bool:
    """Whether to skip a file silently: it was found in a folder, cannot be read, and is not named like a video.

    A file counts as a video by its content, not its name, so subtitles, pictures and notes in a folder cause no errors.
    """
    claims = read.file.name.lower().endswith(VIDEO_NAMES)
    return isinstance(read.clip, Reject) and not read.file.named and read.clip.reason in NO_VIDEO and not claims


def decoders() -> int:
    """Default number of decoding processes: one for each core that this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def read_all(files: Sequence[File], size: int, processes: int) -> Iterator[list[Read]]:
    """Yield the results of all files in order, in lists of at most `size`.

    A list is shorter if the next file takes longer than PATIENCE, so that a file that hangs does not delay the answers about the
    files before it.

    Args:
      files: files to read. Reading starts when the first list is requested.
      size: length of a full list.
      processes: number of decoding processes. Each decodes one file at a time, within TIME_LIMIT seconds.

    Raises:
      PlaceFailed: a decoding process cannot start.
    """
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_work, args=(tasks,), name=f"decoder {i}", daemon=True)
        for i in range(min(processes, len(files)))
    ]
    for thread in threads:
        thread.start()
    waiting: deque[tuple[int, File, Future]] = deque()
    number, done = 0, False
    try:
        while number < len(files) or waiting:
            batch: list[Read] = []
            while len(batch) < size:
                while number < len(files) and len(waiting) < AHEAD + len(threads):
                    future: Future = Future()
                    waiting.append((number, files[number], future))
                    tasks.put((files[number].name, future))
                    number += 1
                if not waiting:
                    break
                place, file, future = waiting[0]
                try:
                    clip = future.result(PATIENCE if batch else None)
                except TimeoutError:
                    break
                waiting.popleft()
                batch.append(Read(place, file, clip))
            yield batch
        done = True
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                tasks.get_nowait()
        for _ in threads:
            tasks.put(None)
        # After an early stop a thread may still be decoding. It is a daemon thread, so that the process does not wait for it.
        for thread in threads if done else ():
            thread.join()


def record_of(clip: Clip, name: str, title: str = "") -> Record:
    """The record of a decoded file, without captions and label."""
    return Record(name, clip.frames, np.array(clip.timestamps, np.int64), title, [], "", -1)


class Reader(video_file.Reader):
    """A reader whose process does not import the program's main file again.

    `multiprocessing` imports it in every process that it spawns. A script that calls the Python API at its top level, without
    `if __name__ == "__main__"`, would then start itself again in each decoder.
    """

    _main = threading.Lock()  # several threads start readers at once

    def _start(self) -> None:
        with self._main:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                super()._start()
            finally:
                sys.modules["__main__"] = main


def _work(tasks: queue.SimpleQueue) -> None:
    """Body of one thread: decode files in a process of its own until the queue yields None."""
    reader = Reader(TIME_LIMIT)
    try:
        while (task := tasks.get()) is not None:
            name, future = task
            try:
                future.set_result(_read(reader, name))
            except PlaceFailed as error:
                future.set_exception(error)
            except (OSError, RuntimeError) as error:  # the decoding process failed, not the file
                future.set_exception(
                    PlaceFailed(
                        f"{name}: the decoding process failed ({error}); free some memory, then run the same command again"
                    )
                )
            except BaseException as error:
                future.set_exception(error)
    finally:
        reader.close()


def _read(reader: Reader, name: str) -> Clip | Reject:
    if places.is_remote(name):
        try:
            with place_copies.failing(), place_copies.local_copy(name, "--video", TIME_LIMIT) as copy:
                return _read(reader, str(copy))
        except FileNotFoundError:
            return Reject("missing_file", "no such file")
        except TimeoutError as error:
            return Reject("timed_out", str(error))
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as error:
        return Reject("missing_file", "no such file" if isinstance(error, FileNotFoundError) else str(error))
    if not stat.S_ISREG(mode):
        return Reject("missing_file", "not a regular file")
    try:
        return reader.read(Path(name), STORED)
    except Reject as reject:
        return reject
