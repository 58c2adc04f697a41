"""Clips of moving coloured shapes: what they show, how they are drawn and how they are written as video files."""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from ymplug_jax.data.schema import CLASS_NAMES

SIZE = 112  # pixels, both sides
FRAMES = 16
FPS = 12
SUPERSAMPLE = 4  # factor of supersampling, for smooth edges and sub-pixel motion
# The macroblock tree is off, because at sizes that are not multiples of 32 its result is not deterministic.
ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "no-mbtree=1"}
MARGIN = 4  # minimum distance between a shape and the border, pixels
VAL_SHARE = 0.1
MIN_CLIPS = 20

COLOURS = {  # RGB; backgrounds are grey, so that all eight are visible
    "红色": (220, 25, 30),
    "橙色": (250, 130, 10),
    "黄色": (250, 230, 30),
    "绿色": (20, 150, 45),
    "蓝色": (25, 70, 225),
    "紫色": (140, 30, 185),
    "白色": (245, 245, 245),
    "黑色": (15, 15, 15),
}
SHAPES = ("圆形", "正方形", "三角形", "圆环")
MOTIONS = ("向上移动", "向下移动", "慢慢变大", "慢慢变小")  # unaffected by a horizontal flip
DIRECTIONS = {"向上移动": -1, "向下移动": 1}  # direction along y, which points down
# The class of a clip depends on its motion only, so a classifier needs several frames.
LABELS = dict(zip(MOTIONS, ("汽车", "足球", "萌娃日常", "科技"), strict=True))
assert set(LABELS.values()) <= set(CLASS_NAMES)


class Clip(NamedTuple):
    """One clip to draw. `file` is relative to the video root; `seed` determines everything that the title does not describe."""

    file: str
    colour: str
    shape: str
    motion: str
    seed: tuple[int, ...]

    @property
    def title(self) -> str:
        """Title with the motion."""
        return f"{self.colour}的{self.shape}在{self.motion}"

    @property
    def plain_title(self) -> str:
        """Title without the motion, since the motion determines the class."""
        return f"{self.colour}的{self.shape}"

    @property
    def references(self) -> list[str]:
        """Three equivalent captions, the title first."""
        return [
            self.title,
            f"一个{self.colour}的{self.shape}正在{self.motion}",
            f"画面中有一个{self.shape}，它是{self.colour}的，正在{self.motion}",
        ]


def plan(clips: int, seed: int) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Plan the corpus: (training clips, validation clips, gallery). A tenth of `clips` is for validation; the gallery is extra.

    Eight combinations are held out, one per colour, two per shape and two per motion, so that colour and shape do not predict the
    motion. Validation cycles through them, training through the other 120. The gallery has one new clip of every combination, so
    its titles are distinct and its classes balanced; it is the retrieval validation split and the classification test split.

    Raises:
      ValueError: too few clips.
    """
    if clips < MIN_CLIPS:
        raise ValueError(f"--clips {clips}: too few for training and validation splits; give {MIN_CLIPS} or more")
    rng = np.random.default_rng(seed)
    colours, shapes, motions = (rng.permutation(words).tolist() for words in (list(COLOURS), SHAPES, MOTIONS))
    held_out = [
        (c, shapes[i % len(shapes)], motions[(i + i // len(shapes)) % len(motions)]) for i, c in enumerate(colours)
    ]
    others = [words for words in itertools.product(colours, shapes, motions) if words not in held_out]
    seen = [others[i] for i in rng.permutation(len(others))]
    val = max(1, round(clips * VAL_SHARE))

    def take(split: str, number: int, combinations: list[tuple[str, str, str]], part: int) -> list[Clip]:
        return [
            Clip(f"videos/{split}_{i:05d}.mp4", *combinations[i % len(combinations)], seed=(seed, part, i))
            for i in range(number)
        ]

    gallery = take("gallery", len(seen) + len(held_out), [*held_out, *seen], 2)
    return take("train", clips - val, seen, 0), take("val", val, held_out, 1), gallery


def outline(shape: str) -> np.ndarray:
    """Return the corners of a polygon in [-1, 1], x to the right and y down: f64[corners, 2]."""
    if shape == "正方形":
        return np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    if shape == "三角形":
        return np.array([(0, -1), (1, 0.85), (-1, 0.85)])
    raise ValueError(f"shape {shape!r} is not a polygon; give 正方形 or 三角形")


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Return the fraction of each pixel that the shape covers: f32[SIZE, SIZE, 1] in 0..1. Arguments are in pixels."""
    canvas = np.zeros((SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE), np.uint8)
    centre = (np.array([x, y]) * SUPERSAMPLE).round().astype(int)
    r = radius * SUPERSAMPLE
    if shape in ("圆形", "圆环"):
        cv2.circle(canvas, centre.tolist(), round(r), 255, -1)
        if shape == "圆环":
            cv2.circle(canvas, centre.tolist(), round(0.55 * r), 0, -1)
    else:
        cv2.fillPoly(canvas, [(outline(shape) * r).round().astype(np.int32) + centre.astype(np.int32)], 255)
    small = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return (small.astype(np.float32) / 255)[..., None]  # [SIZE, SIZE, 1]


