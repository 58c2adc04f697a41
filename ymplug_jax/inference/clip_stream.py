"""Video files on their way to a model: which files a command means, and their frames in the order of the files.

Frames are read ahead by several decoding processes, and at most `AHEAD` clips more than are being decoded wait for the model:
memory does not grow with the number of files.
"""

import contextlib
import os
import queue
import stat
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.data.video_file import Clip, Reader, Reject

STORED = 16  # frames that data_prep stores by default, from which a model takes its own
TIME_LIMIT = 120  # seconds for one file
AHEAD = 16  # clips that wait decoded, about 0.6 MB each
PATIENCE = 1.0  # seconds that clips which are ready wait for others to fill their batch
# Why a file in a folder is left out rather than reported, unless its name claims to be a video.
NO_VIDEO = ("not_a_video", "no_video_stream", "empty_file")
VIDEO_NAMES = (
    ".mp4", ".flv", ".f4v", ".mkv", ".avi", ".mov", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob", ".m4v",
    ".wmv", ".asf", ".3gp", ".ogv", ".rm", ".rmvb",
)  # fmt: skip


class File(NamedTuple):
    """One file to read."""

    name: str  # as the user gave it, or joined to the folder that the user gave
    named: bool  # given itself, not found in a folder


class Read(NamedTuple):
    """What came of one file."""

    number: int  # its place in the list of files
    file: File
    clip: Clip | Reject


def files_of(names: Sequence[str]) -> list[File]:
    """The files given, and all files in the folders given, in the order of `names`.

    A folder is walked without following linked folders; hidden files and folders (".name") are left out. Its files are sorted
    by their path below the folder, part by part, each part by its bytes.

    Raises:
      Mistake: an empty name, a folder that cannot be listed or holds no files, or a file that is given twice.
    """
    files: list[File] = []
    for name in names:
        if not name:
            raise Mistake("--video: an empty name; give files or folders")
        files += _files_in(name) if os.path.isdir(name) else [File(name, True)]
    seen: set[str] = set()
    for file in files:
        place = os.path.abspath(file.name)
        if place in seen:
            raise Mistake(f"--video: {file.name} is given twice; give each file once")
        seen.add(place)
    return files


def _files_in(folder: str) -> list[File]:
    def stop(error: OSError) -> None:
        raise Mistake(f"{error.filename}: cannot list this folder ({error.strerror}); change its permissions")

    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    # A pipe or socket would block its reader. A link that leads nowhere is reported as a file that is missing.
    found = [file for file in found if os.path.isfile(file) or not os.path.exists(file)]
    if not found:
        raise Mistake(f"{folder}: no files in this folder; give a folder of videos")
    found.sort(key=lambda file: tuple(os.fsencode(part) for part in Path(os.path.relpath(file, folder)).parts))
    return [File(file, False) for file in found]


def left_out(read: Read) -> bool:
    """Whether a file that gave no clip is no video at all, and was only met in a folder: subtitles, pictures, notes.

    The reader decides what is a video. A file that fails and is named like a video is an error all the same.
    """
    claims = read.file.name.lower().endswith(VIDEO_NAMES)
    return isinstance(read.clip, Reject) and not read.file.named and read.clip.reason in NO_VIDEO and not claims


def decoders() -> int:
    """How many processes decode: one a core that this process may use, eight at most."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def read_all(files: Sequence[File], size: int, processes: int) -> Iterator[list[Read]]:
    """What came of every file, in order, in lists of `size` at most.

    A list is shorter where the next file takes longer than PATIENCE: a file that hangs does not delay answers about
    the files before it.

    Args:
      files: to read; nothing is read before the first list is asked for.
      size: of a full list.
      processes: that decode, each with one file at a time and TIME_LIMIT seconds for it.
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
        # Stopped early, a thread may be inside a file; it ends with the process, which does not wait for it.
        for thread in threads if done else ():
            thread.join()


def _work(tasks: queue.SimpleQueue) -> None:
    """One thread: hands files to its own decoding process until it is given None."""
    reader = Reader(TIME_LIMIT)
    try:
        while (task := tasks.get()) is not None:
            name, future = task
            try:
                future.set_result(_read(reader, name))
            except (OSError, RuntimeError) as error:  # of the decoding process, not of the file
                future.set_exception(
                    PlaceFailed(f"{name}: the decoding process failed ({error}); look for free memory and run it again")
                )
            except BaseException as error:
                future.set_exception(error)
    finally:
        reader.close()


def _read(reader: Reader, name: str) -> Clip | Reject:
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
