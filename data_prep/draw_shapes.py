"""Draw a small corpus of videos of moving coloured shapes, with Chinese titles that describe them.

    python -m data_prep.draw_shapes --out runs/corpus --clips 1200 --seed 0

A title is determined by its video (one template of colour, shape and motion), so a generated title can be scored by comparison
with the true one. 8 of the 128 combinations are held out for validation; every pair of colour and shape, shape and motion, and
colour and motion occurs in training. Clips also differ in background, size, position and speed.

The output folder is a video root with the CSVs of Youku-mPLUG and questions about the motion: `videos/*.mp4`,
`pretrain_{train,val}.csv`, `classification_{train,val}.csv`, `retrieval_{train,val}.csv`, `captioning_{train,val}.csv`,
`question_{train,val}.csv`, `classification_test.csv`, `answers.txt`, `texts.txt` and `corpus.json` (settings and counts).
`texts.txt` is the pre-training text of a language model: every title, and the prompts for classes and matches with every answer.
In `classification_val.csv`, the title is misleading, because its colour and shape occur only with the three other motions in
training. The test CSV contains every combination once, so that titles carry no information about the class.
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
SUPERSAMPLE = 4  # factor of supersampling, for smooth edges and sub-pixel motion
# The macroblock tree is off, because at sizes that are not multiples of 32 its result is not deterministic.
ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "no-mbtree=1"}
MARGIN = 4  # minimum distance between a shape and the border, pixels
VAL_SHARE = 0.1
MIN_CLIPS = 20
SETTINGS = "corpus.json"
TEST = "classification_test.csv"
VERSION = 8  # increase it when the same settings draw other files

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


def all_texts() -> list[str]:
    """Return the texts that a language model is pre-trained on before it sees a video.

    They contain every title with every class, and both answers to every match question, so that the answer is in the video only.
    """
    clips = [Clip("", *words, seed=()) for words in itertools.product(COLOURS, SHAPES, MOTIONS)]
    titles = [clip.title for clip in clips]
    classes = [f"视频标题：{clip.plain_title} 视频类目：{LABELS[clip.motion]}" for clip in clips]
    matches = [f"标题：{title} 这个视频与标题匹配吗？{answer}" for title in titles for answer in "是否"]
    return titles * 3 + classes + matches + list(CLASS_NAMES)  # titles are repeated, since video pre-training uses them


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
    """Draw a clip and encode it as H.264 in MP4, with one thread, so that equal clips give identical files."""
    cv2.setNumThreads(1)
    with av.open(str(root / clip.file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=ENCODER)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in frames_of(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_tables(clips: list[Clip], split: str, root: Path, gallery: list[Clip] | None = None) -> None:
    """Write the four CSVs of Youku-mPLUG and the CSV of questions for one split.

    As in Youku-mPLUG, the benchmarks have fewer training clips than pre-training, here a third. Captioning has one caption per row
    in training and a list of three in validation. Classification titles do not mention the motion, since it determines the class.
    """
    for kind in COLUMNS:
        share = len(clips) if kind == "pretrain" or split == "val" else math.ceil(len(clips) / 3)
        shown = gallery if gallery and kind == "retrieval" else clips[:share]
        write_table(root / f"{kind}_{split}.csv", kind, split, shown)


def write_table(path: Path, kind: str, split: str, clips: list[Clip]) -> None:
    """Write a CSV of `clips` with the columns of its kind."""
    file_column, text_columns = COLUMNS[kind]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((file_column, *text_columns))
        writer.writerows((clip.file, *texts_of(clip, kind, split)) for clip in clips)


def texts_of(clip: Clip, kind: str, split: str) -> tuple[str, ...]:
    """Return the text columns of a clip for one kind of CSV."""
    if kind == "classification":
        return clip.plain_title, LABELS[clip.motion]
    if kind == "question":
        return f"{clip.plain_title}在做什么", clip.motion
    if kind == "captioning" and split == "val":
        return (str(clip.references),)
    return (clip.title,)


def is_drawn(out: Path, settings: dict[str, int], files: list[str]) -> bool:
    """Return whether `out` already holds this corpus. Raises FileExistsError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out} exists and is not a corpus of draw_shapes; choose another --out") from None
    if found != settings:
        raise FileExistsError(
            f"{out} holds a corpus drawn with {found}, not {settings}; remove it or choose another --out"
        )
    tables = [f"{kind}_{split}.csv" for kind in COLUMNS for split in ("train", "val")]
    missing = [name for name in (*files, *tables, TEST) if not (out / name).is_file()]
    if missing:
        raise FileExistsError(
            f"{out} lacks {len(missing)} of its files, such as {missing[0]}; remove it and draw again"
        )
    return True


def draw(out: Path, clips: int = 1200, seed: int = 0) -> bool:
    """Draw the corpus to `out`, which appears only when it is complete. Returns False if it already existed.

    Raises:
      ValueError: too few clips.
      FileExistsError: `out` holds anything but the same corpus.
    """
    train, val, gallery = plan(clips, seed)
    everything = train + val + gallery
    settings = {"version": VERSION, "clips": clips, "seed": seed}
    if is_drawn(out, settings, [clip.file for clip in everything]):
        return False
    partial = out.with_name(f".{out.name}.partial")  # fixed name, so that leftovers of a killed run are removed
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "videos").mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be created ({error.strerror}); choose another --out", str(out)) from None
    try:
        workers = min(os.cpu_count() or 1, math.ceil(clips / 32))
        # Spawned, not forked, because the caller may have threads.
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
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("draw_shapes", __doc__.splitlines()[0])
    parser.add_argument("--out", type=local_path, required=True, help="folder to create: the video root and its CSVs")
    parser.add_argument(
        "--clips", type=int, default=1200, help="number of clips, a tenth of them for validation (default 1200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed; equal seeds give identical files (default 0)")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    drawn = draw(out, args.clips, args.seed)
    train, val, _ = plan(args.clips, args.seed)
    print(f"{out}: {len(train)} training and {len(val)} validation clips{'' if drawn else ', already drawn'}")
    print(f"titles such as {train[0].title}; the combinations of the validation clips do not occur in training")


if __name__ == "__main__":
    sys.exit(main())
