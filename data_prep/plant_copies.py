"""What uploaders do to the video of another one: transforms of a clip's frames, for planted corpora and for tests on real clips."""

from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np

# The macroblock tree is off and there is one thread, because otherwise equal frames may give different files.
ENCODER = {"preset": "veryfast", "threads": "1", "x264-params": "no-mbtree=1"}
CLEAN, STRONG = "18", "38"  # constant rate factors: visually lossless; a strong re-encoding
KEPT = 0.9  # share of height and width that a crop keeps, and of the speed's inverse
Frames = np.ndarray  # uint8[N, H, W, 3], RGB


def recoded(frames: Frames, rng: np.random.Generator) -> Frames:
    """Halve the picture size; together with the encoder's strong setting, this is a strong re-encoding."""
    height, width = (_even(length / 2) for length in frames.shape[1:3])
    return _scaled(frames, width, height)


def cropped(frames: Frames, rng: np.random.Generator) -> Frames:
    """Cut a tenth off height and width, somewhere around the middle or in a corner."""
    height, width = (_even(KEPT * length) for length in frames.shape[1:3])
    down, across = (int(rng.integers(0, whole - part + 1)) for whole, part in ((frames.shape[1], height), (frames.shape[2], width)))  # fmt: skip
    if rng.random() < 0.5:
        down, across = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, down : down + height, across : across + width]


def with_logo(frames: Frames, rng: np.random.Generator) -> Frames:
    """Put a bright sign with dark strokes into a corner: a tenth of the height, a fifth of the width."""
    made = frames.copy()
    height, width = frames.shape[1:3]
    tall, wide, gap = max(8, height // 10), max(12, width // 5), max(2, height // 30)
    top = gap if rng.random() < 0.5 else height - gap - tall
    left = gap if rng.random() < 0.5 else width - gap - wide
    sign = np.full((tall, wide, 3), rng.integers(200, 256, 3), np.uint8)
    for x in range(2, wide - 2, 4):
        sign[2 : tall - 2, x : x + 2] = rng.integers(0, 90, 3)
    made[:, top : top + tall, left : left + wide] = sign
    return made


def letterboxed(frames: Frames, rng: np.random.Generator) -> Frames:
    """Put black bars above and below, or at both sides: 10 to 20 % of the side each."""
    along = 1 if rng.random() < 0.7 else 2
    bar = _even(rng.uniform(0.1, 0.2) * frames.shape[along])
    widths = [(0, 0)] * 4
    widths[along] = (bar, bar)
    return np.pad(frames, widths)


def mirrored(frames: Frames, rng: np.random.Generator) -> Frames:
    """Exchange left and right."""
    return np.ascontiguousarray(frames[:, :, ::-1])


def faster(frames: Frames, rng: np.random.Generator) -> Frames:
    """Play 1.1 times as fast, at the same frame rate."""
    count = max(2, round(len(frames) / 1.1))
    return frames[np.minimum(np.round(np.arange(count) * 1.1).astype(int), len(frames) - 1)]


def trimmed(frames: Frames, rng: np.random.Generator) -> Frames:
    """Cut up to an eighth of the frames off at each end, and a sixteenth at least at one."""
    first, last = int(rng.integers(0, len(frames) // 8 + 1)), int(rng.integers(0, len(frames) // 8 + 1))
    first = first or max(1, len(frames) // 16)
    return frames[first : len(frames) - last]


COPIES: dict[str, Callable[[Frames, np.random.Generator], Frames]] = {
    "recoded": recoded,
    "cropped": cropped,
    "logo": with_logo,
    "letterboxed": letterboxed,
    "mirrored": mirrored,
    "faster": faster,
    "trimmed": trimmed,
}


def write(frames: Frames, path: Path, rate: int, quality: str = CLEAN) -> None:
    """Encode frames as H.264 in MP4. Equal frames give identical files."""
    cv2.setNumThreads(1)
    height, width = (length // 2 * 2 for length in frames.shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={**ENCODER, "crf": quality})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in frames:
            shown = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())


def _scaled(frames: Frames, width: int, height: int) -> Frames:
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def _even(length: float) -> int:
    return max(2, round(length / 2) * 2)
