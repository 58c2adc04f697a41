"""Extraction of evenly spaced frames from a video file as JPEG. Only this module and `video_container` use PyAV.

Decoding runs in a child process (`Reader`), which is reused for all clips and killed if a clip exceeds the time limit: codec
libraries can hang or crash in C code, which a time limit in Python cannot interrupt.
"""

import contextlib
import io
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.logging
import cv2
import numpy as np

from ymplug_jax.data.still_file import read_still
from ymplug_jax.data.video_container import (
    FILE_ERRORS,
    MAX_PIXELS,
    Reject,
    count_packets,
    line,
    open_video,
    video_stream,
)

SHORT_SIDE = 256  # pixels of the stored frames; smaller videos are not enlarged
JPEG_QUALITY = 90
MAX_BYTES = 8 * 2**30  # maximum file size
REORDER = 16  # maximum reordering of a codec: timestamps in coding order are at most this many positions off

START_LIMIT = 120.0  # seconds for a decoder process to start; generous for a busy machine
STARTS = 3  # attempts to start a decoder process
DEATHS = 10  # consecutive files on which the decoder crashes before the machine is assumed to be at fault
# A valid clip of two frames, 16x16 pixels. A decoder process that cannot read it does not work.
KNOWN_GIF = (
    b"GIF89a\x10\x00\x10\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    + b"\x21\xf9\x04\x00\x0a\x00\x00\x00\x2c\x00\x00\x00\x00\x10\x00\x10\x00\x00\x02\x0e\x84\x8f\xa9\xcb\xed\x0f\xa3\x9c\xb4\xda\x8b\xb3>\x05\x00"
    * 2
    + b"\x3b"
)


class DecoderFailed(RuntimeError):
    """The decoder process cannot start, or crashes on every file. The message is one line."""


class Clip(NamedTuple):
    """Stored frames of one video."""

    frames: list[bytes]  # JPEG, all of the same size
    timestamps: list[int]  # microseconds from the first frame, non-decreasing
    height: int
    width: int
    decoded: int  # number of distinct frames in `frames`


def read_clip(path: str, num_frames: int) -> Clip:
    """Read `num_frames` frames, evenly spaced over the frames that decode (the middle of equal intervals).

    A shorter clip repeats its last frame. Frames are rotated by the file's rotation tag. If the picture size changes within the
    stream, all frames are scaled to the size of the first stored one.

    Raises:
      Reject: the file is unusable, for any reason about the file itself.
    """
    av.logging.set_level(av.logging.PANIC)
    size = os.path.getsize(path)
    if size == 0:
        raise Reject("empty_file", "zero bytes")
    if size > MAX_BYTES:
        raise Reject("too_large", f"{size:,} bytes; the limit is {MAX_BYTES:,}")
    count = count_packets(path)
    for _ in range(2):  # packet counts may be wrong; the second pass uses the number of frames that decoded
        clip, decoded = _decode(path, num_frames, count)
        if clip is not None:
            return clip
        if decoded == 0:
            raise Reject("unreadable", "no frame decodes")
        count = decoded
    raise Reject("unreadable", "the number of frames differs between two decodings")


def read_image(path: str) -> Clip:
    """Read a still image as a clip of one frame. Raises Reject: the file is unusable."""
    jpeg, height, width = read_still(path, SHORT_SIDE, JPEG_QUALITY, MAX_BYTES)
    return Clip([jpeg], [0], height, width, 1)


def spaced(num_frames: int, count: int) -> list[int]:
    """Return indices of `num_frames` frames among `count`: middles of equal intervals, or all with the last one repeated."""
    if count <= num_frames:
        return [min(i, count - 1) for i in range(num_frames)]
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]


