"""Evenly spaced frames of one video file as JPEG, or one clear reason why there are none. The only home of PyAV.

Decoding runs in a child process that is kept from clip to clip and killed when a clip takes too long or crashes it: codec
libraries hang and die in C, where no Python time limit reaches.
"""

import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import av
import av.logging
import cv2
import numpy as np

SHORT_SIDE = 256  # pixels of the stored frames; smaller videos stay as they are
JPEG_QUALITY = 90
MIN_SIDE = 16  # pixels; below it there is nothing to see
MAX_PIXELS = 8192 * 4352  # width x height of the source; checked before anything is decoded
MAX_BYTES = 8 * 2**30  # of a file

# reason -> what it means, as printed in the summary
REASONS = {
    "missing_file": "no such file under the video root",
    "empty_file": "zero bytes",
    "not_a_video": "the content is no known video container",
    "no_video_stream": "a container without a picture (audio only)",
    "unreadable": "a video container that cannot be opened or decoded",
    "truncated": "the data breaks off before the end",
    "too_small": f"a side below {MIN_SIDE} pixels",
    "too_large": "more pixels or bytes than the limits",
    "timed_out": "decoding took longer than --time_limit",
    "hostile_path": "an absolute path, or one that leaves the video root",
    "bad_row": "a CSV row whose text cannot be used",
}

# How files begin, to tell a broken video from something else: (offset, bytes).
SIGNATURES = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"free"), (4, b"wide"), (4, b"skip"), (0, b"RIFF"), (0, b"\x1aE\xdf\xa3"), (0, b"FLV"),
    (0, b"\x30\x26\xb2\x75"), (0, b"OggS"), (0, b"GIF8"), (0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3"), (0, b"\x47"), (4, b"\x47"),
)  # fmt: skip


