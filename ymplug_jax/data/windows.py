"""Clips whose resize and augmentation the devices do: the host decodes, cuts out the crop, and sends it with what was drawn.

A clip is uint8[T, side + 1, side, 3]: the crop of each frame in the top left corner of a square, zeros around it, and a last row that
begins with the draws, the same for all frames. `training/device_augment.py` turns it into uint8[T, size, size, 3].
"""

import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import transforms
from ymplug_jax.data.buffers import RESULTS
from ymplug_jax.data.transforms import Clip, Crop

DRAWS = 5  # height and width of the crop, 1 for a flip, and the places of two operations in OPERATIONS: uint16, little-endian


def shape(frames: int, side: int) -> tuple[int, int, int, int]:
    """Shape of a clip in squares of `side` pixels."""
    return frames, side + 1, side, 3


def train_window(clip: Clip, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw as `transforms.train_transform` does, and cut out the crop.

    Args:
      clip: RGB frames.
      side: of the square, pixels.
      rng: source of all randomness.

    Raises:
      Mistake: the crop is larger than the square.
    """
    height, width = clip[0].shape[:2]
    crop = transforms.choose_crop(height, width, rng)
    flip = rng.random() < 0.5
    return _packed(clip, side, crop, flip, transforms.choose_operations(rng))


def finished_window(video: np.ndarray, side: int) -> np.ndarray:
    """Pack a clip uint8[T, S, S, 3] that is augmented already; the devices leave it as it is."""
    size = video.shape[1]
    return _packed(video, side, (0, 0, size, size), False, ["Identity", "Identity"])


def _packed(clip: Clip, side: int, crop: Crop, flip: bool, names: list[str]) -> np.ndarray:
    top, left, height, width = crop
    if max(height, width) > side:
        raise Mistake(
            f"config.data.window: {side}, but a crop has {height} x {width} pixels; set it to 4/3 of the shorter side of the stored "
            "frames, such as 342 for 256"
        )
    places = list(transforms.OPERATIONS)
    draws = np.array([height, width, flip, *(places.index(name) for name in names)], "<u2")
    out = RESULTS.empty(shape(len(clip), side), np.uint8)
    out[:, :height, width:], out[:, height:] = 0, 0
    out.reshape(len(clip), -1)[:, side * side * 3 :][:, : 2 * DRAWS] = draws.view(np.uint8)
    for t, frame in enumerate(clip):
        out[t, :height, :width] = frame[top : top + height, left : left + width]
    return out