def _decode(path: str, num_frames: int, count: int) -> tuple[Clip | None, int]:
    """Return (clip, number of frames decoded). The clip is None if too few of the expected `count` frames decode."""
    wanted = spaced(num_frames, count)
    last, needed = wanted[-1], set(wanted)
    kept: dict[int, bytes] = {}
    times: list[float | None] = []
    size: tuple[int, int] | None = None
    enough = last + 1
    with open_video(path) as container:
        stream = video_stream(container)
        stream.thread_type = "NONE"  # decoding is parallel over processes
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for sizes missing in the header
        step = 1 / float(stream.average_rate or 25)
        for i, frame in enumerate(_frames(container, stream, last, count)):
            times.append(frame.time)
            if i in needed:
                kept[i], size = _encode(frame, size)
            before, now = times[-2:] if i else (None, None)
            if before is not None and now is not None and now < before:
                enough = last + 1 + REORDER  # timestamps in coding order: those of the last frames follow later
            if len(times) >= enough:
                break
    if size is None or not needed <= kept.keys():
        return None, len(times)
    line_of_times = timeline(times, step)
    moments = [round(1e6 * line_of_times[i]) for i in wanted]
    return Clip([kept[i] for i in wanted], moments, *size, len(kept)), len(times)


def _frames(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream", last: int, count: int
) -> Iterator["av.VideoFrame"]:
    """Yield frames in display order. An error after frame `last` ends the iteration.

    Raises:
      Reject: unreadable, truncated.
    """
    frames, decoded = container.decode(stream), 0
    while True:
        try:
            frame = next(frames, None)
        except FILE_ERRORS as error:
            if decoded > last:
                return
            if decoded:
                detail = f"decoding stops after {decoded} of {count} frames: {line(error)}"
                raise Reject("truncated", detail) from None
            raise Reject("unreadable", line(error)) from None
        if frame is None:
            return
        yield frame
        decoded += 1


def timeline(times: Sequence[float | None], step: float) -> list[float]:
    """Return non-decreasing times in seconds from the first frame, for frames in display order.

    Missing times continue at `step` seconds per frame. Times that go back by up to REORDER frames are in coding order (H.264 in
    AVI), so sorting gives the display times. Times that go back further mark a concatenated recording, which continues one frame
    after the previous part.

    Args:
      times: timestamps in seconds; None if missing.
      step: duration of a frame in seconds.
    """
    filled: list[float] = []
    for time in times:
        filled.append(time if time is not None else (filled[-1] + step if filled else 0.0))
    forward = [b - a for a, b in pairwise(filled) if b > a]
    gap = statistics.median(forward) if forward else step
    if len(filled) > 1 and not forward:
        return [i * step for i in range(len(filled))]  # all equal, so the file has no usable times
    latest, offset, joined = filled[0], 0.0, []
    for time in filled:
        if time + offset < latest - REORDER * gap:
            offset = latest + gap - time
        joined.append(time + offset)
        latest = max(latest, time + offset)
    joined.sort()
    return [time - joined[0] for time in joined]


