"""Evenly spaced frames of one video file as JPEG, or one clear reason why there are none. PyAV stays here and in `container`.

Decoding runs in a child process (`Reader`) that is kept from clip to clip and killed when a clip takes too long or crashes
it: codec libraries hang and die in C, where no Python time limit reaches.
"""

import contextlib
import io
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import av.logging
import cv2
import numpy as np

from ymplug_jax.data.video_container import (
    FILE_ERRORS,
    MAX_PIXELS,
    Reject,
    count_packets,
    line,
    open_video,
    video_stream,
)

SHORT_SIDE = 256  # pixels of the stored frames; smaller videos stay as they are
JPEG_QUALITY = 90
MAX_BYTES = 8 * 2**30  # of a file
REORDER = 16  # frames that a codec may hold back: time stamps in coding order are at most so many places off

START_LIMIT = 120.0  # seconds for a decoder process to start, on a busy machine
STARTS = 3  # tries to start one
DEATHS = 10  # files in a row that kill the decoder, after which the machine is at fault
# Two frames of 16x16 pixels: a decoder process that cannot read these is broken itself.
KNOWN_GIF = (
    b"GIF89a\x10\x00\x10\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    + b"\x21\xf9\x04\x00\x0a\x00\x00\x00\x2c\x00\x00\x00\x00\x10\x00\x10\x00\x00\x02\x0e\x84\x8f\xa9\xcb\xed\x0f\xa3\x9c\xb4\xda\x8b\xb3>\x05\x00"
    * 2
    + b"\x3b"
)


class DecoderFailed(RuntimeError):
    """The decoder process cannot start, or dies whatever file it reads. The message is one line."""


class Clip(NamedTuple):
    """Stored frames of one video."""

    frames: list[bytes]  # JPEG, all of one size
    timestamps: list[int]  # microseconds from the first frame, never going back
    height: int
    width: int
    decoded: int  # different frames among `frames`


def read_clip(path: str, num_frames: int) -> Clip:
    """`num_frames` frames evenly spaced over those that really decode (the middle of equal intervals); a shorter clip repeats
    its last one. Frames are turned as the file's rotation tag says. Where the picture size changes within the stream, all
    frames are scaled to the size of the first stored one.

    Raises:
      Reject: any reason about the file.
    """
    av.logging.set_level(av.logging.PANIC)
    size = os.path.getsize(path)
    if size == 0:
        raise Reject("empty_file", "zero bytes")
    if size > MAX_BYTES:
        raise Reject("too_large", f"{size:,} bytes, the limit is {MAX_BYTES:,}")
    count = count_packets(path)
    for _ in range(2):  # headers and packet counts lie: the second pass knows how many frames decode
        clip, decoded = _decode(path, num_frames, count)
        if clip is not None:
            return clip
        if decoded == 0:
            raise Reject("unreadable", "no frame decodes")
        count = decoded
    raise Reject("unreadable", "decodes differently every time")


def spaced(num_frames: int, count: int) -> list[int]:
    """Indices of `num_frames` frames among `count`: middles of equal intervals; all and the last one again if there are fewer."""
    if count <= num_frames:
        return [min(i, count - 1) for i in range(num_frames)]
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]


def _decode(path: str, num_frames: int, count: int) -> tuple[Clip | None, int]:
    """(clip, frames decoded), expecting `count` frames; no clip if fewer come."""
    wanted = spaced(num_frames, count)
    last, needed = wanted[-1], set(wanted)
    kept: dict[int, bytes] = {}
    times: list[float | None] = []
    size, enough = None, last + 1
    with open_video(path) as container:
        stream = video_stream(container)
        stream.thread_type = "NONE"  # processes are the parallelism
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for sizes that the header does not tell
        step = 1 / float(stream.average_rate or 25)
        for i, frame in enumerate(_frames(container, stream, last, count)):
            times.append(frame.time)
            if i in needed:
                kept[i], size = _encode(frame, size)
            if i and None not in times[-2:] and times[-1] < times[-2]:
                enough = last + 1 + REORDER  # the times of the last frames come with later frames
            if len(times) >= enough:
                break
    if not needed <= kept.keys():
        return None, len(times)
    line_of_times = timeline(times, step)
    moments = [round(1e6 * line_of_times[i]) for i in wanted]
    return Clip([kept[i] for i in wanted], moments, *size, len(kept)), len(times)


