"""Planted corpora: raw uploads with known faults, to measure a curation with. `draw_shapes --plant SEED --out DIR` writes them.

`raw.csv` (`video_id:FILE`, `title`, `source`) lists the uploads in `videos/`, and `truth.csv` (`video_id:FILE`, `fault`, `original`)
what is wrong with each: clean, duplicate (a changed copy of another clip, `original`), black, frozen, text (a title with an address, a
phone number, an advertisement, ...) or wrong_title (the title of another clip, `original`, which differs in colour and shape).
`plant.json` has the settings, and for each file what exactly was done to it.
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep import corpus_folder, plant_copies, plant_titles
from data_prep.plant_scenes import WORDS, Scene, frames_of, says_something_else
from ymplug_jax.data.schema import COLUMNS

SETTINGS, RAW, TRUTH = "plant.json", "raw.csv", "truth.csv"
VERSION = 1  # increase it when the same settings draw other files
MIN_CLIPS = 60
SHARES = {"duplicate": 0.16, "black": 0.05, "frozen": 0.05, "text": 0.08, "wrong_title": 0.06}  # the others are clean
SOURCES = 12
RATE = 12  # frames per second
# Clean clips that a careless rule would drop: a black intro, bars at the edges, a standstill in the second half.
CLEAN_KINDS = {"": 0.79, "intro": 0.07, "bars": 0.07, "pause": 0.07}
BLACKS = ("all", "noise", "logo", "late")
STILLS = ("copies", "grain")


class Upload(NamedTuple):
    """One row of the corpus."""

    file: str
    title: str
    source: str
    fault: str
    kind: str  # what exactly is done to the scene or the title
    original: str  # file
    scene: Scene  # of the original, for a copy
    scene_kind: str  # kind of the clean clip that is shown
    seed: tuple[int, ...]  # of what is done


def plan(clips: int, seed: int) -> list[Upload]:
    """Plan a corpus: `clips` uploads in the order of raw.csv. All is determined by `seed`.

    Raises:
      ValueError: too few clips, or more than there are distinct titles.
    """
    if not MIN_CLIPS <= clips <= len(WORDS):
        raise ValueError(
            f"--clips {clips}: a planted corpus has {MIN_CLIPS} to {len(WORDS)} clips; give a number in between"
        )
    rng = np.random.default_rng((seed, 20))
    counts = {fault: round(share * clips) for fault, share in SHARES.items()}
    faults = ["clean"] * (clips - sum(counts.values())) + [
        fault for fault, count in counts.items() for _ in range(count)
    ]
    words = rng.permutation(len(WORDS))
    uploads: list[Upload] = []
    taken: set[str] = set()
    for i, fault in enumerate(faults):
        colour, shape, motion, place = WORDS[words[i]]
        scene = Scene(colour, shape, motion, place, (seed, 21, i))
        file = _name(rng, taken)
        kind = str(rng.choice(list(CLEAN_KINDS), p=list(CLEAN_KINDS.values())))
        one = Upload(file, scene.title, _source(rng), fault, kind, "", scene, kind, (seed, 22, i))
        uploads.append(_with_fault(one, uploads, rng))
    return [uploads[i] for i in rng.permutation(clips)]


def _with_fault(one: Upload, before: Sequence[Upload], rng: np.random.Generator) -> Upload:
    """Return the upload with its fault planted. `before` has all clean uploads."""
    nth = sum(other.fault == one.fault for other in before)  # every kind of a fault has its turn
    clean = [other for other in before if other.fault == "clean"]
    if one.fault == "duplicate":
        kind, original = list(plant_copies.COPIES)[nth % len(plant_copies.COPIES)], clean[rng.integers(len(clean))]
        title = plant_titles.altered(original.title, rng)
        return one._replace(
            kind=kind, original=original.file, title=title, scene=original.scene, scene_kind=original.scene_kind
        )
    if one.fault == "text":
        kind = list(plant_titles.FAULTS)[nth % len(plant_titles.FAULTS)]
        return one._replace(kind=kind, title=plant_titles.FAULTS[kind](one.title, rng))
    if one.fault == "wrong_title":
        others = [other for other in clean if says_something_else(one.scene, other.scene)]
        other = others[rng.integers(len(others))]
        return one._replace(kind="", scene_kind="", title=other.title, original=other.file)
    if one.fault in ("black", "frozen"):
        kinds = BLACKS if one.fault == "black" else STILLS
        return one._replace(kind=kinds[nth % len(kinds)], scene_kind="")
    return one


def _name(rng: np.random.Generator, taken: set[str]) -> str:
    while (file := f"videos/{rng.integers(16**8):08x}.mp4") in taken:
        pass
    taken.add(file)
    return file


def _source(rng: np.random.Generator) -> str:
    """Draw an uploader: the n-th has a share in proportion to 1 / n."""
    shares = 1 / np.arange(1, SOURCES + 1)
    return f"uploader_{rng.choice(SOURCES, p=shares / shares.sum()):02d}"


def pictures(one: Upload) -> np.ndarray:
    """Draw the frames of an upload: uint8[N, H, W, 3], RGB."""
    frames, rng = frames_of(one.scene), np.random.default_rng(one.seed)
    frames = _of_kind(frames, one.scene_kind, np.random.default_rng((*one.scene.seed, 1)))
    if one.fault == "duplicate":
        return plant_copies.COPIES[one.kind](frames, rng)
    if one.fault == "black":
        return _black(frames, one.kind, rng)
    if one.fault == "frozen":
        frozen = np.repeat(frames[len(frames) // 2][None], len(frames), axis=0)
        noise = rng.normal(0, 2.0 if one.kind == "grain" else 0.0, frozen.shape)
        return np.clip(np.round(frozen + noise), 0, 255).astype(np.uint8)
    return frames


def _of_kind(frames: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return the frames of a clean clip of a kind of CLEAN_KINDS."""
    if kind == "intro":
        return np.concatenate([np.zeros_like(frames[:3]), frames])
    if kind == "bars":
        return plant_copies.letterboxed(frames, rng)
    if kind == "pause":
        half = len(frames) // 2
        return np.concatenate([frames[:half], np.repeat(frames[half][None], len(frames) - half, axis=0)])
    return frames