def _encode(frame: "av.VideoFrame", size: tuple[int, int] | None) -> tuple[bytes, tuple[int, int]]:
    """Return (JPEG, (height, width)) of a frame, rotated upright and scaled to `size`; None: short side at most SHORT_SIDE.

    Raises:
      Reject: unreadable, too_large.
    """
    if not frame.width or not frame.height or frame.format is None:
        raise Reject("unreadable", "a frame without a picture")
    turns = round(frame.rotation / 90) % 4
    scale = min(1.0, SHORT_SIDE / min(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    if size is not None:
        height, width = size if turns % 2 == 0 else size[::-1]
    shrinks = width * height < frame.width * frame.height
    try:
        image: np.ndarray = frame.reformat(
            width=width, height=height, format="bgr24", interpolation="AREA" if shrinks else "BILINEAR"
        ).to_ndarray()
    except FILE_ERRORS as error:
        raise Reject("unreadable", line(error)) from None
    if turns:
        image = np.ascontiguousarray(np.rot90(image, turns))
    if max(image.shape) > 65500:
        raise Reject("too_large", f"{image.shape[1]}x{image.shape[0]} pixels; a JPEG has at most 65500")
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    return jpeg, (image.shape[0], image.shape[1])


def _serve(pipe: "multiprocessing.connection.Connection") -> None:
    """Run the child process: decode a known clip, report readiness, then answer calls with values or reject reasons."""
    cv2.setNumThreads(0)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            with av.open(io.BytesIO(KNOWN_GIF), "r") as known:
                for frame in known.decode(video=0):
                    _encode(frame, None)
            pipe.send(("ready",))
        except Exception:
            pipe.send(("bug", traceback.format_exc()))
        while True:
            answer: tuple[object, ...]
            try:
                function, arguments = pipe.recv()
                answer = ("value", function(*arguments))
            except Reject as reject:
                answer = ("reject", *reject.args)
            except FILE_ERRORS as error:
                answer = ("reject", "unreadable", line(error))
            except Exception:  # a bug of this program must not count as a damaged file
                answer = ("bug", traceback.format_exc())
            pipe.send(answer)


class Reader:
    """Reads clips, or runs any function of a file, in a child process, with a time limit per file in seconds."""

    def __init__(self, time_limit: float):
        self._limit = time_limit
        self._child: multiprocessing.process.BaseProcess | None = None
        self._ready = False
        self._deaths = 0  # consecutive files on which the child died

    def read(self, path: Path, num_frames: int, *, still: bool = False) -> Clip:
        """Read a clip as `read_clip` does, or a still image as `read_image` does.

        Raises:
          Reject: any reason, including timed_out and a crash of the decoder.
          DecoderFailed: the decoder cannot start, or crashed on many consecutive files.
        """
        clip: Clip = self.ask(read_image, path) if still else self.ask(read_clip, path, num_frames)
        return clip

    def ask(self, function: Callable[..., Any], path: Path, *arguments: Any) -> Any:
        """Return `function(str(path), *arguments)`, computed in the child process.

        Args:
          function: a function of a module; it may raise Reject, and its errors of FILE_ERRORS mean an unreadable file.
          path: the file.
          *arguments: further arguments. They and the result are pickled. Errors are those of `read`.
        """
        answer = self._ask(function, (str(path), *arguments))
        if answer[0] == "died":
            self._deaths += 1
            if self._deaths >= DEATHS:
                raise DecoderFailed(
                    f"the decoder process died on {DEATHS} consecutive files ({answer[1]}), last on {path}; check that there is enough memory"
                )
            raise Reject("unreadable", f"the decoder crashed on the file ({answer[1]})")
        self._deaths = 0
        if answer[0] == "bug":
            raise RuntimeError(f"a bug in reading {path}, not a damaged file:\n{answer[1]}")
        if answer[0] == "reject":
            raise Reject(*answer[1:])
        return answer[1]

    def _ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the child's answer for a file, or ("died", reason)."""
        if self._child is None or not self._child.is_alive() or not self._ready:
            self._begin()
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(self._limit):
                self.close()
                raise Reject("timed_out", f"no result after {self._limit:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            return "died", self._how_it_died()

    def _begin(self) -> None:
        """Start a child, if necessary, and wait until it has decoded the known clip."""
        how = ""
        for _ in range(STARTS):
            try:
                if self._child is None or not self._child.is_alive():
                    self._start()
                if self._pipe.poll(START_LIMIT):
                    answer = self._pipe.recv()
                    if answer[0] == "bug":
                        self.close()
                        raise RuntimeError(
                            f"the decoder cannot read the built-in test clip; reinstall av and opencv:\n{answer[1]}"
                        )
                    self._ready = True
                    return
                how = f"not ready after {START_LIMIT:g} s"
                self.close()
            except (EOFError, OSError) as error:
                how = self._how_it_died() or line(error)
        raise DecoderFailed(
            f"the decoder process cannot start ({how}; {STARTS} tries); check that there is enough memory"
        )

    def _how_it_died(self) -> str:
        """Describe how the child ended; "" if there was none."""
        child = self._child
        if child is None:
            return ""
        child.join(1.0)
        code = child.exitcode
        self.close()
        if code is None:
            return "it closed its pipe"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")  # forking a process with threads could deadlock
        self._pipe, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            child.start()
        finally:
            theirs.close()
        self._child = child

    def close(self) -> None:
        """Kill the child process."""
        self._ready = False
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._pipe.close()
            self._child = None
