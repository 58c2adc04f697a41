"""Scenes of planted corpora: a moving coloured shape in front of a background of its own, so that no two scenes look alike."""

import math
from typing import NamedTuple

import cv2
import numpy as np

from data_prep.shape_clips import COLOURS, DIRECTIONS, MOTIONS, SHAPES, SUPERSAMPLE, outline

SIZES = ((192, 192), (192, 256), (180, 240), (256, 192), (144, 256))  # height, width
FRAMES = (16, 17, 18)
MARGIN = 0.03  # smallest distance between a shape and the border, as a share of the shorter side
PLACES = ("条纹", "波点", "格子", "云彩", "砖墙", "山坡")  # kinds of background, named in the title
WORDS = [(c, s, m, p) for c in COLOURS for s in SHAPES for m in MOTIONS for p in PLACES]


class Scene(NamedTuple):
    """One scene. `seed` determines everything that the title does not describe."""

    colour: str
    shape: str
    motion: str
    place: str
    seed: tuple[int, ...]

    @property
    def title(self) -> str:
        """What is seen."""
        return f"{self.place}前{self.colour}的{self.shape}在{self.motion}"


def says_something_else(one: Scene, other: Scene) -> bool:
    """Return whether the title of `other` is wrong for `one` in colour and in shape."""
    return one.colour != other.colour and one.shape != other.shape


def frames_of(scene: Scene) -> np.ndarray:
    """Draw the frames of a scene: uint8[N, H, W, 3], RGB."""
    rng = np.random.default_rng(scene.seed)
    height, width = SIZES[rng.integers(len(SIZES))]
    count = int(rng.choice(FRAMES))
    drift = rng.uniform(-0.06, 0.06, 2) * (rng.random() < 0.4)  # a camera that pans, in shares of height and width
    canvas = background(scene.place, height * 9 // 8, width * 9 // 8, rng)
    colour = np.clip(np.array(COLOURS[scene.colour]) + rng.uniform(-10, 10, 3), 0, 255)
    frames = []
    for k, (x, y, radius) in enumerate(path_of(scene.motion, height, width, count, rng)):
        top, left = (
            (0.0625 + d * (k / (count - 1) - 0.5)) * length for d, length in zip(drift, (height, width), strict=True)
        )
        shift = np.array([[1, 0, -left], [0, 1, -top]], np.float32)
        behind = cv2.warpAffine(canvas, shift, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        mask = coverage(scene.shape, x, y, radius, height, width)
        frames.append(np.round(behind + mask * (colour - behind)).astype(np.uint8))
    return np.stack(frames)


def path_of(motion: str, height: int, width: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return x, y and radius of the shape in each frame, in pixels: f64[count, 3]. The shape stays inside the picture."""
    side = min(height, width)
    progress, margin = np.linspace(0, 1, count)[:, None], MARGIN * side
    if motion in DIRECTIONS:
        radius = rng.uniform(0.17, 0.22) * side
        low, high = radius + margin, height - radius - margin
        distance = rng.uniform(0.75, 1) * (high - low)
        middle = rng.uniform(low + distance / 2, high - distance / 2)
        y = middle + DIRECTIONS[motion] * distance * (progress - 0.5)
        x = rng.uniform(radius + margin, width - radius - margin)
        return np.concatenate([np.full_like(y, x), y, np.full_like(y, radius)], axis=1)
    small, large = rng.uniform(0.12, 0.16) * side, rng.uniform(0.32, 0.40) * side
    centre = [rng.uniform(large + margin, length - large - margin) for length in (width, height)]
    radii = small + progress * (large - small)
    if motion == "慢慢变小":
        radii = radii[::-1]
    return np.concatenate([np.tile(centre, (count, 1)), radii], axis=1)


def coverage(shape: str, x: float, y: float, radius: float, height: int, width: int) -> np.ndarray:
    """Return the fraction of each pixel that the shape covers: f32[H, W, 1] in 0..1. Arguments are in pixels."""
    canvas = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    centre, r = (np.array([x, y]) * SUPERSAMPLE).round().astype(np.int32), radius * SUPERSAMPLE
    if shape in ("圆形", "圆环"):
        cv2.circle(canvas, centre.tolist(), round(r), 255, -1)
        if shape == "圆环":
            cv2.circle(canvas, centre.tolist(), round(0.55 * r), 0, -1)
    else:
        cv2.fillPoly(canvas, [(outline(shape) * r).round().astype(np.int32) + centre], 255)
    return (cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255)[..., None]


def background(place: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a background of muted colours: f32[H, W, 3]. Soft light and shade of its own lie on every one."""
    first, second = (rng.uniform(85, 175) + rng.uniform(-14, 14, 3) for _ in range(2))
    if abs(first.mean() - second.mean()) < 25:
        second = second + (25 if first.mean() < 130 else -25)
    v, u = np.mgrid[0:height, 0:width] / min(height, width)
    mix = _pattern(place, u, v, rng)[..., None]
    light = clouds(height, width, rng)[..., None]
    return np.clip(first + mix * (second - first) + 60 * (light - 0.5), 60, 200).astype(np.float32)


def _pattern(place: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the share of the second colour, f64[H, W] in 0..1, at coordinates in shorter sides."""
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 1, 2)
    along, across = u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)
    if place == "条纹":
        return np.asarray((along * rng.uniform(2, 6) + phase[0]) % 1 < rng.uniform(0.3, 0.7), float)
    if place == "波点":
        pitch = rng.uniform(3, 6)
        a, b = (along * pitch + phase[0]) % 1 - 0.5, (across * pitch + phase[1]) % 1 - 0.5
        return np.asarray(np.hypot(a, b) < rng.uniform(0.22, 0.4), float)
    if place == "格子":
        pitch = rng.uniform(2, 5)
        return np.asarray((np.floor(along * pitch + phase[0]) + np.floor(across * pitch + phase[1])) % 2, float)
    if place == "砖墙":
        pitch = rng.uniform(4, 8)
        row = np.floor(v * pitch + phase[0])
        column = (u * pitch / 2 + phase[1] + 0.5 * (row % 2)) % 1
        return np.asarray(((v * pitch + phase[0]) % 1 < 0.15) | (column < 0.08), float)
    if place == "山坡":
        waves = sum(rng.uniform(0.03, 0.12) * np.sin(2 * math.pi * (f * u + rng.uniform())) for f in (0.7, 1.3, 2.9))
        return np.asarray(v > rng.uniform(0.4, 0.7) + waves, float)
    return np.asarray(clouds(u.shape[0], u.shape[1], rng) > 0.5, float)


def clouds(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise, f32[H, W] in 0..1."""
    total = np.zeros((height, width), np.float32)
    for cells, strength in ((3, 1.0), (6, 0.5)):
        total += strength * cv2.resize(
            rng.random((cells, cells), np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
    return np.clip((total - 0.25) / 1.0, 0, 1)
