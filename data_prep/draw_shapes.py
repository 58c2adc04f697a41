"""Draw a small corpus of videos of moving coloured shapes, with Chinese titles that describe them.

    python -m data_prep.draw_shapes --out runs/corpus --clips 1200 --seed 0
    python -m data_prep.draw_shapes --out runs/corpus --clips 20 --chat 1600

A title is determined by its video (one template of colour, shape and motion), so a generated title can be scored by comparison
with the true one. 8 of the 128 combinations are held out for validation; every pair of colour and shape, shape and motion, and
colour and motion occurs in training. Clips also differ in background, size, position and speed.

The output folder is a video root with the CSVs of Youku-mPLUG and questions about the motion: `videos/*.mp4`,
`pretrain_{train,val}.csv`, `classification_{train,val}.csv`, `retrieval_{train,val}.csv`, `captioning_{train,val}.csv`,
`question_{train,val}.csv`, `classification_test.csv`, `answers.txt`, `texts.txt` and `corpus.json` (settings and counts).
`texts.txt` is the pre-training text of a language model: every title, and the prompts for classes and matches with every answer.
In `classification_val.csv`, the title is misleading, because its colour and shape occur only with the three other motions in
training. The test CSV contains every combination once, so that titles carry no information about the class.

`--chat` adds clips of one or two motions in a row and of written numbers, with conversations about them (see the module
`data_prep.chat_clips`): `chat_titles_{train,val}.csv`, `chat_texts.txt`, `instruct_{train,val}.jsonl`, `instruct_backwards.jsonl`
(the moving clips of validation played backwards, with the answers that are then right), `instruct_scene.jsonl` (what a whole validation clip shows) and `instruct_text_{train,val}.jsonl`
(titles in place of clips).

`--plant SEED` draws raw uploads with known faults instead, to measure a curation with (see the module `data_prep.plant`):

    python -m data_prep.draw_shapes --plant 0 --out runs/raw --clips 400
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import chat_clips, chat_rows, corpus_folder, plant
from data_prep.chat_clips import ChatClip
from data_prep.flags import Parser, bar, local_path, run
from data_prep.shape_clips import FPS, FRAMES, MOTIONS, SIZE, plan, write_clip
from data_prep.shape_tables import all_texts, write_table, write_tables, write_titles
from ymplug_jax.data.schema import COLUMNS

SETTINGS = "corpus.json"
TEST = "classification_test.csv"
VERSION = 8  # increase it when the same settings draw other files
CHAT_TRAIN_SHARE = 8  # so many training clips of the chat for one of validation
MOST_CHAT_VAL = 200  # clips of validation
MIN_CHAT = 80
CHAT_TABLES = (
    *(f"chat_titles_{split}.csv" for split in ("train", "val")),
    *(f"instruct_{name}.jsonl" for name in ("train", "val", "backwards", "scene", "text_train", "text_val")),
    "chat_texts.txt",
)


class Chat(NamedTuple):
    """The clips of the chat."""

    train: list[ChatClip]
    val: list[ChatClip]
    backwards: list[ChatClip]

    @property
    def stills(self) -> list[ChatClip]:
        """Clips of which a still image is written."""
        return self.train[:: chat_rows.IMAGE_EVERY]

    @property
    def files(self) -> list[str]:
        """All files of clips and images."""
        clips = [clip.file for clip in (*self.train, *self.val, *self.backwards)]
        return clips + [chat_clips.still_of(clip.file) for clip in self.stills]


def plan_chat(clips: int, seed: int) -> Chat:
    """Plan the clips of the chat: `clips` for training and an eighth of them, at most 200, besides for validation; 0: none.

    Raises:
      ValueError: too few clips.
    """
    if 0 < clips < MIN_CHAT:
        raise ValueError(f"--chat {clips}: too few for training and validation splits; give {MIN_CHAT} or more")
    val = chat_clips.plan("val", min(clips // CHAT_TRAIN_SHARE, MOST_CHAT_VAL), seed)
    backwards = [clip.played_backwards() for clip in val if clip.motions]
    return Chat(chat_clips.plan("train", clips, seed), val, backwards)


def write_chat_tables(chat: Chat, seed: int, root: Path) -> None:
    """Write titles, texts and conversations of the chat."""
    write_titles(root / "chat_titles_train.csv", [(clip.file, clip.title) for clip in chat.train])
    write_titles(root / "chat_titles_val.csv", [(clip.file, clip.title) for clip in chat.val])
    texts = chat_rows.texts_of(chat_clips.every_clip())
    (root / "chat_texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    for name, rows in (
        ("train", chat_rows.training_rows(chat.train, seed)),
        ("val", chat_rows.test_rows(chat.val)),
        ("backwards", chat_rows.test_rows(chat.backwards)),
        ("scene", chat_rows.scene_rows(chat.val)),
        ("text_train", chat_rows.text_rows(chat.train, seed)),
        ("text_val", chat_rows.text_rows(chat.val, seed)),
    ):
        chat_rows.write_rows(root / f"instruct_{name}.jsonl", rows)


def is_drawn(out: Path, settings: dict[str, int], files: list[str]) -> bool:
    """Return whether `out` already holds this corpus. Raises FileExistsError if it holds anything else."""
    tables = [f"{kind}_{split}.csv" for kind in COLUMNS for split in ("train", "val")]
    if "chat" in settings:
        tables += CHAT_TABLES
    return corpus_folder.holds(out, SETTINGS, settings, [*files, *tables, TEST])


def draw(out: Path, clips: int = 1200, seed: int = 0, chat: int = 0) -> bool:
    """Draw the corpus to `out`, which appears only when it is complete. Returns False if it already existed.

    Raises:
      ValueError: too few clips.
      FileExistsError: `out` holds anything but the same corpus.
    """
    train, val, gallery = plan(clips, seed)
    everything, talk = train + val + gallery, plan_chat(chat, seed)
    settings = {"version": VERSION, "clips": clips, "seed": seed, **({"chat": chat} if chat else {})}
    if is_drawn(out, settings, [clip.file for clip in everything] + talk.files):
        return False
    partial = out.with_name(f".{out.name}.partial")  # fixed name, so that leftovers of a killed run are removed
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "videos").mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be created ({error.strerror}); choose another --out", str(out)) from None
    try:
        jobs: list[tuple[Callable[[Any, Path], None], Any]] = [(write_clip, clip) for clip in everything]
        if chat:
            (partial / "images").mkdir()
            jobs += [(chat_clips.write_clip, clip) for clip in (*talk.train, *talk.val, *talk.backwards)]
            jobs += [(chat_clips.write_still, clip) for clip in talk.stills]
            write_chat_tables(talk, seed, partial)
        _draw_all(jobs, partial)
        write_tables(train, "train", partial)
        write_tables(val, "val", partial, gallery)
        write_table(partial / TEST, "classification", "test", gallery)
        (partial / "answers.txt").write_text("".join(f"{motion}\n" for motion in MOTIONS), encoding="utf-8")
        (partial / "texts.txt").write_text("".join(f"{text}\n" for text in all_texts()), encoding="utf-8")
        counts = {"train": len(train), "val": len(val), "gallery": len(gallery)}
        if chat:
            counts |= {"chat_train": len(talk.train), "chat_val": len(talk.val)}
        facts = {"settings": settings, **counts, "frames": FRAMES, "fps": FPS, "size": SIZE}
        (partial / SETTINGS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _draw_all(jobs: list[tuple[Callable[[Any, Path], None], Any]], root: Path) -> None:
    """Write all files, (function, clip) each, in several processes."""
    functions, clips = zip(*jobs, strict=True)
    workers = min(os.cpu_count() or 1, math.ceil(len(jobs) / 32))
    # Spawned, not forked, because the caller may have threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(_write, functions, clips, [root] * len(jobs), chunksize=8)
        for _ in bar(drawn, "drawing", "clip", total=len(jobs)):
            pass


def _write(function: Callable[[Any, Path], None], clip: Any, root: Path) -> None:
    function(clip, root)


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("draw_shapes", __doc__.splitlines()[0])
    parser.add_argument("--out", type=local_path, required=True, help="folder to create: the video root and its CSVs")
    parser.add_argument(
        "--clips",
        type=int,
        help="number of clips, a tenth of them for validation (default 1200); with --plant, number of uploads (default 400)",
    )
    parser.add_argument("--seed", type=int, help="seed; equal seeds give identical files (default 0)")
    parser.add_argument(
        "--chat",
        type=int,
        default=0,
        help="number of training clips with conversations; an eighth of it, at most 200, is drawn for validation besides (default 0: none)",
    )
    parser.add_argument(
        "--plant",
        type=int,
        metavar="SEED",
        help="draw raw uploads with known faults: raw.csv, videos/ and truth.csv; equal seeds give identical files",
    )
    args = parser.parse_args(argv)
    out = args.out.absolute()
    if args.plant is not None:
        return _plant(parser, args, out)
    clips, seed = 1200 if args.clips is None else args.clips, args.seed or 0
    drawn = draw(out, clips, seed, args.chat)
    train, val, _ = plan(clips, seed)
    print(f"{out}: {len(train)} training and {len(val)} validation clips{'' if drawn else ', already drawn'}")
    print(f"titles such as {train[0].title}; the combinations of the validation clips do not occur in training")
    if args.chat:
        chat = plan_chat(args.chat, seed)
        print(
            f"conversations about {len(chat.train)} training and {len(chat.val)} validation clips of one or two motions or a number"
        )


def _plant(parser: Parser, args: argparse.Namespace, out: Path) -> None:
    """Run `--plant`."""
    if args.seed is not None or args.chat:
        parser.error(f"--{'chat' if args.chat else 'seed'}: --plant has no such choice; remove the flag")
    if args.plant < 0:
        parser.error(f"--plant {args.plant}: not a seed; give 0 or more")
    clips = 400 if args.clips is None else args.clips
    drawn = plant.plant(out, clips, args.plant, _draw_all)
    counts = Counter(one.fault for one in plant.plan(clips, args.plant))
    faults = ", ".join(f"{count} {fault}" for fault, count in counts.most_common())
    print(f"{out}: {clips} uploads{'' if drawn else ', already drawn'}: {faults}")


if __name__ == "__main__":
    sys.exit(main())
