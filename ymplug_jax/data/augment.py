"""The transforms of the recipe, on whole clips: one crop, one flip and the same two operations for every frame.

RandAugment here is the reference's: two different operations out of nine, always applied, at level 5 of 10, where contrast,
brightness and sharpness happen to be the identity and the warps go one way only.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

LEVEL = 5  # of 10
FILL = (128, 128, 128)
Clip = np.ndarray  # uint8[T, H, W, 3]


def train_transform(clip: Clip, size: int, rng: np.random.Generator, *, random_signs: bool = False) -> Clip:
    """Random resized crop, flip with probability 1/2, two RandAugment operations: uint8[T, H, W, 3] -> uint8[T, size, size, 3].

    Args:
      clip: RGB frames.
      size: side of the result, pixels.
      rng: all randomness of the call.
      random_signs: warp to either side; the reference warps to one side only.
    """
    clip = to_uint8(crop_resize(clip, *choose_crop(*clip.shape[1:3], rng), size=size))
    if rng.random() < 0.5:
        clip = clip[:, :, ::-1]
    names = rng.choice(len(OPERATIONS), 2, replace=False)
    for name in (list(OPERATIONS)[i] for i in names):
        sign = -1.0 if random_signs and rng.random() < 0.5 else 1.0
        clip = operate(clip, name, sign * LEVEL if name in WARPS else LEVEL)
    return np.ascontiguousarray(clip)


def eval_transform(clip: Clip, size: int, *, bilinear: bool = False) -> Clip:
    """Resize to a square whatever the aspect: nearest neighbour as in the reference, or bilinear."""
    t, height, width, _ = clip.shape
    if bilinear:
        return np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_LINEAR) for frame in clip])
    rows = np.floor(np.arange(size) * (height / size)).astype(int)
    columns = np.floor(np.arange(size) * (width / size)).astype(int)
    return np.ascontiguousarray(clip[:, rows][:, :, columns])  # [T, size, size, 3]


def choose_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width): area 0.5 to 1 of the frame, aspect log-uniform in 3/4..4/3; ten tries, then a central crop."""
    for _ in range(10):
        area = height * width * rng.uniform(0.5, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = width / height
    w, h = width, height
    if ratio < 3 / 4:
        h = round(width / (3 / 4))
    elif ratio > 4 / 3:
        w = round(height * 4 / 3)
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(clip: Clip, top: int, left: int, height: int, width: int, *, size: int) -> np.ndarray:
    """Bicubic (a = -0.75, half-pixel centres, edges replicated, no antialias), truncated toward zero: int32[T, size, size, 3].

    Values may lie outside 0..255: bicubic overshoots.
    """
    crop = clip[:, top : top + height, left : left + width].astype(np.float32)
    return np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_CUBIC) for frame in crop]).astype(np.int32)


def to_uint8(values: np.ndarray, *, wrap: bool = False) -> Clip:
    """int32 -> uint8. The reference wraps modulo 256, so that bright pixels turn black; by default values are clipped."""
    return (values % 256 if wrap else np.clip(values, 0, 255)).astype(np.uint8)


def operate(clip: Clip, name: str, level: float = LEVEL) -> Clip:
    """One operation of RandAugment on every frame alike; `level` runs from 0 to 10, warps also backwards."""
    return np.stack([OPERATIONS[name](frame, level) for frame in clip])


def _factor(level: float) -> float:
    return level / 10 * 1.8 + 0.1


def _blend(frame: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    mixed = other + factor * (frame.astype(np.float32) - other)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _contrast(frame: np.ndarray, level: float) -> np.ndarray:
    mean = float(np.mean(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)))
    return _blend(frame, mean, _factor(level))


def _brightness(frame: np.ndarray, level: float) -> np.ndarray:
    return _blend(frame, 0.0, _factor(level))


def _sharpness(frame: np.ndarray, level: float) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = cv2.filter2D(frame, -1, kernel).astype(np.float32)
    smooth[[0, -1]], smooth[:, [0, -1]] = frame[[0, -1]], frame[:, [0, -1]]  # the border is not filtered
    return _blend(frame, smooth, _factor(level))


def _warp(frame: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """`matrix` maps the source to the destination; bilinear, grey outside."""
    height, width = frame.shape[:2]
    return cv2.warpAffine(frame, np.float32(matrix), (width, height), borderValue=FILL, flags=cv2.INTER_LINEAR)


def _rotate(frame: np.ndarray, level: float) -> np.ndarray:
    height, width = frame.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), level / 10 * 30, 1)
    return cv2.warpAffine(frame, matrix, (width, height), borderValue=FILL, flags=cv2.INTER_LINEAR)


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Identity": lambda frame, level: frame,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": lambda frame, level: _warp(frame, [[1, level / 10 * 0.3, 0], [0, 1, 0]]),
    "ShearY": lambda frame, level: _warp(frame, [[1, 0, 0], [level / 10 * 0.3, 1, 0]]),
    "TranslateX": lambda frame, level: _warp(frame, [[1, 0, -level], [0, 1, 0]]),
    "TranslateY": lambda frame, level: _warp(frame, [[1, 0, 0], [0, 1, -level]]),
    "Rotate": _rotate,
}
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
