"""The content stage of a curation: what the pictures of a clip show, and the print for near-duplicates, in one decoding pass.

Frames are sampled evenly over the clip and scaled down, so that a clip of any size costs its decoding and little more.
"""

from collections.abc import Iterator
from typing import NamedTuple

import av.logging
import cv2
import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode

from data_prep.curation import metadata
from data_prep.curation.metadata import number
from data_prep.curation.prints import Print, print_of
from data_prep.curation.settings import Content, Duplicates, Scores
from ymplug_jax.data.video_container import FILE_ERRORS, MAX_PIXELS, Reject, open_video, video_stream
from ymplug_jax.data.video_file import spaced

REASONS = {
    "undecodable": "no frame decodes, too few do, or the decoder crashed or took longer than the limit",
    "black": "too many frames are black",
    "frozen": "the picture stands still nearly all the time",
    "slide_show": "the clip is a row of still pictures",
    "blurred": "the picture is blurred",
    "bordered": "black bars cover too much of the picture",
    "many_cuts": "there are more cuts a minute than the limit",
}
NAMES = (
    "decoding", "decoded", "samples", "black", "frozen", "blur", "border", "border_top", "border_bottom", "border_left",
    "border_right", "cuts_per_minute", "slides",
)  # fmt: skip
BLOCK = 8  # pixels, both sides of a block whose mean brightness is compared from frame to frame
DARK_SHARE = 0.98  # share of a black picture's pixels that are dark; the rest may be a logo
BAR_SHARE = 0.75  # share of the pixels of a row or column of a bar that never get bright; the rest may be a logo
MOST_BAR = 0.45  # of a side: wider bars are a dark picture
BLUR_WINDOW = 9  # pixels that the other blur takes the mean of
SHORTEST = 10.0  # seconds: in shorter clips, a cut counts as one in so many seconds


class Looked(NamedTuple):
    """What one decoding pass finds."""

    scores: Scores
    print: Print


def look(path: str, content: Content, duplicates: Duplicates) -> Looked:
    """Decode a clip once and measure its frames. The function for `Reader.ask`.

    Raises:
      Reject: no frame decodes.
    """
    av.logging.set_level(av.logging.PANIC)
    cv2.setNumThreads(0)
    known = metadata.measure(path)
    seconds, count = number(known, "seconds"), int(number(known, "frames"))
    wanted = round(min(max(seconds * content.per_second, content.min_samples), content.max_samples))
    detector = AdaptiveDetector(content.cut_ratio, 1, min_content_val=content.cut_level)
    rate = max(wanted / max(seconds, 1e-3), 1e-3)
    pictures: list[np.ndarray] = []
    cuts: list[int] = []
    decoded = 0
    for index, picture in _sampled(path, spaced(wanted, count), content.side):
        decoded = index + 1
        if picture is not None:
            found = detector.process_frame(FrameTimecode(len(pictures), fps=rate), picture)
            cuts += [time.frame_num for time in found]
            pictures.append(picture)
    if not pictures:
        raise Reject("unreadable", "no frame decodes")
    stack = np.stack(pictures)  # [N, H, W, 3]
    greys = np.stack([cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) for picture in pictures])
    scores = dict.fromkeys(NAMES) | {"decoded": round(min(1.0, decoded / (spaced(wanted, count)[-1] + 1)), 6)}
    scores |= measure(greys, cuts, seconds, content)
    top, bottom, left, right = (int(number(scores, f"border_{side}")) for side in ("top", "bottom", "left", "right"))
    inner = stack[:, top : stack.shape[1] - bottom, left : stack.shape[2] - right]
    return Looked(scores, print_of(inner, seconds, duplicates.frames))


