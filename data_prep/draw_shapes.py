"""Draws a small corpus of real videos: a coloured shape that moves, with a Chinese title that says so.

    python -m data_prep.draw_shapes --out runs/corpus --clips 1200 --seed 0

The title follows from the video alone (one template: colour, shape, motion), so comparing a generated title with the true
one is a fair score. 8 of the 128 combinations are held out: they appear in validation only, while each pair of shape and
colour, shape and motion, colour and motion stays in training. The clips differ in background, size, place and speed.

The folder becomes a video root with the release's four kinds of CSV beside it, and questions about the motion:
`videos/*.mp4`, `pretrain_{train,val}.csv`, `classification_{train,val}.csv`, `retrieval_{train,val}.csv`,
`captioning_{train,val}.csv`, `question_{train,val}.csv`, `classification_test.csv`, `answers.txt`, `texts.txt` (what a language
model may read before it sees any video: every title, and how one asks for a class or for a match, with every answer) and
`corpus.json` (settings and counts). In `classification_val.csv` a title speaks against its class, since its colour and shape have
the three other motions in training; the test part has every combination once, so that a title says nothing of its class.
"""

import csv
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from data_prep.flags import Parser, bar, local_path, run
from ymplug_jax.data.schema import CLASS_NAMES, COLUMNS

SIZE = 112  # pixels, both sides
FRAMES = 16
FPS = 12
SUPERSAMPLE = 4  # shapes are drawn this much larger, then averaged: smooth edges and motion of less than a pixel
# No macroblock tree: at sizes that are not multiples of 32 its result varies from run to run.
ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "no-mbtree=1"}
MARGIN = 4  # pixels between a shape and the border, at all times
VAL_SHARE = 0.1
MIN_CLIPS = 20
SETTINGS = "corpus.json"
TEST = "classification_test.csv"
VERSION = 8  # raise it when the same settings draw something else

