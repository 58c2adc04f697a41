"""Which frames of a clip, and their pixels. Choosing comes before decoding: a frame that is not used costs nothing."""

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np


@functools.cache
def opencv() -> ModuleType:
    """cv2, loaded at its first use, without threads of its own: the loader's threads are the parallelism."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def choose_frames(num_frames: int, available: int, rng: np.random.Generator | None) -> np.ndarray:
    """Indices of the frames to show, ascending, int64[num_frames]; the reference's rule.

    The clip is cut into equal intervals. Evaluation (rng None) takes the middle of each; training draws from each, never
    its last frame, and falls back to distinct frames anywhere if some interval has one frame only. A clip with fewer
    frames than asked repeats its last one.

    Raises:
      ValueError: a clip without frames.
    """
    if available < 1:
        raise ValueError("a clip needs at least one frame")
    count = min(num_frames, available)
    cuts = np.linspace(0, available, count + 1).astype(np.int64)
    first, last = cuts[:-1], cuts[1:] - 1
    if rng is None:
        chosen = (first + last) // 2
    elif np.any(last <= first):
        chosen = np.sort(rng.choice(available, count, replace=False))
    else:
        chosen = rng.integers(first, last)  # half-open
    return np.pad(chosen.astype(np.int64), (0, num_frames - count), mode="edge")


def decode_frames(jpegs: Sequence[bytes], indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint8[T, H, W, 3] RGB of the chosen frames; a frame chosen twice is decoded once. Other threads run meanwhile.

    Raises:
      ValueError: bytes that are no JPEG, or frames of different sizes.
    """
    return np.stack(list(decode_each(jpegs, indices)))


def decode_each(jpegs: Sequence[bytes], indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    """The frames of `decode_frames` one after the other, uint8[H, W, 3]: what works on each at once finds it in the cache.

    Raises:
      ValueError: as `decode_frames`.
    """
    cv2 = opencv()
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image, last, shape = None, -1, None
    for index in map(int, indices):
        if index != last:  # the choice is ascending, so that equal ones are neighbours
            image, last = cv2.imdecode(np.frombuffer(jpegs[index], np.uint8), flags), index
        if image is None:
            raise ValueError(f"frame {index} of the record is no JPEG")
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(f"frame {index} of the record is {image.shape[:2]}, the first one {shape[:2]}")
        yield image
