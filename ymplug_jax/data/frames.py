"""Sampling and decoding of frames. Frames are sampled before decoding, so unused frames cost nothing.

See docs/models/mplug_video.md, "Frames and augmentation".
"""

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np


@functools.cache
def opencv() -> ModuleType:
    """Import cv2 at its first use and disable its thread pool, because the loader already runs one example per thread."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def choose_frames(num_frames: int, available: int, rng: np.random.Generator | None) -> np.ndarray:
    """Sample frame indices, ascending, int64[num_frames], by the rule of the reference.

    The clip is divided into equal intervals. Evaluation takes the middle frame of each interval. Training draws one frame from
    each interval, excluding its last frame; if an interval has a single frame, it draws distinct frames from the whole clip. A
    clip with fewer than `num_frames` frames repeats its last one.

    Args:
      num_frames: number of frames to sample.
      available: number of stored frames.
      rng: randomness of training; None in evaluation.

    Raises:
      ValueError: the clip has no frames.
    """
    if available < 1:
        raise ValueError("the clip has no frames; give at least one")
    count = min(num_frames, available)
    first, last, apart = _intervals(count, available)
    if rng is None:
        chosen = (first + last) // 2
    elif apart:
        chosen = rng.integers(first, last)  # excludes `last`
    else:
        chosen = np.sort(rng.choice(available, count, replace=False)).astype(np.int64)
    return chosen if count == num_frames else np.pad(chosen, (0, num_frames - count), mode="edge")


@functools.lru_cache(256)  # a data set has few different clip lengths
def _intervals(count: int, available: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the first and last frame of each interval, int64[count], and whether all intervals have at least two frames."""
    cuts = np.linspace(0, available, count + 1).astype(np.int64)
    first, last = cuts[:-1], cuts[1:] - 1
    return first, last, bool(np.all(last > first))


def decode_frames(jpegs: Sequence[bytes], indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Decode the frames at `indices`: uint8[T, H, W, 3], RGB. Decoding releases the GIL; a repeated frame is decoded once.

    Raises:
      ValueError: a frame is not a JPEG, or the frames differ in size.
    """
    return np.stack(list(Decoded(jpegs, indices)))


class Decoded:
    """Lazy sequence of the frames of `decode_frames`, uint8[H, W, 3] each.

    A frame is decoded on access, so that the transform finds it in the CPU cache. Only the latest frame is kept. Raises the errors
    of `decode_frames`.
    """

    def __init__(self, jpegs: Sequence[bytes], indices: Sequence[int] | np.ndarray):
        self._jpegs, self._indices = jpegs, [int(index) for index in indices]
        self._latest = -1
        self._image = np.empty((0, 0, 3), np.uint8)
        self._size: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> np.ndarray:
        index = self._indices[t]
        if index == self._latest:
            return self._image
        cv2 = opencv()
        data = np.frombuffer(self._jpegs[index], np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError(f"frame {index} of the record: not a JPEG; build the shards again")
        self._size = self._size or image.shape[:2]
        if image.shape[:2] != self._size:
            raise ValueError(
                f"frame {index} of the record: size {image.shape[:2]}, but the first frame has {self._size}; build the shards again"
            )
        self._latest, self._image = index, image
        return image