COLOURS = {  # RGB; backgrounds stay grey, so that all eight stand out
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
MOTIONS = ("向上移动", "向下移动", "慢慢变大", "慢慢变小")  # none of them changes in a mirror
DIRECTIONS = {"向上移动": -1, "向下移动": 1}  # along y, which points down
# The class of a clip is that of its motion: a classifier has to look at more than one frame.
LABELS = dict(zip(MOTIONS, ("汽车", "足球", "萌娃日常", "科技"), strict=True))
assert set(LABELS.values()) <= set(CLASS_NAMES)


class Clip(NamedTuple):
    """One clip to draw. `file` is relative to the video root; `seed` fixes everything that the title does not say."""

    file: str
    colour: str
    shape: str
    motion: str
    seed: tuple[int, ...]

    @property
    def title(self) -> str:
        """What the clip shows, motion included."""
        return f"{self.colour}的{self.shape}在{self.motion}"

    @property
    def plain_title(self) -> str:
        """The title without the motion, which is what the class stands for."""
        return f"{self.colour}的{self.shape}"

    @property
    def references(self) -> list[str]:
        """Three captions that say the same, the title first."""
        return [
            self.title,
            f"一个{self.colour}的{self.shape}正在{self.motion}",
            f"画面中有一个{self.shape}，它是{self.colour}的，正在{self.motion}",
        ]


def plan(clips: int, seed: int) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """What to draw: (training clips, validation clips, gallery); a tenth of `clips` for validation, the gallery besides.

    Eight combinations are held out, one a colour, two a shape and two a motion: few enough that colour and shape do not
    give the motion away. Validation takes them in turn, training the other 120. The gallery, which retrieval validates on and
    classification tests on, has a new clip of every combination: no two of its titles are alike, and its classes are equal in number.
    """
    if clips < MIN_CLIPS:
        raise ValueError(f"--clips {clips}: at least {MIN_CLIPS} are needed for a training and a validation part")
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


def all_texts() -> list[str]:
    """What the language of this corpus can say: a language model may know it before it sees a video, and no more than that.

    Every title with every class of its shape and colour, yes and no to every title: the answers are in the videos alone.
    """
    clips = [Clip("", *words, seed=()) for words in itertools.product(COLOURS, SHAPES, MOTIONS)]
    titles = [clip.title for clip in clips]
    classes = [f"视频标题：{clip.plain_title} 视频类目：{LABELS[clip.motion]}" for clip in clips]
    matches = [f"标题：{title} 这个视频与标题匹配吗？{answer}" for title in titles for answer in "是否"]
    return titles * 3 + classes + matches + list(CLASS_NAMES)  # titles are what the videos are trained through


def outline(shape: str) -> np.ndarray:
    """Corners of a polygon shape within [-1, 1], x to the right and y down: [corners, 2]."""
    if shape == "正方形":
        return np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    if shape == "三角形":
        return np.array([(0, -1), (1, 0.85), (-1, 0.85)])
    raise ValueError(f"{shape} is not a polygon")


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1: f32[SIZE, SIZE, 1]. All lengths in pixels."""
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
    """A still, greyish background between dark and bright: f32[SIZE, SIZE, 3]."""
    first, second = (rng.uniform(100, 165) + rng.uniform(-9, 9, 3) for _ in range(2))
    v, u = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    along = u * math.cos(angle) + v * math.sin(angle)
    slope = rng.random() < 0.5  # of brightness; else soft stripes
    mix = along + 0.5 if slope else 0.5 + 0.4 * np.sin(2 * math.pi * rng.uniform(2, 4) * along)
    return (first + np.clip(mix, 0, 1)[..., None] * (second - first)).astype(np.float32)  # [SIZE, SIZE, 3]


def path_of(motion: str, rng: np.random.Generator) -> np.ndarray:
    """Where the shape is in each frame: f64[FRAMES, 3] of x, y and radius in pixels, wholly inside the picture.

    A moving shape goes at least 42 pixels, a growing or shrinking one changes its radius at least twofold, both evenly
    over the clip, so that any few frames spread over it tell the motion.
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
    """The clip's pictures: uint8[FRAMES, SIZE, SIZE, 3], RGB."""
    rng = np.random.default_rng(clip.seed)
    behind = background(rng)
    colour = np.clip(np.array(COLOURS[clip.colour]) + rng.uniform(-10, 10, 3), 0, 255)
    frames = []
    for x, y, radius in path_of(clip.motion, rng):
        mask = coverage(clip.shape, x, y, radius)
        frames.append(np.round(behind + mask * (colour - behind)).astype(np.uint8))
    return np.stack(frames)


def write_clip(clip: Clip, root: Path) -> None:
    """Draws the clip and encodes it as h264 in mp4. One thread, so that equal clips are equal files."""
    cv2.setNumThreads(1)
    with av.open(str(root / clip.file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=ENCODER)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in frames_of(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_tables(clips: list[Clip], split: str, root: Path, gallery: list[Clip] | None = None) -> None:
    """The release's four CSVs of one split, and one of questions. As there, the benchmarks train on fewer clips than pre-training, here a third.

    Captioning has one caption a row in training, a list of three in validation; the titles of classification do not say the
    motion, which is what the class stands for.
    """
    for kind in COLUMNS:
        share = len(clips) if kind == "pretrain" or split == "val" else math.ceil(len(clips) / 3)
        shown = gallery if gallery and kind == "retrieval" else clips[:share]
        write_table(root / f"{kind}_{split}.csv", kind, split, shown)


def write_table(path: Path, kind: str, split: str, clips: list[Clip]) -> None:
    """One CSV of `clips`, with the columns of its kind."""
    file_column, text_columns = COLUMNS[kind]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((file_column, *text_columns))
        writer.writerows((clip.file, *texts_of(clip, kind, split)) for clip in clips)


def texts_of(clip: Clip, kind: str, split: str) -> tuple[str, ...]:
    """The text columns of a clip in one kind of CSV."""
    if kind == "classification":
        return clip.plain_title, LABELS[clip.motion]
    if kind == "question":
        return f"{clip.plain_title}在做什么", clip.motion
    if kind == "captioning" and split == "val":
        return (str(clip.references),)
    return (clip.title,)


def is_drawn(out: Path, settings: dict[str, int], files: list[str]) -> bool:
    """Whether `out` holds this corpus already. Raises FileExistsError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out} exists and is not a corpus of draw_shapes: give another --out") from None
    if found != settings:
        raise FileExistsError(
            f"{out} holds a corpus drawn with {found}, not {settings}: remove it or give another --out"
        )
    tables = [f"{kind}_{split}.csv" for kind in COLUMNS for split in ("train", "val")]
    missing = [name for name in (*files, *tables, TEST) if not (out / name).is_file()]
    if missing:
        raise FileExistsError(
            f"{out} lacks {len(missing)} of its files, such as {missing[0]}: remove it and draw again"
        )
    return True


def draw(out: Path, clips: int = 1200, seed: int = 0) -> bool:
    """Draws the corpus into `out`, which appears only when it is complete; returns False where it was there already.

    Raises ValueError for too few clips, FileExistsError where `out` holds anything but the same corpus.
    """
    train, val, gallery = plan(clips, seed)
    everything = train + val + gallery
    settings = {"version": VERSION, "clips": clips, "seed": seed}
    if is_drawn(out, settings, [clip.file for clip in everything]):
        return False
    partial = out.with_name(f".{out.name}.partial")  # also sweeps what a killed run left
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "videos").mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be made: {error.strerror}; give another --out", str(out)) from None
    try:
        workers = min(os.cpu_count() or 1, math.ceil(clips / 32))
        # Spawned, not forked: the caller may have threads.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            drawn = pool.map(write_clip, everything, [partial] * len(everything), chunksize=8)
            for _ in bar(drawn, "drawing", "clip", total=len(everything)):
                pass
        write_tables(train, "train", partial)
        write_tables(val, "val", partial, gallery)
        write_table(partial / TEST, "classification", "test", gallery)
        (partial / "answers.txt").write_text("".join(f"{motion}\n" for motion in MOTIONS), encoding="utf-8")
        (partial / "texts.txt").write_text("".join(f"{text}\n" for text in all_texts()), encoding="utf-8")
        facts = {
            "settings": settings,
            "train": len(train),
            "val": len(val),
            "gallery": len(gallery),
            "frames": FRAMES,
            "fps": FPS,
            "size": SIZE,
        }
        (partial / SETTINGS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for a mistake."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("draw_shapes", __doc__.splitlines()[0])
    parser.add_argument("--out", type=local_path, required=True, help="folder to make: the video root and its CSVs")
    parser.add_argument("--clips", type=int, default=1200, help="clips in all, a tenth for validation (default 1200)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default 0)")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    drawn = draw(out, args.clips, args.seed)
    train, val, _ = plan(args.clips, args.seed)
    print(f"{out}: {len(train)} training and {len(val)} validation clips{'' if drawn else ', drawn before'}")
    print(f"titles such as {train[0].title}; the combinations in validation are not in training")


if __name__ == "__main__":
    sys.exit(main())
