"""Clips for the tests of a curation: textured pictures that differ by seed, written as small videos."""

from pathlib import Path

import cv2
import numpy as np

from data_prep import plant_copies

RATE = 12


def picture(seed: int, height: int = 144, width: int = 192) -> np.ndarray:
    """A picture of coloured patches with some discs: uint8[H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(40, 220, (5, 6, 3)).astype(np.float32)
    made = np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST), 30, 235)
    for _ in range(6):
        centre, colour = (int(rng.integers(width)), int(rng.integers(height))), rng.uniform(40, 220, 3).tolist()
        cv2.circle(made, centre, int(rng.integers(8, 22)), colour, -1)
    return made.astype(np.uint8)


def moving(seed: int, count: int = 24) -> np.ndarray:
    """A camera that pans over a picture: uint8[count, 144, 192, 3]."""
    whole = picture(seed, 144 + count, 192 + 2 * count)
    return np.stack([whole[k : k + 144, 2 * k : 2 * k + 192] for k in range(count)])


def write(frames: np.ndarray, path: Path, quality: str = plant_copies.CLEAN) -> Path:
    """Write frames at 12 per second."""
    plant_copies.write(frames, path, RATE, quality)
    return path
