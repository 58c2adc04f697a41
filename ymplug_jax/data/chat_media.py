"""Images and clips as the chat model was trained on them (docs/models/mplug_chat.md, "Frames and pixels")."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from ymplug_jax.data import transforms


def frame_indices(total: int, frames: int) -> np.ndarray:
    """Frames to show out of those of a clip, int[frames]: evenly spaced from the middle of the first part; short clips repeat some.

    Args:
      total: frames of the clip, 1 or more.
      frames: wanted.
    """
    step = (total - 1) / frames
    return int(step / 2) + np.round(step * np.arange(frames)).astype(int)  # halves go to the even number


def still(image: np.ndarray, size: int) -> np.ndarray:
    """An image as a clip of one frame: shorter edge to `size` (bicubic, antialiased) and centre crop.

    Args:
      image: uint8[H, W, 3], RGB.
      size: S, pixels.

    Returns:
      uint8[1, S, S, 3].
    """
    height, width = image.shape[:2]
    short = min(height, width)
    # The longer edge is truncated to whole pixels.
    wide, high = (size * width // short, size * height // short)
    top, left = (high - size) // 2, (wide - size) // 2
    return _resized(image, wide, high)[None, top : top + size, left : left + size]


def clip(frames: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Frames at S x S without keeping their aspect ratio (bicubic, antialiased): uint8[H, W, 3] each -> uint8[T, S, S, 3]."""
    return np.stack([_resized(frame, size, size) for frame in frames])


def still_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """`still`, normalised: uint8[H, W, 3], RGB -> float32[1, S, S, 3]."""
    return normalised(still(image, size))


def normalised(frames: np.ndarray) -> np.ndarray:
    """CLIP's mean and standard deviation: uint8[T, S, S, 3] -> float32[T, S, S, 3]."""
    return ((frames.astype(np.float32) / 255 - transforms.CLIP_MEAN) / transforms.CLIP_STD).astype(np.float32)


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
