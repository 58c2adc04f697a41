"""Transforms of whole clips: every frame gets the same crop, flip and RandAugment operations.

RandAugment follows the reference: it always applies two different operations out of nine at level 5 of 10. At this level contrast,
brightness and sharpness are the identity, and warps have a fixed direction. Warps use the fixed-point arithmetic of OpenCV 4, as
the reference did (OpenCV 5 differs by up to 5 grey levels). See docs/models/mplug_video.md, "Frames and augmentation".
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from ymplug_jax.data.frames import opencv

# Mean and standard deviation of CLIP's images, RGB, for values in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEVEL = 5  # RandAugment level, out of 10
STILL_LEVEL = 7  # of still images
FILL = (128, 128, 128)
Frame = np.ndarray  # uint8[H, W, 3]
Crop = tuple[int, int, int, int]  # top, left, height, width


class Clip(Protocol):
    """A clip: uint8[T, H, W, 3], a list of frames, or lazily decoded frames. Each frame is finished before the next is read."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Frame]: ...

    def __getitem__(self, t: int, /) -> Frame: ...


def train_transform(clip: Clip, size: int, rng: np.random.Generator, *, wrap_uint8: bool = False) -> np.ndarray:
    """Apply a random resized crop, a flip with probability 1/2 and two RandAugment operations.

    Args:
      clip: RGB frames.
      size: height and width of the result, pixels.
      rng: source of all randomness.
      wrap_uint8: wrap values beyond 0..255 modulo 256 after bicubic resizing, as the reference does, instead of clipping.

    Returns:
      uint8[T, size, size, 3].
    """
    cv2 = opencv()
    height, width = clip[0].shape[:2]
    crop = choose_crop(height, width, rng)
    flip = rng.random() < 0.5
    operations = [(name, LEVEL) for name in choose_operations(rng)]
    out = np.empty((len(clip), size, size, 3), np.uint8)
    for t, values in enumerate(_crop_resize(clip, crop, size)):
        frame = to_uint8(values, wrap=True) if wrap_uint8 else np.clip(values, 0, 255, out=values).astype(np.uint8)
        frame = cv2.flip(frame, 1) if flip else frame
        for name, level in operations:
            frame = operate(frame, name, level)
        out[t] = frame
    return out


def still_transform(image: Frame, size: int, rng: np.random.Generator) -> np.ndarray:
    """Apply Salesforce's augmentation of still images: a wider random resized crop, a flip, and up to two stronger operations.

    The crop has 0.2 to 1 of the area. Each of two different operations at level 7 is applied with probability 1/2. See
    docs/models/alpro.md, "Still images".

    Args:
      image: uint8[H, W, 3], RGB.
      size: height and width of the result, pixels.
      rng: source of all randomness.

    Returns:
      uint8[size, size, 3].
    """
    height, width = image.shape[:2]
    crop = choose_crop(height, width, rng, least=0.2)
    flip = rng.random() < 0.5
    operations = [name for name in choose_operations(rng) if rng.random() < 0.5]
    (values,) = _crop_resize([image], crop, size)
    frame = np.clip(values, 0, 255).astype(np.uint8)
    frame = opencv().flip(frame, 1) if flip else frame
    for name in operations:
        frame = operate(frame, name, STILL_LEVEL)
    return frame


def eval_transform(clip: Clip, size: int, *, bilinear: bool = False) -> np.ndarray:
    """Resize frames uint8[H, W, 3] to squares without keeping the aspect ratio: nearest neighbour as in the reference, or bilinear.

    Returns:
      uint8[T, size, size, 3].
    """
    cv2 = opencv()
    height, width = clip[0].shape[:2]
    out = np.empty((len(clip), size, size, 3), np.uint8)
    for t, frame in enumerate(clip):
        if bilinear:
            out[t] = cv2.resize(frame, (size, size), interpolation=cv2.INTER_LINEAR)
        else:
            out[t] = cv2.remap(frame, _nearest_grid(height, width, size), None, cv2.INTER_NEAREST)
    return out


@lru_cache(64)
def _nearest_grid(height: int, width: int, size: int) -> np.ndarray:
    """Return the source coordinates of each output pixel, int16[size, size, xy]."""
    return np.stack(np.meshgrid(nearest(width, size), nearest(height, size)), -1).astype(np.int16)


def nearest(source: int, size: int) -> np.ndarray:
    """Return the source index of each output pixel, int64[size]: floor(i * source / size) in float32, as in PyTorch."""
    scale = np.float32(source) / np.float32(size)
    return np.minimum((np.arange(size, dtype=np.float32) * scale).astype(np.int64), source - 1)