def _sampled(path: str, wanted: list[int], side: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield (index, picture) of each decoded frame up to the last wanted: uint8[H, W, 3] in BGR, or None if it is not wanted.

    An error in the data ends the iteration. Pictures are upright and all of the first one's size.
    """
    needed, size = set(wanted), None
    with open_video(path) as container:
        stream = video_stream(container)
        stream.thread_type = "NONE"  # decoding is parallel over clips
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        frames = container.decode(stream)
        for index in range(wanted[-1] + 1):
            try:
                frame = next(frames, None)
            except FILE_ERRORS:
                return
            if frame is None or not frame.width or not frame.height or frame.format is None:
                return
            if index not in needed:
                yield index, None
                continue
            turns = round(frame.rotation / 90) % 4
            if size is None:
                scale = min(1.0, side / max(frame.width, frame.height))
                width, height = (max(BLOCK, round(length * scale)) for length in (frame.width, frame.height))
                size = (height, width) if turns % 2 else (width, height)  # upright
            width, height = size[::-1] if turns % 2 else size
            picture = frame.reformat(width=width, height=height, format="bgr24", interpolation="AREA").to_ndarray()
            yield index, np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def measure(greys: np.ndarray, cuts: list[int], seconds: float, settings: Content) -> Scores:
    """Measure the sampled frames of a clip.

    Args:
      greys: brightness, uint8[N, H, W].
      cuts: indices of the frames that begin a new shot.
      seconds: duration of the clip.
      settings: levels.
    """
    dark = np.mean(greys <= settings.black_level, axis=(1, 2)) >= DARK_SHARE  # [N]
    still, changes = stills(greys, settings.still_level), np.isin(np.arange(1, len(greys)), cuts)  # both [N - 1]
    changes &= ~still
    top, bottom, left, right = borders(greys, settings.black_level)
    height, width = greys.shape[1:]
    covered = 1 - (height - top - bottom) * (width - left - right) / (height * width)
    blurs = [blur(grey[top : height - bottom, left : width - right]) for grey in greys[~dark]]
    return {
        "samples": float(len(greys)),
        "black": round(float(np.mean(dark)), 6),
        "frozen": round(float(np.mean(still)), 6) if len(still) else 1.0,
        "blur": round(float(np.median(blurs)), 6) if blurs else 0.0,
        "border": round(covered, 6),
        "border_top": float(top),
        "border_bottom": float(bottom),
        "border_left": float(left),
        "border_right": float(right),
        "cuts_per_minute": round(60 * int(changes.sum()) / max(seconds, SHORTEST), 6),
        "slides": round(slides(still, changes), 6),
    }


def stills(greys: np.ndarray, level: float) -> np.ndarray:
    """Return whether each frame but the first shows what was last shown: bool[N - 1].

    A frame is compared with the last one that differed, so that a slow motion is not taken for a standstill. It is still if the
    mean brightness of no block differs by more than `level`.
    """
    rows, columns = (max(1, round(length / BLOCK)) for length in greys.shape[1:])
    blocks = [cv2.resize(grey, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.float32) for grey in greys]
    shown, found = blocks[0], []
    for block in blocks[1:]:
        found.append(float(np.abs(block - shown).max()) <= level)
        if not found[-1]:
            shown = block
    return np.array(found, bool)


def slides(still: np.ndarray, cuts: np.ndarray) -> float:
    """Return the share of steps that are still or single cuts between still steps; 0 if there are fewer than two such cuts."""
    beside = np.concatenate([[True], still[:-1]]) & np.concatenate([still[1:], [True]]) if len(still) else still
    single = cuts & beside
    return float(np.mean(still | single)) if single.sum() >= 2 else 0.0


def borders(greys: np.ndarray, level: float) -> tuple[int, int, int, int]:
    """Return the heights and widths of black bars (top, bottom, left, right) in pixels of the sampled frames.

    A row or column belongs to a bar if 75 % of its pixels are dark in every frame. Bars are measured from the edges inwards; a
    clip that is dark all over has none.
    """
    dark = greys.max(0) <= level  # [H, W]
    rows = [int(k) for k in _bars(dark.mean(1) >= BAR_SHARE)]
    if sum(rows) >= len(dark):
        return 0, 0, 0, 0
    columns = [int(k) for k in _bars(dark[rows[0] : len(dark) - rows[1]].mean(0) >= BAR_SHARE)]
    if sum(columns) >= dark.shape[1] or max(rows) > MOST_BAR * dark.shape[0] or max(columns) > MOST_BAR * dark.shape[1]:
        return 0, 0, 0, 0
    return rows[0], rows[1], columns[0], columns[1]


def _bars(dark: np.ndarray) -> tuple[int, int]:
    """Return the lengths of the runs of True at both ends of bool[L]; (L, L) if all are."""
    bright = np.flatnonzero(~dark)
    return (int(bright[0]), int(len(dark) - 1 - bright[-1])) if len(bright) else (len(dark), len(dark))


def blur(grey: np.ndarray) -> float:
    """Return the blur of uint8[H, W], 0 to 1: how little of the differences between neighbours another blur takes away.

    Source: Crete et al. 2007, The Blur Effect, the larger of both directions.
    """
    picture, found = grey.astype(np.float32), [0.0]
    for axis, window in ((1, (BLUR_WINDOW, 1)), (0, (1, BLUR_WINDOW))):
        before, after = (np.abs(np.diff(one, axis=axis)) for one in (picture, cv2.blur(picture, window)))
        total = float(before.sum())
        found.append(1 - float(np.maximum(before - after, 0).sum()) / total if total else 1.0)
    return max(found)


def scores_of(looked: Looked | Reject) -> Scores:
    """Return all scores of the stage, by NAMES: those measured, or in `decoding` why the clip does not decode."""
    if isinstance(looked, Reject):
        return dict.fromkeys(NAMES) | {"decoding": f"{looked.reason}: {looked.detail}", "decoded": 0.0}
    return looked.scores


def reason_of(scores: Scores, settings: Content) -> str:
    """Return why a clip is dropped, a key of REASONS, or "" if it is kept."""
    if scores["decoding"] is not None or number(scores, "decoded") < settings.min_decoded:
        return "undecodable"
    if number(scores, "black") > settings.max_black:
        return "black"
    if number(scores, "frozen") > settings.max_frozen:
        return "frozen"
    if number(scores, "slides") > settings.max_slides:
        return "slide_show"
    if number(scores, "blur") > settings.max_blur:
        return "blurred"
    if number(scores, "border") > settings.max_border:
        return "bordered"
    return "many_cuts" if number(scores, "cuts_per_minute") > settings.max_cuts_per_minute else ""