def _frames(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream", last: int, count: int
) -> Iterator["av.VideoFrame"]:
    """Frames in display order; an error behind frame `last` ends them.

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
                detail = f"decoding breaks off after {decoded} of {count} frames: {line(error)}"
                raise Reject("truncated", detail) from None
            raise Reject("unreadable", line(error)) from None
        if frame is None:
            return
        yield frame
        decoded += 1


def timeline(times: Sequence[float | None], step: float) -> list[float]:
    """Seconds from the first frame for frames in display order, never going back.

    Missing times continue at `step` seconds a frame. Where times go back by up to REORDER frames they are in coding order
    (H.264 in AVI): sorted, they are those of the frames as shown. Where they go back further the recording starts again
    (a joined stream): what follows continues one frame after what was there.
    """
    filled: list[float] = []
    for time in times:
        filled.append(time if time is not None else (filled[-1] + step if filled else 0.0))
    forward = [b - a for a, b in zip(filled, filled[1:], strict=False) if b > a]
    gap = statistics.median(forward) if forward else step
    if len(filled) > 1 and not forward:
        return [i * step for i in range(len(filled))]  # all equal: no times at all
    latest, offset, joined = filled[0], 0.0, []
    for time in filled:
        if time + offset < latest - REORDER * gap:
            offset = latest + gap - time
        joined.append(time + offset)
        latest = max(latest, time + offset)
    joined.sort()
    return [time - joined[0] for time in joined]


def _encode(frame: "av.VideoFrame", size: tuple[int, int] | None) -> tuple[bytes, tuple[int, int]]:
    """(JPEG, (height, width)) of one frame, turned upright: scaled to `size`, or its short side to at most SHORT_SIDE.

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
        image = frame.reformat(
            width=width, height=height, format="bgr24", interpolation="AREA" if shrinks else "BILINEAR"
        ).to_ndarray()
    except FILE_ERRORS as error:
        raise Reject("unreadable", line(error)) from None
    if turns:
        image = np.ascontiguousarray(np.rot90(image, turns))
    if max(image.shape) > 65500:
        raise Reject("too_large", f"{image.shape[1]}x{image.shape[0]} pixels: no JPEG is as long")
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    return jpeg, image.shape[:2]


def _serve(pipe: "multiprocessing.connection.Connection") -> None:
    """The child: says that it works, then takes paths and gives clips or reasons."""
    cv2.setNumThreads(0)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            with av.open(io.BytesIO(KNOWN_GIF)) as known:
                for frame in known.decode(video=0):
                    _encode(frame, None)
            pipe.send(("ready",))
        except Exception:
            pipe.send(("bug", traceback.format_exc()))
        while True:
            path, num_frames = pipe.recv()
            try:
                answer = ("clip", tuple(read_clip(path, num_frames)))
            except Reject as reject:
                answer = ("reject", *reject.args)
            except FILE_ERRORS as error:
                answer = ("reject", "unreadable", line(error))
            except Exception:  # a fault of this program: it must not pass for one of the file
                answer = ("bug", traceback.format_exc())
            pipe.send(answer)


class Reader:
    """Reads clips in a child process with a time limit a clip."""

    def __init__(self, time_limit: float):
        self._limit = time_limit
        self._child: multiprocessing.Process | None = None
        self._ready = False
        self._deaths = 0  # files in a row on which the child died

    def read(self, path: Path, num_frames: int) -> Clip:
        """As `read_clip`.

        Raises:
          Reject: any reason, timed_out and a crashed decoder included.
          DecoderFailed: the decoder cannot start, or died on many files in a row.
        """
        answer = self._ask(str(path), num_frames)
        if answer[0] == "died":
            self._deaths += 1
            if self._deaths >= DEATHS:
                raise DecoderFailed(
                    f"the decoder process died on {DEATHS} files in a row ({answer[1]}), last on {path}; is there enough memory?"
                )
            raise Reject("unreadable", f"the decoder crashed on this file ({answer[1]})")
        self._deaths = 0
        if answer[0] == "bug":
            raise RuntimeError(f"a fault of the program, not of {path}:\n{answer[1]}")
        if answer[0] == "reject":
            raise Reject(*answer[1:])
        return Clip(*answer[1])

    def _ask(self, path: str, num_frames: int) -> tuple:
        """The child's answer about one file, or ("died", how)."""
        if self._child is None or not self._child.is_alive() or not self._ready:
            self._begin()
        try:
            self._pipe.send((path, num_frames))
            if not self._pipe.poll(self._limit):
                self.close()
                raise Reject("timed_out", f"no result after {self._limit:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            return "died", self._how_it_died()

    def _begin(self) -> None:
        """A child that has decoded a known clip."""
        how = ""
        for _ in range(STARTS):
            try:
                if self._child is None or not self._child.is_alive():
                    self._start()
                if self._pipe.poll(START_LIMIT):
                    answer = self._pipe.recv()
                    if answer[0] == "bug":
                        self.close()
                        raise RuntimeError(f"the decoder cannot read a clip that is known to be good:\n{answer[1]}")
                    self._ready = True
                    return
                how = f"not ready after {START_LIMIT:g} s"
                self.close()
            except (EOFError, OSError) as error:
                how = self._how_it_died() if self._child is not None else line(error)
        raise DecoderFailed(f"the decoder process cannot start ({how}; {STARTS} tries); is there enough memory?")

    def _how_it_died(self) -> str:
        child = self._child
        child.join(1.0)
        code = child.exitcode
        self.close()
        if code is None:
            return "it closed its pipe"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")  # a fork of a threaded worker could deadlock
        self._pipe, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            child.start()
        finally:
            theirs.close()
        self._child = child

    def close(self) -> None:
        """End the child, at once."""
        self._ready = False
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._pipe.close()
            self._child = None
