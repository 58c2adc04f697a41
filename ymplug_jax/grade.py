"""Graded evaluation: people grade the answers of several systems to questions about videos, without knowing which system answered.

    python -m ymplug_jax.grade sheet --questions questions.jsonl --video_root videos \\
        --system base=base.jsonl --system tuned=tuned.jsonl --out sheet.html
    python -m ymplug_jax.grade aggregate --key sheet.key.json --grades grades-*.json --out grades_result.json

`sheet` writes one HTML file for the graders and a key, which they must not see. A system is NAME=FILE, its answers as JSON lines
{"id": ..., "answer": ...}, or NAME=RUN, the folder of a run of the chat model. The run then answers the questions as
`ymplug_jax.predict chat --questions` does, into a file beside the sheet. Graders open the sheet in a browser, offline, choose a grade
from A to D for every answer, and export their grades. `aggregate` needs the files of three or more graders.

Exit codes: 0; 2 a mistake in the command or in a file; 5 a disk failed; 130 Ctrl-C.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ymplug_jax.core import exits, place_copies
from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.grading import grades, question_sets, results, sheets
from ymplug_jax.grading.question_sets import Question

FRAMES, MOST_FRAMES = 8, 16
HEIGHT = 240  # of a frame on the sheet, pixels


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a `Mistake`."""
        raise Mistake(f"{message}; --help lists the flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        args = _parser().parse_args(argv)
        return int(args.run(args))
    except (Mistake, PlaceFailed) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return exits.MISTAKE if isinstance(error, Mistake) else exits.PLACE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return exits.STOPPED


def _parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m ymplug_jax.grade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(required=True, metavar="{sheet,aggregate}")
    sheet = commands.add_parser("sheet", help="make a blind grading sheet")
    add = sheet.add_argument
    add(
        "--questions",
        type=place_copies.local_only,
        required=True,
        metavar="FILE.jsonl",
        help="question set: id, video, question, category",
    )
    add("--video_root", type=place_copies.local_only, required=True, metavar="DIR", help="folder of the videos")
    add(
        "--system",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="answers (JSON lines) or run folder of a system; once for each of two or more",
    )
    add(
        "--out",
        type=place_copies.local_only,
        required=True,
        metavar="FILE.html",
        help="sheet to write; the key is written to FILE.key.json",
    )
    add("--frames", type=int, default=FRAMES, help=f"frames shown of each video, 1 to {MOST_FRAMES} (default {FRAMES})")
    add(
        "--seed",
        default="",
        metavar="TEXT",
        help="order of the answers; the same seed makes the same sheet (default: drawn at random)",
    )
    sheet.set_defaults(run=_sheet)
    aggregate = commands.add_parser("aggregate", help="aggregate the grades of three or more graders")
    add = aggregate.add_argument
    add(
        "--key",
        type=place_copies.local_only,
        required=True,
        metavar="FILE.key.json",
        help="key that was written with the sheet",
    )
    add(
        "--grades",
        type=place_copies.local_only,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE.json",
        help="exported grades, one file for each grader",
    )
    add("--out", type=place_copies.local_only, metavar="FILE.json", help="write all results to this file")
    add("--samples", type=int, default=10_000, help="bootstrap samples, 100 to 1,000,000 (default 10000)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    aggregate.set_defaults(run=_aggregate)
    return made  # fmt: skip


def _sheet(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise Mistake(f"--out {args.out}: not the name of an HTML file; give a name that ends in .html")
    _check_out(args.out)
    if not 1 <= args.frames <= MOST_FRAMES:
        raise Mistake(f"--frames: {args.frames} is out of range; give 1 to {MOST_FRAMES}")
    systems = _systems(args.system)
    questions = question_sets.read_questions(args.questions)
    files = _videos(questions, args.video_root)
    answers = {}
    for name, path in systems.items():
        if "://" in path or Path(path).is_dir():
            path = str(_answer(path, args.questions, args.video_root, args.out.with_suffix(f".{_plain(name)}.jsonl")))
        answers[name] = question_sets.read_answers(Path(path), questions)
    key = sheets.blind(questions, answers, args.seed or sheets.new_seed())
    html = sheets.page(key, _frames(files, args.frames))
    place = args.out.with_suffix(".key.json")
    _write(place, sheets.as_json(key))  # first: a sheet without its key could not be evaluated
    _write(args.out, html)
    print(
        f"sheet: {args.out} ({len(key.names)} answers to {len(questions)} questions)\nkey, not for the graders: {place}"
    )
    return 0


def _aggregate(args: argparse.Namespace) -> int:
    if args.out:
        _check_out(args.out)
    if not 100 <= args.samples <= 1_000_000:
        raise Mistake(f"--samples: {args.samples} is out of range; give 100 to 1,000,000")
    if args.seed < 0:
        raise Mistake(f"--seed: {args.seed} is negative; give 0 or more")
    key = sheets.read_key(args.key)
    found = results.aggregate(key, grades.read(args.grades, key), samples=args.samples, seed=args.seed)
    if args.out:
        _write(args.out, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    print(results.text(found))
    return 0


def _answer(run: str, questions: Path, root: Path, out: Path) -> Path:
    """Let a run of the chat model answer the questions, and return the file of its answers."""
    from ymplug_jax import predict

    print(f"{run}: answers to {out}", flush=True)
    flags = ["--checkpoint", run, "--questions", str(questions), "--video_root", str(root), "--out", str(out)]
    if predict.main(["chat", *flags]):
        raise Mistake(f"--system {run}: not all questions are answered; see the messages above and the errors in {out}")
    return out


def _plain(name: str) -> str:
    """A name of a system as part of a file name."""
    return re.sub(r"[^\w-]+", "_", name)


def _systems(given: Sequence[str]) -> dict[str, str]:
    """Name -> answers or run folder of each system."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name.strip() and equals and path):
            raise Mistake(f"--system {text}: not NAME=PATH; give a name and a file or folder, such as base=base.jsonl")
        if name.strip() in found:
            raise Mistake(f"--system {text}: the name {name.strip()!r} is used twice; give every system its own")
        found[name.strip()] = path
    if len(found) < 2:
        raise Mistake("--system: only one system; give two or more to compare")
    return found


def _check_out(out: Path) -> None:
    """Check that a file can be written, before any work is done."""
    if out.is_dir():
        raise Mistake(f"--out {out}: a folder, not a file; give a file in it")
    if not out.parent.is_dir():
        raise Mistake(f"--out {out}: no such folder {out.parent}; create it first")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise Mistake(f"--out {out}: no permission to write there; check its permissions, or choose another file")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text.encode("utf-8", "replace"))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PlaceFailed(f"{path}: cannot be written ({error.strerror or error}); choose another file") from None


def _videos(questions: Sequence[Question], root: Path) -> dict[str, Path]:
    """File of each video, which lies below the root."""
    whole = root.resolve()
    found = {}
    for question in questions:
        file = root / question.video
        if not file.resolve().is_relative_to(whole):
            raise Mistake(f"{question.video}: a link leads outside {root}; copy the video into that folder")
        if not file.is_file():
            raise Mistake(f"{file}: no such file; correct --video_root, or the question set")
        found[question.video] = file
    return found


def _frames(files: dict[str, Path], count: int) -> dict[str, list[str]]:
    """Data URIs of the frames of each video."""
    from ymplug_jax.data.video_file import Reject
    from ymplug_jax.inference import clip_stream
    from ymplug_jax.inference.clip_stream import File
    from ymplug_jax.reports import pictures

    names = list(files)
    found = {}
    given = [File(str(files[name]), True) for name in names]
    for reads in clip_stream.read_all(given, 4, min(clip_stream.decoders(), len(given))):
        for read in reads:
            if isinstance(read.clip, Reject):
                raise Mistake(
                    f"{read.file.name}: {read.clip.reason}: {read.clip.detail}; take its questions out of the set"
                )
            stored = read.clip.frames[: read.clip.decoded]
            chosen = sorted({(2 * i + 1) * len(stored) // (2 * count) for i in range(count)})
            drawn = [pictures.thumbnail(stored[i], HEIGHT) for i in chosen]
            found[names[read.number]] = [uri for uri in drawn if uri]
    return found


if __name__ == "__main__":
    sys.exit(main())
