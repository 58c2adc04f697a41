"""Which files are videos: container formats that may be opened, and the streams in them that are moving pictures.

FFmpeg opens far more than videos: it draws text files, follows playlists and lists to other files, and reads single pictures.
So a file is opened only as one of the formats below, and FFmpeg may open nothing but that file.
"""

import os

import av
import av.codec.codec

MIN_SIDE = 16  # pixels; below it there is nothing to see
MAX_PIXELS = 8192 * 4352  # width x height of the source; checked before anything is decoded

# reason -> what it means, as printed in the summary
REASONS = {
    "missing_file": "no such file under the video root",
    "empty_file": "zero bytes",
    "not_a_video": "the content is no known video container",
    "no_video_stream": "a container without a moving picture (sound, perhaps with a cover)",
    "unreadable": "a video container that cannot be opened or decoded",
    "truncated": "the data breaks off before the end",
    "too_small": f"a side below {MIN_SIDE} pixels",
    "too_large": "more pixels or bytes than the limits",
    "timed_out": "decoding took longer than --time_limit",
    "hostile_path": "an absolute path, or one that leaves the video root",
    "bad_row": "a CSV row whose text cannot be used",
    "unknown_label": "a label that is none of the class names",
}

# FFmpeg's names of demuxers. Containers of moving pictures, and raw streams that cameras and recorders write. Animated GIF
# and APNG are among them (clips in the wild are often GIFs); a GIF or PNG of one picture is not.
VIDEO_FORMATS = (
    "mov", "matroska", "avi", "flv", "live_flv", "mpegts", "mpeg", "mpegvideo", "asf", "ogg", "rm", "gif", "apng",
    "h261", "h263", "h264", "hevc", "vvc", "m4v", "av1", "obu", "ivf", "cavsvideo", "avs2", "avs3", "vc1", "dv", "mxf", "gxf",
    "nut", "nuv", "nsv", "wtv", "yuv4mpegpipe", "kux",
)  # fmt: skip
# Containers of sound, opened to say so. A picture in them is a cover, whatever its disposition says.
SOUND_FORMATS = (
    "mp3", "wav", "w64", "flac", "aac", "ac3", "eac3", "dts", "amr", "ape", "aiff", "au", "caf", "tak", "tta", "wv", "mpc", "mpc8",
)  # fmt: skip
OPTIONS = {"format_whitelist": ",".join(VIDEO_FORMATS + SOUND_FORMATS), "protocol_whitelist": "file"}

# Bits of AVStream.disposition (PyAV's enum differs from version to version) that mark something else than the main video:
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
)  # HEIF files of one picture, inside the MP4 container

# How files begin, to tell a broken video from something else: (offset, bytes).
SIGNATURES = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"free"), (4, b"wide"), (4, b"skip"), (8, b"AVI "), (0, b"\x1aE\xdf\xa3"), (0, b"FLV"),
    (0, b"\x30\x26\xb2\x75"), (0, b"OggS"), (0, b"GIF8"), (0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3"), (0, b".RMF"),
)  # fmt: skip
TS_PACKETS = (
    (0, 188),
    (4, 196),
    (0, 204),
)  # offsets of the first two packets of a transport stream; each begins with 0x47

# Errors that speak of the file. Anything else is a fault of this program, and must not pass for a broken video.
FILE_ERRORS = (av.FFmpegError, av.codec.codec.UnknownCodecError, UnicodeError, OSError, MemoryError)
# PyAV 19 keeps metadata that is not UTF-8 as surrogates; before, it raised UnicodeDecodeError unless told not to.
METADATA = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class Reject(Exception):
    """A row that gives no record: `reason` is a key of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def line(error: BaseException) -> str:
    """An error in one printable line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return text.encode("utf-8", "replace").decode("utf-8")  # names and metadata may hold surrogates


def open_video(path: str) -> "av.container.InputContainer":
    """The file, opened as a container of moving pictures.

    Raises:
      Reject: not_a_video, no_video_stream, unreadable.
    """
    try:
        # The prefix keeps names such as "concat:a.mp4" from being read as a protocol.
        container = av.open(f"file:{os.path.abspath(path)}", container_options=OPTIONS, **METADATA)
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
        raise Reject("not_a_video", f"a picture (HEIF, brand {brand!r})")
    if set(names) & set(SOUND_FORMATS):
        container.close()
        raise Reject("no_video_stream", f"a file of sound ({container.format.name})")
    return container


def video_stream(container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """The first stream of moving pictures, checked for size.

    Raises:
      Reject: no_video_stream, unreadable, too_large, too_small.
    """
    for stream in container.streams.video:
        if stream.disposition.value & NOT_MOVING:
            continue
        if stream.codec_context is None:
            raise Reject("unreadable", "the header names no codec that exists")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise Reject("too_large", f"{width}x{height} pixels")
        if width and height and min(width, height) < MIN_SIDE:
            raise Reject("too_small", f"{width}x{height} pixels")
        return stream
    kinds = ("a cover or still picture" if s.type == "video" else s.type for s in container.streams)
    raise Reject("no_video_stream", f"streams: {', '.join(kinds) or 'none'}")


def count_packets(path: str) -> int:
    """Packets of the video stream, without decoding.

    Raises:
      Reject: as `open_video` and `video_stream`; truncated; not_a_video or no_video_stream for a single picture.
    """
    with open_video(path) as container:
        stream = video_stream(container)
        count = 0
        try:
            for packet in container.demux(stream):
                count += bool(packet.size)
        except FILE_ERRORS as error:
            raise Reject("truncated", f"reading breaks off after {count} frames: {line(error)}") from None
        if count == 0:
            raise Reject("unreadable", "the video stream holds no data")
        codec = stream.codec_context.name
        if count == 1 and codec in PICTURE_CODECS:
            sound = len(container.streams.audio) > 0
            raise Reject("no_video_stream" if sound else "not_a_video", f"a single picture ({codec})")
        return count