def choose_crop(height: int, width: int, rng: np.random.Generator, *, least: float = 0.5) -> Crop:
    """Draw a crop with `least` to 1 of the area and an aspect ratio log-uniform in 3/4..4/3; after ten misfits, a central crop."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def choose_operations(rng: np.random.Generator) -> list[str]:
    """Draw the names of two different operations."""
    names = list(OPERATIONS)
    return [names[i] for i in rng.choice(len(names), 2, replace=False)]


def crop_resize(clip: Clip, crop: Crop, size: int) -> Iterator[np.ndarray]:
    """Crop and resize each frame to f32[size, size, 3], truncated toward zero. All frames share one buffer.

    Bicubic with a = -0.75, half-pixel centres, replicated edges and no antialiasing. The filter overshoots, so values are whole
    numbers that may lie outside 0..255.
    """
    for values in _crop_resize(clip, crop, size):
        yield np.trunc(values, out=values)


def _crop_resize(clip: Clip, crop: Crop, size: int) -> Iterator[np.ndarray]:
    """`crop_resize` without truncation."""
    cv2 = opencv()
    top, left, height, width = crop
    part = np.empty((height, width, 3), np.float32)
    out = np.empty((size, size, 3), np.float32)
    for frame in clip:
        np.copyto(part, frame[top : top + height, left : left + width])
        yield cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)


def to_uint8(values: np.ndarray, *, wrap: bool = False) -> np.ndarray:
    """Truncate toward zero and clip to uint8. `wrap`: modulo 256 instead, as the reference, which turns overshooting bright pixels
    black."""
    return (values.astype(np.int64) % 256 if wrap else np.clip(values, 0, 255)).astype(np.uint8)


def operate(frame: Frame, name: str, level: float = LEVEL) -> Frame:
    """Apply a RandAugment operation to a frame. `level` is 0 to 10; for WARPS also -10 to 0, the opposite direction."""
    return OPERATIONS[name](frame, level)


def _factor(level: float) -> float:
    return level / 10 * 1.8 + 0.1


def _contrast(frame: Frame, level: float) -> Frame:
    if (factor := _factor(level)) == 1.0:
        return frame
    # Luma with the weights of red and blue exchanged, because the reference treats RGB frames as BGR.
    mean = float(frame.mean((0, 1)) @ (0.114, 0.587, 0.299))
    return opencv().LUT(frame, to_uint8((np.arange(256) - mean) * factor + mean))


def _brightness(frame: Frame, level: float) -> Frame:
    if (factor := _factor(level)) == 1.0:
        return frame
    return opencv().LUT(frame, to_uint8(np.arange(256) * factor))


def _sharpness(frame: Frame, level: float) -> Frame:
    if (factor := _factor(level)) == 1.0:
        return frame
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = opencv().filter2D(frame, -1, kernel).astype(np.float32)
    out = to_uint8(smooth + factor * (frame - smooth))
    out[[0, -1]], out[:, [0, -1]] = frame[[0, -1]], frame[:, [0, -1]]  # the border is not smoothed
    return out


def _warp(frame: Frame, matrix: list[list[float]] | np.ndarray) -> Frame:
    """Warp with `matrix` [2, 3], which maps (x, y, 1) of the source to (x, y) of the result. Bilinear; grey outside."""
    height, width = frame.shape[:2]
    return opencv().warpAffine(
        frame, np.asarray(matrix, np.float32), (width, height), borderValue=FILL, flags=opencv().INTER_LINEAR
    )


def _translate(frame: Frame, x: float, y: float) -> Frame:
    """Shift a frame by (x, y) pixels. Whole shifts are copies, which give the same result as a warp."""
    if x != round(x) or y != round(y):
        return _warp(frame, [[1, 0, x], [0, 1, y]])
    cv2 = opencv()
    height, width = frame.shape[:2]
    x, y = (max(-side, min(side, round(shift))) for shift, side in ((x, width), (y, height)))
    kept = frame[max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)]
    if not kept.size:
        return np.full_like(frame, FILL)
    edges = max(y, 0), max(-y, 0), max(x, 0), max(-x, 0)  # top, bottom, left, right
    return cv2.copyMakeBorder(kept, *edges, cv2.BORDER_CONSTANT | cv2.BORDER_ISOLATED, value=FILL)


def _rotate(frame: Frame, level: float) -> Frame:
    height, width = frame.shape[:2]
    matrix = opencv().getRotationMatrix2D((width / 2, height / 2), level / 10 * 30, 1)  # degrees, counter-clockwise
    return opencv().warpAffine(frame, matrix, (width, height), borderValue=FILL, flags=opencv().INTER_LINEAR)


OPERATIONS: dict[str, Callable[[Frame, float], Frame]] = {
    "Identity": lambda frame, level: frame,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": lambda frame, level: _warp(frame, [[1, level / 10 * 0.3, 0], [0, 1, 0]]),
    "ShearY": lambda frame, level: _warp(frame, [[1, 0, 0], [level / 10 * 0.3, 1, 0]]),
    "TranslateX": lambda frame, level: _translate(frame, -level, 0),
    "TranslateY": lambda frame, level: _translate(frame, 0, -level),
    "Rotate": _rotate,
}
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
