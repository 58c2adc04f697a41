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
    first, last, apart = _intervals(count, available)
    if rng is None:
        chosen = (first + last) // 2
    elif apart:
        chosen = rng.integers(first, last)  # half-open
    else:
        chosen = np.sort(rng.choice(available, count, replace=False)).astype(np.int64)
    return chosen if count == num_frames else np.pad(chosen, (0, num_frames - count), mode="edge")


@functools.lru_cache(256)  # clips of a data set have few lengths
def _intervals(count: int, available: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """First and last frame of each interval, int64[count], and whether all have two frames or more."""
    cuts = np.linspace(0, available, count + 1).astype(np.int64)
    first, last = cuts[:-1], cuts[1:] - 1
    return first, last, bool(np.all(last > first))


def decode_frames(jpegs: Sequence[bytes], indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint8[T, H, W, 3] RGB of the chosen frames; a frame chosen twice is decoded once. Other threads run meanwhile.

    Raises:
      ValueError: bytes that are no JPEG, or frames of different sizes.
    """
    return np.stack(list(Decoded(jpegs, indices)))


class Decoded:
    """The frames of `decode_frames`, uint8[H, W, 3] each, decoded when they are asked for: what is done to a frame at once
    finds it in the cache. The latest one is kept. Errors are those of `decode_frames`."""

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
            raise ValueError(f"frame {index} of the record is no JPEG")
        self._size = self._size or image.shape[:2]
        if image.shape[:2] != self._size:
            raise ValueError(f"frame {index} of the record is {image.shape[:2]}, the first one {self._size}")
        self._latest, self._image = index, image
        return image