def _black(frames: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a black clip: all black, with noise, with a small logo, or black after the first fifth of a scene."""
    black = np.zeros_like(frames)
    if kind == "noise":
        return rng.integers(0, 12, frames.shape, np.uint8)
    if kind == "logo":
        height, width = frames.shape[1:3]
        black[:, height // 20 : height // 20 + height // 14, width // 20 : width // 20 + width // 8] = 220
    if kind == "late":
        black[: len(frames) // 5] = frames[: len(frames) // 5]
    return black


def write_upload(one: Upload, root: Path) -> None:
    """Draw an upload and write its file."""
    strong = one.fault == "duplicate" and one.kind == "recoded"
    plant_copies.write(pictures(one), root / one.file, RATE, plant_copies.STRONG if strong else plant_copies.CLEAN)


def write_tables(uploads: Sequence[Upload], settings: dict[str, int], root: Path) -> None:
    """Write raw.csv, truth.csv and plant.json."""
    file_column, (title_column, *_) = COLUMNS["pretrain"]
    for name, header, rows in (
        (RAW, (file_column, title_column, "source"), [(one.file, one.title, one.source) for one in uploads]),
        (TRUTH, (file_column, "fault", "original"), [(one.file, one.fault, one.original) for one in uploads]),
    ):
        with open(root / name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    facts = {
        "settings": settings,
        "counts": dict(sorted(Counter(one.fault for one in uploads).items())),
        "kinds": {one.file: one.kind for one in uploads},
    }
    (root / SETTINGS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


Draw = Callable[[list[tuple[Callable[[Any, Path], None], Any]], Path], None]


def plant(out: Path, clips: int, seed: int, draw_all: Draw) -> bool:
    """Draw a planted corpus to `out`, which appears only when it is complete. Returns False if it already existed.

    Args:
      out: folder to create.
      clips: number of uploads.
      seed: equal seeds give identical files.
      draw_all: writes all files, (function, upload) each, below a folder.

    Raises:
      ValueError: too few or too many clips.
      FileExistsError: `out` holds anything but the same corpus.
    """
    uploads, settings = plan(clips, seed), {"version": VERSION, "clips": clips, "plant": seed}
    if corpus_folder.holds(out, SETTINGS, settings, [RAW, TRUTH, *(one.file for one in uploads)], how="planted"):
        return False
    partial = out.with_name(f".{out.name}.partial")  # fixed name, so that leftovers of a killed run are removed
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "videos").mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be created ({error.strerror}); choose another --out", str(out)) from None
    try:
        draw_all([(write_upload, one) for one in uploads], partial)
        write_tables(uploads, settings, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True
