"""Answers about video files from a run's checkpoint.

    python -m ymplug_jax.predict classify --checkpoint RUN --video clip.mp4 [--title TEXT]
    python -m ymplug_jax.predict caption  --checkpoint RUN --video clip.mp4 other.mkv
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video FOLDER --text "红色的圆形" [--export index.npz]
    python -m ymplug_jax.predict retrieve --checkpoint RUN --index index.npz --text "红色的圆形"
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video clip.mp4 --text TEXT TEXT ... --rank texts

Files are decoded as data_prep does, so that a model sees what it was trained on. Answers come in the order of the files while
later files are still decoded, in memory that does not grow with their number. A folder stands for all files in it, sorted
by name as bytes; those that are no videos are counted and named. A file that cannot be read costs one line on
stderr and exit code 1; the others are answered all the same.

`--json` prints one JSON object a line, valid in every terminal: what its encoding lacks is escaped, and bytes of a file name
that are not UTF-8 appear as \\udc80 to \\udcff, which `os.fsencode` turns back. `--sheet FILE.png` draws the frames that
the model saw, with the answer. `--export FILE` writes an index under exactly this name and replaces an older index once
the new one is whole; after a stop the same command goes on, from FILE.part.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ymplug_jax.core import exits
from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.inference.wording import as_json, readable, shown
from ymplug_jax.training import hosts

if TYPE_CHECKING:  # decoding processes import this module again: it stays light
    from ymplug_jax.inference.clip_stream import File, Read

COMMANDS = ("classify", "caption", "retrieve")
ONLY_FOR = {"title": "classify", "text": "retrieve", "index": "retrieve", "export": "retrieve", "rank": "retrieve"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 where some files could not be read, 2 for a mistake in the command, 5 where a disk failed."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer that a terminal cannot show is not lost
    hosts.without_accelerator()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except (Mistake, PlaceFailed) as error:
        print("error:", " ".join(shown(line.strip()) for line in str(error).splitlines()), file=sys.stderr)
        return exits.MISTAKE if isinstance(error, Mistake) else exits.PLACE
    except _Closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return exits.STOPPED


class _Closed(Exception):
    """The reader of the answers has gone, as `head` does."""


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; see --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      Mistake: an unknown command or flag, named with the nearest one, or a value that cannot be read.
    """
    parser = _Parser(
        prog="python -m ymplug_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", metavar="{" + ",".join(COMMANDS) + "}")
    flags = [
        parser.add_argument("--checkpoint", required=True, help="folder of the run (its --workdir), local or gs://"),
        parser.add_argument("--video", nargs="+", action="extend", default=[], help="video files, or folders of them"),
        parser.add_argument(
            "--title", nargs="+", action="extend", help='classify: titles of the videos, in their order; "" where one has none'
        ),
        parser.add_argument("--text", nargs="+", action="extend", help="retrieve: what to look for"),
        parser.add_argument("--index", type=Path, help="retrieve: search the videos of this index instead of files"),
        parser.add_argument("--export", type=Path, help="retrieve: write the videos as an index (.npz)"),
        parser.add_argument("--rank", choices=["videos", "texts"], help="retrieve: what is ranked (default videos)"),
        parser.add_argument("--best", type=int, help="answers to give for each question (default 5)"),
        parser.add_argument("--json", action="store_true", help="one JSON object a line"),
        parser.add_argument("--sheet", type=Path, help="draw the frames of 64 clips at most, with the answers, to this PNG"),
        parser.add_argument("--decoders", type=int, help="decoding processes (default: one a core, eight at most)"),
    ]  # fmt: skip
    known = ["--help", *(flag.option_strings[0] for flag in flags)]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--" and not any(flag.startswith(name) for flag in known):
            raise Mistake(f"{name}: no such flag; {_nearest(name, known) or 'see --help'}")
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        raise Mistake(
            f"{args.command}: no such command; {_nearest(args.command, COMMANDS) or 'there are ' + ', '.join(COMMANDS)}"
        )
    return args


