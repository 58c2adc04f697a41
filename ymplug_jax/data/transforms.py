"""Transforms of whole clips: every frame gets the same crop, flip and RandAugment operations.

RandAugment follows the reference: it always applies two different operations out of nine at level 5 of 10. At this level contrast,
brightness and sharpness are the identity, and warps have a fixed direction. Warps use the fixed-point arithmetic of OpenCV 4, as
the reference did (OpenCV 5 differs by up to 5 grey levels). See docs/models/mplug_video.md, "Frames and augmentation".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from ymplug_jax.data.buffers import RESULTS, Scratch
from ymplug_jax.data.frames import opencv

# Mean and standard deviation of CLIP's images, RGB, for values in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEVEL = 5  # RandAugment level, out of 10
STILL_LEVEL = 7  # of still images
FILL = (128, 128, 128)
COLOURS = ("Contrast", "Brightness", "Sharpness")
TRANSLATIONS = ("TranslateX", "TranslateY")
WARPS = ("ShearX", "ShearY", *TRANSLATIONS, "Rotate")
Frame = np.ndarray  # uint8[H, W, 3]
Crop = tuple[int, int, int, int]  # top, left, height, width
_SCRATCH = Scratch()


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
    height, width = clip[0].shape[:2]
    crop = choose_crop(height, width, rng)
    flip = rng.random() < 0.5
    return _augment(clip, size, crop, _steps(size, flip, choose_operations(rng), LEVEL), wrap=wrap_uint8)


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
    frame: np.ndarray = _augment([image], size, crop, _steps(size, flip, operations, STILL_LEVEL))[0]
    return frame


def _augment(clip: Clip, size: int, crop: Crop, steps: "list[Step]", *, wrap: bool = False) -> np.ndarray:
    """Crop, resize and convert each frame, then apply the steps: uint8[T, size, size, 3]. Intermediate results stay in the cache."""
    out = RESULTS.empty((len(clip), size, size, 3), np.uint8)
    between = [_SCRATCH.empty(f"frame {i % 2}", (size, size, 3), np.uint8) for i in range(len(steps))]
    whole = _SCRATCH.empty(
        "crop", (size, size, 3), np.int16
    )  # over the crop, which is no longer needed and still in the cache
    for t, values in enumerate(_crop_resize(clip, crop, size, _SCRATCH)):
        frame, *results = [*between, out[t]]
        np.copyto(whole, values, casting="unsafe")  # truncates toward zero
        np.copyto(frame, whole if wrap else np.clip(whole, 0, 255, out=whole), casting="unsafe")  # or wraps
        for step, result in zip(steps, results, strict=True):
            step(frame, result)
            frame = result
    return out


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
    for values in _crop_resize(clip, crop, size, Scratch()):
        yield np.trunc(values, out=values)


def _crop_resize(clip: Clip, crop: Crop, size: int, memory: Scratch) -> Iterator[np.ndarray]:
    """`crop_resize` without truncation."""
    cv2 = opencv()
    top, left, height, width = crop
    part = memory.empty("crop", (height, width, 3), np.float32)
    out = memory.empty("resized", (size, size, 3), np.float32)
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


def _warp(name: str, frame: Frame, level: float) -> Frame:
    return _remap(warp_maps(name, level, *frame.shape[:2]), frame, None)


def _translate(name: str, frame: Frame, level: float, out: Frame | None = None) -> Frame:
    """Shift a frame by `level` pixels, left or up. Whole shifts are copies, which give the same result as a warp."""
    if level != round(level):
        return _warp(name, frame, level)
    cv2 = opencv()
    height, width = frame.shape[:2]
    x, y = (-round(level), 0) if name == "TranslateX" else (0, -round(level))
    x, y = max(-width, min(width, x)), max(-height, min(height, y))
    kept = frame[max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)]
    if not kept.size:
        return np.full_like(frame, FILL)
    edges = max(y, 0), max(-y, 0), max(x, 0), max(-x, 0)  # top, bottom, left, right
    return cv2.copyMakeBorder(kept, *edges, cv2.BORDER_CONSTANT | cv2.BORDER_ISOLATED, dst=out, value=FILL)


Maps = tuple[np.ndarray, np.ndarray]
Step = Callable[[Frame, Frame], object]  # reads its first argument, writes its second


def _steps(size: int, flip: bool, names: Sequence[str], level: float) -> list[Step]:
    """What a flip and RandAugment operations do to frames of `size` pixels. A warp after the flip does both at once."""
    steps: list[Step] = []
    for name in names:
        if name in MATRICES and not (name in TRANSLATIONS and level == round(level)):
            steps.append(partial(_remap, warp_maps(name, level, size, size, flip=flip)))
            flip = False
        elif name in WARPS or (name in COLOURS and _factor(level) != 1.0):
            steps += [_flip] if flip else []
            steps.append(partial(_operate_into, name, level))
            flip = False
    return [*steps, _flip] if flip else steps


def _flip(frame: Frame, out: Frame) -> None:
    opencv().flip(frame, 1, dst=out)


def _operate_into(name: str, level: float, frame: Frame, out: Frame) -> None:
    result = _translate(name, frame, level, out) if name in TRANSLATIONS else operate(frame, name, level)
    if result is not out:
        np.copyto(out, result)


def _remap(maps: Maps, frame: Frame, out: Frame | None) -> Frame:
    """Bilinear; grey outside."""
    cv2 = opencv()
    return cv2.remap(frame, *maps, cv2.INTER_LINEAR, dst=out, borderMode=cv2.BORDER_CONSTANT, borderValue=FILL)


# Matrices [2, 3] of (height, width, level), which map (x, y, 1) of the source to (x, y) of the result.
MATRICES: dict[str, Callable[[int, int, float], np.ndarray]] = {
    "ShearX": lambda height, width, level: np.array([[1, level / 10 * 0.3, 0], [0, 1, 0]], np.float32),
    "ShearY": lambda height, width, level: np.array([[1, 0, 0], [level / 10 * 0.3, 1, 0]], np.float32),
    "TranslateX": lambda height, width, level: np.array([[1, 0, -level], [0, 1, 0]], np.float32),
    "TranslateY": lambda height, width, level: np.array([[1, 0, 0], [0, 1, -level]], np.float32),
    # degrees, counter-clockwise
    "Rotate": lambda height, width, level: opencv().getRotationMatrix2D((width / 2, height / 2), level / 10 * 30, 1),
}


@lru_cache(64)
def warp_maps(name: str, level: float, height: int, width: int, *, flip: bool = False) -> Maps:
    """Return where each pixel of the result lies in the source, in the fixed-point form of OpenCV 4: 5 fractional bits.

    `warpAffine` computes the same numbers for every frame and hands them to `remap`.

    Args:
      name: one of MATRICES.
      level: RandAugment level.
      height: height of source and result, pixels.
      width: width of source and result, pixels.
      flip: the source is flipped horizontally before the warp.

    Returns:
      int16[height, width, xy], whole pixels; uint16[height, width], 32 * fraction of y + fraction of x, in 1/32 pixels.
    """
    (a, b, x), (c, d, y) = MATRICES[name](height, width, level).astype(np.float64)
    scale = 1 / (a * d - b * c)
    a, b, c, d = d * scale, -b * scale, -c * scale, a * scale
    inverse = ((a, b, -a * x - b * y), (c, d, -c * x - d * y))
    columns, rows = np.arange(width), np.arange(height)
    xs, ys = (
        (  # 10 fractional bits, rounded to 5
            np.rint((p * rows + origin) * 1024).astype(np.int64)[:, None]
            + np.rint(o * columns * 1024).astype(np.int64)
            + 16
        )
        >> 5
        for o, p, origin in inverse
    )
    xs = (width - 1) * 32 - xs if flip else xs
    return np.stack([xs >> 5, ys >> 5], -1).astype(np.int16), ((ys & 31) * 32 + (xs & 31)).astype(np.uint16)


OPERATIONS: dict[str, Callable[[Frame, float], Frame]] = {
    "Identity": lambda frame, level: frame,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    **{name: partial(_warp, name) for name in ("ShearX", "ShearY")},
    **{name: partial(_translate, name) for name in TRANSLATIONS},
    "Rotate": partial(_warp, "Rotate"),
}