class Reject(Exception):
    """A row that gives no record: `reason` is a key of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Clip(NamedTuple):
    """Stored frames of one video."""

    frames: list[bytes]  # JPEG
    timestamps: list[int]  # microseconds from the first frame
    height: int
    width: int
    decoded: int  # different frames among `frames`


def resolve(video_root: str, name: str) -> Path:
    """The file of a row, certainly inside the video root.

    Raises:
      Reject: hostile_path, missing_file.
    """
    if not name or "\x00" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise Reject("hostile_path", "the FILE column must be a path below the video root, without '..'")
    root = Path(video_root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise Reject("hostile_path", "a link leads outside the video root")
    if not path.is_file():
        raise Reject("missing_file", f"no such file below {video_root}")
    return path


def read_clip(path: str, num_frames: int) -> Clip:
    """`num_frames` frames evenly spaced over those that really decode (the middle of equal intervals); a shorter clip repeats
    its last one. Frames are turned as the file's rotation tag says.

    Raises:
      Reject: any reason about the file.
    """
    av.logging.set_level(av.logging.PANIC)
    size = os.path.getsize(path)
    if size == 0:
        raise Reject("empty_file", "zero bytes")
    if size > MAX_BYTES:
        raise Reject("too_large", f"{size:,} bytes, the limit is {MAX_BYTES:,}")
    count = _count_packets(path)
    for _ in range(2):  # headers and packet counts lie: the second pass knows how many frames decode
        clip, decoded = _decode(path, num_frames, count)
        if clip is not None:
            return clip
        if decoded == 0:
            raise Reject("unreadable", "no frame decodes")
        count = decoded
    raise Reject("unreadable", "decodes differently every time")


def _open(path: str) -> "av.container.InputContainer":
    try:
        # Metadata in other encodings is common and of no use here.
        return av.open(path, metadata_errors="ignore")
    except Exception as error:  # PyAV lets errors of several families through
        with open(path, "rb") as file:
            head = file.read(64)
        if any(head[at : at + len(mark)] == mark for at, mark in SIGNATURES):
            raise Reject("unreadable", _line(error)) from None
        raise Reject("not_a_video", f"begins with {head[:16]!r}") from None


def _stream(container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """The first video stream that is no cover picture, checked for size."""
    for stream in container.streams.video:
        if "attached_pic" in str(stream.disposition):
            continue
        if stream.codec_context is None:
            raise Reject("unreadable", "the header names no codec that exists")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise Reject("too_large", f"{width}x{height} pixels")
        if width and height and min(width, height) < MIN_SIDE:
            raise Reject("too_small", f"{width}x{height} pixels")
        return stream
    raise Reject("no_video_stream", f"streams: {', '.join(s.type for s in container.streams) or 'none'}")


def _count_packets(path: str) -> int:
    """Packets of the video stream, without decoding."""
    with _open(path) as container:
        stream = _stream(container)
        count = 0
        try:
            for packet in container.demux(stream):
                count += bool(packet.size)
        except (av.FFmpegError, UnicodeDecodeError) as error:
            raise Reject("truncated", f"reading breaks off after {count} frames: {_line(error)}") from None
        if count == 0:
            raise Reject("unreadable", "the video stream holds no data")
        return count


def spaced(num_frames: int, count: int) -> list[int]:
    """Indices of `num_frames` frames among `count`: middles of equal intervals; all and the last one again if there are fewer."""
    if count <= num_frames:
        return [min(i, count - 1) for i in range(num_frames)]
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]


def _decode(path: str, num_frames: int, count: int) -> tuple[Clip | None, int]:
    """(clip, frames decoded), expecting `count` frames; no clip if fewer come."""
    wanted = spaced(num_frames, count)
    kept: dict[int, tuple[bytes, int]] = {}
    first_time, shape, decoded = None, (0, 0), 0
    with _open(path) as container:
        stream = _stream(container)
        stream.thread_type = "NONE"  # processes are the parallelism
        stream.thread_count = 1
        frames = container.decode(stream)
        last = wanted[-1]
        needed = set(wanted)
        while decoded <= last:
            try:
                frame = next(frames)
            except StopIteration:
                break
            except Exception as error:
                if decoded:
                    raise Reject(
                        "truncated", f"decoding breaks off after {decoded} of {count} frames: {_line(error)}"
                    ) from None
                raise Reject("unreadable", _line(error)) from None
            seconds = frame.time if frame.time is not None else decoded / float(stream.average_rate or 25)
            first_time = seconds if first_time is None else first_time
            if decoded in needed:
                jpeg, shape = _encode(frame)
                kept[decoded] = (jpeg, max(0, round(1e6 * (seconds - first_time))))
            decoded += 1
    if not needed <= kept.keys():
        return None, decoded
    chosen = [kept[i] for i in wanted]
    return Clip([jpeg for jpeg, _ in chosen], [time for _, time in chosen], *shape, len(kept)), decoded


def _encode(frame: "av.VideoFrame") -> tuple[bytes, tuple[int, int]]:
    """(JPEG, (height, width)) of one frame, short side at most SHORT_SIDE, turned upright."""
    scale = min(1.0, SHORT_SIDE / min(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    image = frame.reformat(
        width=width, height=height, format="bgr24", interpolation="BILINEAR" if scale == 1.0 else "AREA"
    ).to_ndarray()
    if turns := round(frame.rotation / 90) % 4:
        image = np.ascontiguousarray(np.rot90(image, turns))
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    return jpeg, image.shape[:2]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _serve(pipe: "multiprocessing.connection.Connection") -> None:
    """The child: paths in, clips or reasons out."""
    cv2.setNumThreads(0)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            path, num_frames = pipe.recv()
            try:
                pipe.send(tuple(read_clip(path, num_frames)))
            except Reject as reject:
                pipe.send(reject.args)
            except Exception as error:  # one odd file must not end the build
                pipe.send(("unreadable", _line(error)))


class Reader:
    """Reads clips in a child process with a time limit a clip."""

    def __init__(self, time_limit: float):
        self._limit = time_limit
        self._child: multiprocessing.Process | None = None

    def read(self, path: Path, num_frames: int) -> Clip:
        """As `read_clip`.

        Raises:
          Reject: any reason, timed_out and a crashed decoder included.
        """
        if self._child is None or not self._child.is_alive():
            self._start()
        self._pipe.send((str(path), num_frames))
        try:
            if not self._pipe.poll(self._limit):
                self.close()
                raise Reject("timed_out", f"no result after {self._limit:g} s")
            answer = self._pipe.recv()
        except EOFError:
            self.close()
            raise Reject("unreadable", "the decoder crashed on this file") from None
        if len(answer) == 2:
            raise Reject(*answer)
        return Clip(*answer)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a threaded worker could deadlock
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()

    def close(self) -> None:
        """End the child, at once."""
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._pipe.close()
            self._child = None