def _nearest(word: str, known: Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f"did you mean {found[0]}?" if found else ""


def check(args: argparse.Namespace) -> "list[File]":
    """The files to read, after everything about the command that can be wrong without a model.

    Raises:
      Mistake: flags that do not go together, values that make no sense, or a place that cannot be written.
    """
    from ymplug_jax.inference import clip_stream

    for flag, command in ONLY_FOR.items():
        if getattr(args, flag) is not None and args.command != command:
            raise Mistake(f"--{flag} is for {command}; leave it out, {args.command} does not use it")
    if args.best is not None and args.command == "caption":
        raise Mistake("--best is for classify and retrieve; leave it out, caption gives one answer")
    for flag in ("best", "decoders"):
        if (number := getattr(args, flag)) is not None and number < 1:
            raise Mistake(f"--{flag} {number}: give 1 or more")
    args.best, args.rank = args.best or 5, args.rank or "videos"
    if not args.checkpoint:
        raise Mistake("--checkpoint: an empty name; give the --workdir of a run")
    _check_texts(args)
    if args.command == "retrieve":
        _check_search(args)
    elif not args.video:
        raise Mistake(f"{args.command}: give files with --video")
    _check_places(args)
    files = clip_stream.files_of(args.video)
    if args.title and len(args.title) != len(files):
        raise Mistake(f"--title: {len(args.title)} titles for {len(files)} files; give one for each, in their order")
    return files


def _check_search(args: argparse.Namespace) -> None:
    if args.video and args.index:
        raise Mistake("--video and --index: give files, or an index of files, not both")
    if not args.video and not args.index:
        raise Mistake("retrieve: give videos with --video, or an index with --index")
    if args.index and args.export:
        raise Mistake("--export and --index: an index is written of --video; leave one of them out")
    if not args.text and not args.export:
        raise Mistake("retrieve: give --text to search, or --export to write an index")


def _check_texts(args: argparse.Namespace) -> None:
    from ymplug_jax.data.text import clean_text

    for flag in ("text", "title"):
        if given := getattr(args, flag):
            setattr(args, flag, [_as_text(flag, text) for text in given])
    for text in args.text or []:
        if not clean_text(text, 30):
            raise Mistake(f"--text {text!r}: nothing to look for is left of it; give words")


def _as_text(flag: str, text: str) -> str:
    """A text whose bytes are no text in this terminal's encoding may be UTF-8 all the same, as under LC_ALL=C."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeError:
        raise Mistake(f"--{flag} {text!r}: neither in the encoding of this terminal nor UTF-8; give UTF-8") from None


def _check_places(args: argparse.Namespace) -> None:
    from ymplug_jax.core import index_file

    if path := args.export:
        if path.is_dir():
            raise Mistake(f"{path}: --export is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise Mistake(f"{path}: --export: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise Mistake(f"{path}: --export: no permission to write there; give another place")
    if args.sheet and args.index:
        raise Mistake("--sheet and --index: an index holds no frames; give files with --video")
    if args.sheet:
        from ymplug_jax.reports import contact_sheet

        contact_sheet.check(args.sheet)
    if args.export and args.export.exists():
        try:
            index_file.read(args.export, ("video", "video_id"), setting="--export")
        except Mistake:
            raise Mistake(
                f"{args.export}: --export: a file that is no index is there already; give another name"
            ) from None


def run(args: argparse.Namespace) -> int:
    """Check, then decode, answer and print in a stream."""
    files = check(args)
    from ymplug_jax.inference import answers
    from ymplug_jax.inference.predictor import Predictor

    predictor, reading = Predictor(args.checkpoint, args.command), Reading(files, args)
    answer_all = answers.retrieve if args.command == "retrieve" else answers.describe
    for answer in answer_all(args, predictor, reading):
        say(as_json(answer, sys.stdout.encoding) if args.json else readable(answer))
    reading.report()
    return 1 if reading.failed else 0


class Reading:
    """Files on their way in: what can be read goes on, what cannot is said and counted."""

    def __init__(self, files: "list[File]", args: argparse.Namespace):
        self.files, self._titles, self._processes = files, args.title, args.decoders
        self.failed = 0
        self._out: list[str] = []  # files in folders that are no videos
        self._answered = 0

    def records(self, files: "list[File]", size: int) -> Iterator[list[Any]]:
        """Records of `files` that can be read, in order, in lists of `size` at most; each with the title of its file."""
        from ymplug_jax.core import progress
        from ymplug_jax.inference import clip_stream

        # Answers on the same terminal show how far it is.
        bar: progress.Bar[None] = progress.bar(total=len(files), desc="read", unit="clip", hidden=sys.stdout.isatty())
        with bar:
            for reads in clip_stream.read_all(files, size, self._processes or clip_stream.decoders()):
                found = [record for read in reads if (record := self._record(read)) is not None]
                self._answered += len(found)
                if found:
                    yield found
                bar.update(len(reads))

    def report(self) -> None:
        """Say what was left out.

        Raises:
          Mistake: nothing but that was there.
        """
        if not self._out:
            return
        names = ", ".join(shown(name) for name in self._out[:5]) + (", ..." if len(self._out) > 5 else "")
        count = f"{len(self._out)} of {len(self.files)} files are no videos"
        if not self._answered and not self.failed and len(self._out) == len(self.files):
            raise Mistake(f"no videos in this folder: {count}: {names}; give a folder of videos")
        print(f"{count}: {names}", file=sys.stderr)

    def _record(self, read: "Read") -> Any:
        import numpy as np

        from ymplug_jax.core import progress
        from ymplug_jax.data.records import Record
        from ymplug_jax.inference import clip_stream

        clip = read.clip
        if clip_stream.left_out(read):
            self._out.append(read.file.name)
            return None
        if isinstance(clip, clip_stream.Reject):
            self.failed += 1
            line = f"error: {shown(read.file.name)}: {clip.reason}: {shown(clip.detail)}"
            progress.write(line)
            return None
        title = self._titles[read.number] if self._titles else ""
        return Record(read.file.name, clip.frames, np.array(clip.timestamps, np.int64), title, [], "", -1)


def say(text: str) -> None:
    """One answer on stdout, at once.

    Raises:
      PlaceFailed: the disk that stdout leads to is full.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise _Closed from None
    except OSError as error:
        raise PlaceFailed(
            f"standard output: {error.strerror}; make room or write elsewhere, then run it again"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
