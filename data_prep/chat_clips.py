"""Clips for a small chat model: shapes that move once or twice, and written numbers, with questions about them.

Nothing but the motion itself tells where a shape goes. It starts anywhere, and what leaves the picture on one side enters it on
the other, so its place in any single frame, the first and the last included, has the same distribution for all motions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data_prep import shape_clips
from data_prep.shape_clips import COLOURS, FRAMES, SHAPES, SIZE

DIRECTIONS = {"向上移动": (0, -1), "向下移动": (0, 1), "向左移动": (-1, 0), "向右移动": (1, 0)}  # (x, y), y points down
OPPOSITE = {"向上移动": "向下移动", "向下移动": "向上移动", "向左移动": "向右移动", "向右移动": "向左移动"}
# Two motions are at right angles: played backwards, right then left would be right then left again.
TURNS = tuple((one, two) for one in DIRECTIONS for two in DIRECTIONS if two not in (one, OPPOSITE[one]))
NUMBERS = tuple(range(10))
SPEED = (
    5.0,
    6.5,
)  # pixels per frame; less than half a picture between two of four frames, so that the direction is clear
# Of ten clips in a row: clips of one motion, of two, and of a number.
CYCLE = (1, 2, 0, 1, 2, 0, 1, 2, 1, 2)


class ChatClip(NamedTuple):
    """One clip to draw. `file` is relative to the video root; `seed` determines everything that no question asks for."""

    file: str
    colour: str
    shape: str  # empty in a clip of a number
    motions: tuple[str, ...]  # one or two, in order; none in a clip of a number
    number: int | None
    seed: tuple[int, ...]
    backwards: bool = False

    @property
    def title(self) -> str:
        """Title that says everything."""
        if self.number is not None:
            return f"{self.colour}的数字{self.number}"
        if len(self.motions) == 2:
            return f"{self.colour}的{self.shape}先{self.motions[0]}，再{self.motions[1]}"
        return f"{self.colour}的{self.shape}在{self.motions[0]}"

    def played_backwards(self) -> "ChatClip":
        """The same frames in reverse order, with the motions that they then show."""
        return self._replace(
            file=self.file.replace(".mp4", "_backwards.mp4"),
            motions=tuple(OPPOSITE[motion] for motion in reversed(self.motions)),
            backwards=not self.backwards,
        )


def plan(split: str, clips: int, seed: int) -> list[ChatClip]:
    """Plan the clips of a split. Every list of answers is gone through in a random order again and again, so all are as common.

    Args:
      split: "train" or "val", part of the names of the files.
      clips: how many.
      seed: of the corpus.
    """
    part = {"train": 3, "val": 4}[split]  # 0 to 2 are the parts of the other clips
    rng = np.random.default_rng((seed, part))
    colours, shapes, motions, turns, numbers = (
        _shuffled(words, rng) for words in (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), TURNS, NUMBERS)
    )
    planned = []
    for i in range(clips):
        moves = CYCLE[i % len(CYCLE)]
        planned.append(
            ChatClip(
                file=f"videos/chat_{split}_{i:05d}.mp4",
                colour=next(colours),
                shape=next(shapes) if moves else "",
                motions=next(turns) if moves == 2 else (next(motions),) if moves else (),
                number=None if moves else next(numbers),
                seed=(seed, part, i),
            )
        )
    return planned


def _shuffled(words: tuple, rng: np.random.Generator) -> Iterator:
    """All words in random order, again and again, each time in another order."""
    while True:
        yield from (words[i] for i in rng.permutation(len(words)))


def path_of(motions: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """Centre and radius of the shape in each frame, in pixels: f64[FRAMES, 3]. Centres may lie outside the picture."""
    radius, start, speed = rng.uniform(20, 26), rng.uniform(0, SIZE, 2), rng.uniform(*SPEED)
    steps = np.repeat([DIRECTIONS[motion] for motion in motions], FRAMES // len(motions), axis=0)  # [FRAMES, 2]
    moved = speed * np.cumsum(steps, axis=0)
    return np.concatenate([start + moved, np.full((FRAMES, 1), radius)], axis=1)


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Fraction of each pixel that the shape covers, f32[SIZE, SIZE, 1]; what leaves on one side enters on the other."""
    places = [((x % SIZE) + i, (y % SIZE) + j) for i in (-SIZE, 0, SIZE) for j in (-SIZE, 0, SIZE)]
    seen = [
        shape_clips.coverage(shape, u, v, radius)
        for u, v in places
        if -radius < u < SIZE + radius and -radius < v < SIZE + radius
    ]
    return np.max(seen, axis=0)


def digits(number: int, x: float, y: float, height: float) -> np.ndarray:
    """Fraction of each pixel that a written number covers, f32[SIZE, SIZE, 1]; its middle is at x, y, in pixels."""
    factor, text, font = shape_clips.SUPERSAMPLE, str(number), cv2.FONT_HERSHEY_SIMPLEX
    thickness = round(0.16 * height * factor)
    scale = cv2.getFontScaleFromHeight(font, round(height * factor), thickness)
    (wide, high), _ = cv2.getTextSize(text, font, scale, thickness)
    canvas = np.zeros((SIZE * factor, SIZE * factor), np.uint8)
    corner = (round(x * factor - wide / 2), round(y * factor + high / 2))
    cv2.putText(canvas, text, corner, font, scale, 255, thickness, cv2.LINE_AA)
    small = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return (small.astype(np.float32) / 255)[..., None]  # [SIZE, SIZE, 1]


def frames_of(clip: ChatClip) -> np.ndarray:
    """Draw the frames of a clip: uint8[FRAMES, SIZE, SIZE, 3], RGB."""
    rng = np.random.default_rng(clip.seed)
    behind = shape_clips.background(rng)
    colour = np.clip(np.array(COLOURS[clip.colour]) + rng.uniform(-10, 10, 3), 0, 255)
    if clip.number is not None:
        (x, y), height = rng.uniform(0.4 * SIZE, 0.6 * SIZE, 2), rng.uniform(0.5, 0.62) * SIZE
        masks = [digits(clip.number, x, y, height)] * FRAMES
    else:
        forwards = clip.played_backwards().motions if clip.backwards else clip.motions
        masks = [coverage(clip.shape, x, y, radius) for x, y, radius in path_of(forwards, rng)]
    frames = np.stack([np.round(behind + mask * (colour - behind)).astype(np.uint8) for mask in masks])
    return frames[::-1] if clip.backwards else frames


def still_of(file: str) -> str:
    """File of the still image of a clip."""
    return file.replace("videos/", "images/").replace(".mp4", ".png")


def every_clip() -> list[ChatClip]:
    """One clip of everything that a clip can show; it has no file."""
    moving = [
        ChatClip("", colour, shape, motions, None, ())
        for colour in COLOURS
        for shape in SHAPES
        for motions in (*((motion,) for motion in DIRECTIONS), *TURNS)
    ]
    return [*moving, *(ChatClip("", colour, "", (), number, ()) for colour in COLOURS for number in NUMBERS)]


def write_clip(clip: ChatClip, root: Path) -> None:
    """Draw a clip and write its file."""
    shape_clips.write_video(frames_of(clip), root / clip.file)


def write_still(clip: ChatClip, root: Path) -> None:
    """Write the middle frame of a clip as a PNG."""
    picture = cv2.cvtColor(frames_of(clip)[FRAMES // 2], cv2.COLOR_RGB2BGR)
    path = root / still_of(clip.file)
    if not cv2.imwrite(str(path), picture):
        raise OSError(f"{path}: cannot be written; free some space or choose another --out")
