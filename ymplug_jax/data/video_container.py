"""Selection of video files: allowed container formats, and the video stream in a container.

FFmpeg opens more than videos: it renders text files, follows playlists to other files and reads still images. Files are therefore
opened only as one of the formats below, and FFmpeg may not open any other file.
"""

import os
from typing import Any

import av
import av.codec.codec

MIN_SIDE = 16  # pixels; smaller videos are rejected
MAX_PIXELS = 8192 * 4352  # width x height of the source, checked before decoding

# reject reason -> explanation in the printed summary
REASONS = {
    "missing_file": "the file does not exist below the video root",
    "empty_file": "the file has zero bytes",
    "not_a_video": "the content is not a known video container",
    "not_an_image": "the content is not a still image of a known format",
    "no_video_stream": "the container has no video, only audio or cover art",
    "unreadable": "the video or image cannot be opened or decoded",
    "truncated": "the data ends before the end of the video or image",
    "too_small": f"width or height is below {MIN_SIDE} pixels",
    "too_large": "the picture or the file is larger than the limit",
    "timed_out": "decoding took longer than --time_limit",
    "hostile_path": "the path is absolute or leads outside the video root",
    "bad_row": "the row has invalid text, or its fields are wrong in number or type",
    "unknown_label": "the label is not among the class names",
}

# FFmpeg demuxers of video containers and of raw streams written by cameras and recorders. Animated GIF and APNG are allowed,
# since clips on the web are often GIFs; a GIF or PNG with a single picture is rejected.
VIDEO_FORMATS = (
    "mov", "matroska", "avi", "flv", "live_flv", "mpegts", "mpeg", "mpegvideo", "asf", "ogg", "rm", "gif", "apng",
    "h261", "h263", "h264", "hevc", "vvc", "m4v", "av1", "obu", "ivf", "cavsvideo", "avs2", "avs3", "vc1", "dv", "mxf", "gxf",
    "nut", "nuv", "nsv", "wtv", "yuv4mpegpipe", "kux",
)  # fmt: skip
# Audio containers, opened only for a precise reject reason. A picture in them is cover art, whatever its disposition says.
SOUND_FORMATS = (
    "mp3", "wav", "w64", "flac", "aac", "ac3", "eac3", "dts", "amr", "ape", "aiff", "au", "caf", "tak", "tta", "wv", "mpc", "mpc8",
)  # fmt: skip
OPTIONS = {"format_whitelist": ",".join(VIDEO_FORMATS + SOUND_FORMATS), "protocol_whitelist": "file"}

# Bits of AVStream.disposition of streams other than the main video (numeric, as PyAV's enum differs between versions):
# attached_pic, timed_thumbnails, dependent (a layer of another stream), still_image.
NOT_MOVING = 1 << 10 | 1 << 11 | 1 << 19 | 1 << 20
PICTURE_CODECS = ("mjpeg", "png", "apng", "gif", "bmp", "tiff", "webp", "jpeg2000", "jpegls", "jpegxl", "ppm", "targa")
PICTURE_BRANDS = (
    "avif",
    "mif1",
    "heic",
    "heix",
    "heim",
    "heis",
    "jpeg",
)  # HEIF still images, which use the MP4 container

# Signatures (offset, bytes) of video files, to tell a damaged video from another kind of file.
SIGNATURES = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"free"), (4, b"wide"), (4, b"skip"), (8, b"AVI "), (0, b"\x1aE\xdf\xa3"), (0, b"FLV"),
    (0, b"\x30\x26\xb2\x75"), (0, b"OggS"), (0, b"GIF8"), (0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3"), (0, b".RMF"),
)  # fmt: skip
TS_PACKETS = (
    (0, 188),
    (4, 196),
    (0, 204),
)  # offsets of the first two packets of a transport stream, which begin with 0x47

# Errors caused by the file. Any other error is a bug of this program and must not count as a damaged video.
FILE_ERRORS = (av.FFmpegError, av.codec.codec.UnknownCodecError, UnicodeError, OSError, MemoryError)
# PyAV 19 decodes metadata that is not UTF-8 to surrogates; older versions raise UnicodeDecodeError by default.
METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class Reject(Exception):
    """A row that yields no record. `reason` is a key of REASONS; `detail` explains this case."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def line(error: BaseException) -> str:
    """Format an error in one printable line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return text.encode("utf-8", "replace").decode("utf-8")  # names and metadata may contain surrogates


def open_video(path: str) -> "av.container.InputContainer":
    """Open a file as a video container.

    Raises:
      Reject: not_a_video, no_video_stream, unreadable.
    """
    try:
        # With the prefix, FFmpeg does not parse names such as "concat:a.mp4" as a protocol.
        container = av.open(f"file:{os.path.abspath(path)}", "r", container_options=OPTIONS, **METADATA)
    except FILE_ERRORS as error:
        with open(path, "rb") as file:
            head = file.read(256)
        marked = any(head[at : at + len(mark)] == mark for at, mark in SIGNATURES)
        marked = marked or any(head[a : a + 1] == head[b : b + 1] == b"\x47" for a, b in TS_PACKETS)
        if marked and "whitelist" not in str(error):
            raise Reject("unreadable", line(error)) from None
        raise Reject("not_a_video", f"begins with {head[:16]!r}") from None
    names = container.format.name.split(",")
    brand = container.metadata.get("major_brand", "")
    if "mov" in names and brand in PICTURE_BRANDS:
        container.close()
        raise Reject("not_a_video", f"a still image (HEIF, brand {brand!r})")
    if set(names) & set(SOUND_FORMATS):
        container.close()
        raise Reject("no_video_stream", f"an audio file ({container.format.name})")
    return container


def video_stream(container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """Return the first video stream, after checking its size.

    Raises:
      Reject: no_video_stream, unreadable, too_large, too_small.
    """
    for stream in container.streams.video:
        if stream.disposition.value & NOT_MOVING:
            continue
        if stream.codec_context is None:
            raise Reject("unreadable", "the header names no known codec")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise Reject("too_large", f"{width}x{height} pixels")
        if width and height and min(width, height) < MIN_SIDE:
            raise Reject("too_small", f"{width}x{height} pixels")
        return stream
    kinds = ("cover art or still image" if s.type == "video" else s.type for s in container.streams)
    raise Reject("no_video_stream", f"streams: {', '.join(kinds) or 'none'}")


def count_packets(path: str) -> int:
    """Count the packets of the video stream, without decoding.

    Raises:
      Reject: as `open_video` and `video_stream`; truncated; not_a_video or no_video_stream if there is a single picture.
    """
    with open_video(path) as container:
        stream = video_stream(container)
        count = 0
        try:
            for packet in container.demux(stream):
                count += bool(packet.size)
        except FILE_ERRORS as error:
            raise Reject("truncated", f"reading stops after {count} frames: {line(error)}") from None
        if count == 0:
            raise Reject("unreadable", "the video stream holds no data")
        codec = stream.codec_context.name
        if count == 1 and codec in PICTURE_CODECS:
            sound = len(container.streams.audio) > 0
            raise Reject("no_video_stream" if sound else "not_a_video", f"a single picture ({codec})")
        return count
