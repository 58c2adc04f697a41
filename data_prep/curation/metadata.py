"""The first stage of a curation: duration, picture size and container, from the packets of a file, without decoding it."""

import av.logging

from data_prep.curation.settings import Metadata, Scores
from ymplug_jax.data.video_container import FILE_ERRORS, Reject, line, open_video, video_stream
from ymplug_jax.data.video_container import REASONS as UNUSABLE
from ymplug_jax.data.video_file import timeline

# Reason -> meaning. What no reader can use keeps the reasons of the shard builder; the others are thresholds.
REASONS = {
    name: UNUSABLE[name]
    for name in ("missing_file", "empty_file", "not_a_video", "no_video_stream", "unreadable", "too_small", "too_large", "hostile_path")
} | {
    "timed_out": "reading the container took longer than the limit",
    "container": "the container is none of the accepted formats",
    "duration": "the clip is shorter or longer than the limits",
    "resolution": "width or height is below the limit",
    "aspect": "the picture is longer or narrower than the limit",
}  # fmt: skip
NAMES = ("problem", "problem_detail", "container", "seconds", "frames", "width", "height", "aspect")


def measure(path: str) -> Scores:
    """Measure a file by its packets. The function for `Reader.ask`.

    Returns:
      `container` (FFmpeg's names, separated by commas), `seconds` (from the first frame to the end of the last one), `frames`
      (packets of the video stream), `width` and `height` (pixels, as coded) and `aspect` (longer by shorter side).

    Raises:
      Reject: the file is unusable.
    """
    av.logging.set_level(av.logging.PANIC)
    with open(path, "rb") as file:
        if not file.read(1):
            raise Reject("empty_file", "zero bytes")
    with open_video(path) as container:
        stream = video_stream(container)
        times: list[float | None] = []
        try:
            for packet in container.demux(stream):
                if packet.size:
                    at = packet.pts if packet.pts is not None else packet.dts
                    times.append(None if at is None else float(at * packet.time_base))
        except FILE_ERRORS as error:  # the packets up to there may do; what decodes is the next stage's affair
            if not times:
                raise Reject("unreadable", line(error)) from None
        if not times:
            raise Reject("unreadable", "the video stream holds no data")
        step = 1 / float(stream.average_rate or 25)
        width, height = stream.codec_context.width, stream.codec_context.height
        names = container.format.name
    if not width or not height:
        raise Reject("unreadable", "the header names no picture size")
    at_frames = timeline(times, step)
    last = (at_frames[-1] / (len(times) - 1)) if len(times) > 1 and at_frames[-1] > 0 else step
    return {
        "container": names,
        "seconds": round(at_frames[-1] + last, 6),
        "frames": float(len(times)),
        "width": float(width),
        "height": float(height),
        "aspect": round(max(width, height) / min(width, height), 6),
    }


def scores_of(measured: Scores | Reject) -> Scores:
    """Return all scores of the stage, by NAMES: those measured, or the problem of a file that is unusable and None."""
    if isinstance(measured, Reject):
        return dict.fromkeys(NAMES) | {"problem": measured.reason, "problem_detail": measured.detail}
    return dict.fromkeys(NAMES) | measured


def reason_of(scores: Scores, settings: Metadata) -> str:
    """Return why a clip is dropped, a key of REASONS, or "" if it is kept."""
    problem = scores["problem"]
    if problem is not None:
        return str(problem) if problem in REASONS else "unreadable"
    if not set(str(scores["container"]).split(",")) & set(settings.containers):
        return "container"
    if not settings.min_seconds <= number(scores, "seconds") <= settings.max_seconds:
        return "duration"
    if min(number(scores, "width"), number(scores, "height")) < settings.min_side:
        return "resolution"
    if number(scores, "aspect") > settings.max_aspect:
        return "aspect"
    return ""


def number(scores: Scores, name: str) -> float:
    """Return a score that is a number. Raises ValueError if it is none."""
    value = scores[name]
    if not isinstance(value, float | int):
        raise ValueError(f"score {name}: {value!r} is not a number; measure the clip again")
    return value