def background(rng: np.random.Generator) -> np.ndarray:
    """Draw a static, greyish background: f32[SIZE, SIZE, 3]."""
    first, second = (rng.uniform(100, 165) + rng.uniform(-9, 9, 3) for _ in range(2))
    v, u = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    along = u * math.cos(angle) + v * math.sin(angle)
    slope = rng.random() < 0.5  # True: a brightness gradient; False: soft stripes
    mix = along + 0.5 if slope else 0.5 + 0.4 * np.sin(2 * math.pi * rng.uniform(2, 4) * along)
    return (first + np.clip(mix, 0, 1)[..., None] * (second - first)).astype(np.float32)  # [SIZE, SIZE, 3]


def path_of(motion: str, rng: np.random.Generator) -> np.ndarray:
    """Return x, y and radius of the shape in each frame, in pixels: f64[FRAMES, 3]. The shape stays inside the picture.

    A moving shape travels at least 42 pixels, and a growing or shrinking one changes its radius by at least a factor of 2, both
    at constant speed, so that a few frames spread over the clip suffice to recognise the motion.
    """
    progress = np.linspace(0, 1, FRAMES)[:, None]  # [FRAMES, 1]
    if motion in DIRECTIONS:
        radius = rng.uniform(20, 26)
        low, high = radius + MARGIN, SIZE - radius - MARGIN
        distance = rng.uniform(42, high - low)
        middle = rng.uniform(low + distance / 2, high - distance / 2)
        y = middle + DIRECTIONS[motion] * distance * (progress - 0.5)  # [FRAMES, 1]
        return np.concatenate([np.full_like(y, rng.uniform(low, high)), y, np.full_like(y, radius)], axis=1)
    small, large = rng.uniform(14, 18), rng.uniform(36, 44)
    centre = rng.uniform(large + MARGIN, SIZE - large - MARGIN, 2)
    radii = small + progress * (large - small)
    if motion == "慢慢变小":
        radii = radii[::-1]
    return np.concatenate([np.tile(centre, (FRAMES, 1)), radii], axis=1)


def frames_of(clip: Clip) -> np.ndarray:
    """Draw the frames of a clip: uint8[FRAMES, SIZE, SIZE, 3], RGB."""
    rng = np.random.default_rng(clip.seed)
    behind = background(rng)
    colour = np.clip(np.array(COLOURS[clip.colour]) + rng.uniform(-10, 10, 3), 0, 255)
    frames = []
    for x, y, radius in path_of(clip.motion, rng):
        mask = coverage(clip.shape, x, y, radius)
        frames.append(np.round(behind + mask * (colour - behind)).astype(np.uint8))
    return np.stack(frames)


def write_clip(clip: Clip, root: Path) -> None:
    """Draw a clip and write its file."""
    write_video(frames_of(clip), root / clip.file)


def write_video(frames: np.ndarray, path: Path) -> None:
    """Encode uint8[FRAMES, SIZE, SIZE, 3] as H.264 in MP4, with one thread, so that equal frames give identical files."""
    cv2.setNumThreads(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=ENCODER)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
