"""Classify, caption and search video files with a trained run.

    python -m ymplug_jax.predict classify --checkpoint RUN --video clip.mp4 [--title TEXT]
    python -m ymplug_jax.predict caption  --checkpoint RUN --video clip.mp4 other.mkv
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video FOLDER --text "红色的圆形" [--export index.npz]
    python -m ymplug_jax.predict retrieve --checkpoint RUN --index index.npz --text "红色的圆形"
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video clip.mp4 --text TEXT TEXT ... --rank texts

Files are decoded as data_prep does, so that the model sees what it was trained on. Answers are printed in the order of the
files while later files are still being decoded; memory does not grow with their number. A folder stands for all files below
it, sorted by the bytes of their names. Files in it that are not videos are skipped, counted and named. A file that cannot be
read gives one line on stderr and exit code 1; all other files are answered.

--json prints one JSON object per line. Characters that the terminal's encoding lacks are escaped, and bytes of a file name
that are not UTF-8 appear as \\udc80 to \\udcff, which os.fsencode decodes. --sheet FILE.png draws the frames that the model
saw, with the answers. --export FILE writes an index and replaces an older one when the new one is complete; if the command
is interrupted, run it again to continue from FILE.part.

Exit codes: 0; 1 some files could not be read; 2 a mistake in the command; 5 a disk failed; 130 Ctrl-C.
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

if TYPE_CHECKING:  # JAX is imported only after the flags were checked
    from ymplug_jax.inference.clip_stream import File, Read

COMMANDS = ("classify", "caption", "retrieve")
ONLY_FOR = {"title": "classify", "text": "retrieve", "index": "retrieve", "export": "retrieve", "rank": "retrieve"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 if some files could not be read; see `exits` for the others."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape characters that the terminal cannot show
    hosts.without_accelerator()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except (Mistake, PlaceFailed) as error:
        print("error:", " ".join(shown(line.strip()) for line in str(error).splitlines()), file=sys.stderr)
        return exits.MISTAKE if isinstance(error, Mistake) else exits.PLACE
    except _Closed:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # flushing the buffer at exit must not fail again
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return exits.STOPPED


class _Closed(Exception):
    """The program that reads stdout has ended, such as `head`."""


class _Parser(argparse.ArgumentParser):
    """Raises `Mistake` instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; --help lists the flags")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      Mistake: a command or flag is unknown (the message names the nearest one), or a value cannot be parsed.
    """
    parser = _Parser(
        prog="python -m ymplug_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", metavar="{" + ",".join(COMMANDS) + "}")
    flags = [
        parser.add_argument("--checkpoint", required=True, help="folder of the run (its --workdir, or best/ in it), local or gs://"),
        parser.add_argument("--video", nargs="+", action="extend", default=[], help="video files or folders"),
        parser.add_argument(
            "--title", nargs="+", action="extend", help='classify: title of each video, in their order; "" for a video without one'
        ),
        parser.add_argument("--text", nargs="+", action="extend", help="retrieve: texts to search for"),
        parser.add_argument("--index", type=Path, help="retrieve: search this index instead of files"),
        parser.add_argument("--export", type=Path, help="retrieve: write the vectors of the videos to this index (.npz)"),
        parser.add_argument("--rank", choices=["videos", "texts"], help="retrieve: rank videos for each text, or texts for each video (default videos)"),
        parser.add_argument("--best", type=int, help="number of classes or ranks in an answer (default 5)"),
        parser.add_argument("--json", action="store_true", help="print one JSON object per line"),
        parser.add_argument("--sheet", type=Path, help="draw the frames of at most 64 clips, with the answers, to this PNG"),
        parser.add_argument("--decoders", type=int, help="number of decoding processes (default: one per core, at most eight)"),
    ]  # fmt: skip
    known = ["--help", *(flag.option_strings[0] for flag in flags)]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--" and not any(flag.startswith(name) for flag in known):
            raise Mistake(f"{name}: unknown flag; {_nearest(name, known) or '--help lists the flags'}")
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        raise Mistake(
            f"{args.command}: unknown command; {_nearest(args.command, COMMANDS) or 'choose one of ' + ', '.join(COMMANDS)}"
        )
    return args


def _nearest(word: str, known: Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f"did you mean {found[0]}?" if found else ""


def check(args: argparse.Namespace) -> "list[File]":
    """Check everything about the command that needs no model, and list the files to read.

    Raises:
      Mistake: flags exclude each other, a value is out of range, or an output cannot be written.
    """
    from ymplug_jax.inference import clip_stream

    for flag, command in ONLY_FOR.items():
        if getattr(args, flag) is not None and args.command != command:
            raise Mistake(f"--{flag}: {args.command} does not use it, only {command} does; leave it out")
    if args.best is not None and args.command == "caption":
        raise Mistake("--best: caption gives one answer for each video; leave it out")
    for flag in ("best", "decoders"):
        if (number := getattr(args, flag)) is not None and number < 1:
            raise Mistake(f"--{flag} {number}: too small; give 1 or more")
    args.best, args.rank = args.best or 5, args.rank or "videos"
    if not args.checkpoint:
        raise Mistake("--checkpoint: the name is empty; give the --workdir of a run")
    _check_texts(args)
    if args.command == "retrieve":
        _check_search(args)
    elif not args.video:
        raise Mistake(f"--video: missing; give the files to {args.command}")
    _check_places(args)
    files = clip_stream.files_of(args.video)
    if args.title and len(args.title) != len(files):
        raise Mistake(f"--title: {len(args.title)} titles for {len(files)} files; give one for each, in their order")
    return files


def _check_search(args: argparse.Namespace) -> None:
    if args.video and args.index:
        raise Mistake("--video and --index exclude each other; give files or an index")
    if not args.video and not args.index:
        raise Mistake("--video: missing; give video files, or an index with --index")
    if args.index and args.export:
        raise Mistake("--export and --index exclude each other; give --video with --export")
    if not args.text and not args.export:
        raise Mistake("--text: missing; give texts to search for, or --export to write an index")


def _check_texts(args: argparse.Namespace) -> None:
    from ymplug_jax.data.text import clean_text

    for flag in ("text", "title"):
        if given := getattr(args, flag):
            setattr(args, flag, [_as_text(flag, text) for text in given])
    for text in args.text or []:
        if not clean_text(text, 30):
            raise Mistake(f"--text {text!r}: nothing is left after cleaning; give words")


def _as_text(flag: str, text: str) -> str:
    """Decode a text as UTF-8 if the locale could not decode it, for example under LC_ALL=C."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeError:
        raise Mistake(f"--{flag} {text!r}: encoded neither as this terminal nor as UTF-8; give UTF-8") from None


def _check_places(args: argparse.Namespace) -> None:
    from ymplug_jax.core import index_file

    if path := args.export:
        if path.is_dir():
            raise Mistake(f"--export {path}: a folder, not a file; give a file in it")
        if not path.parent.is_dir():
            raise Mistake(f"--export {path}: no such folder {path.parent}; create it first")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise Mistake(
                f"--export {path}: no permission to write there; check its permissions, or choose another file"
            )
    if args.sheet and args.index:
        raise Mistake(
            "--sheet and --index exclude each other, because an index holds no frames; give files with --video"
        )
    if args.sheet:
        from ymplug_jax.reports import contact_sheet

        contact_sheet.check(args.sheet)
    if args.export and args.export.exists():
        try:
            index_file.read(args.export, ("video", "video_id"), setting="--export")
        except Mistake:
            raise Mistake(f"--export {args.export}: the existing file is not an index; choose another file") from None


def run(args: argparse.Namespace) -> int:
    """Check the command, then decode, answer and print the files in a stream. Returns 1 if some could not be read, else 0."""
    files = check(args)
    from ymplug_jax import api
    from ymplug_jax.inference import answers

    model, reading = api.load(args.checkpoint, needs=args.command), Reading(files, args)
    answer_all = answers.retrieve if args.command == "retrieve" else answers.describe
    for answer in answer_all(args, model.predictor, reading):
        say(as_json(answer, sys.stdout.encoding) if args.json else readable(answer))
    reading.report()
    return 1 if reading.failed else 0


class Reading:
    """Reads the files of a command. Files that cannot be read are printed and counted, not raised."""

    def __init__(self, files: "list[File]", args: argparse.Namespace):
        self.files, self._titles, self._processes = files, args.title, args.decoders
        self.failed = 0
        self._skipped: list[str] = []  # files in folders that are not videos
        self._answered = 0

    def records(self, files: "list[File]", size: int) -> Iterator[list[Any]]:
        """Yield the records of the readable `files` in order, in lists of at most `size`, each with the title of its file."""
        from ymplug_jax.core import progress
        from ymplug_jax.inference import clip_stream

        # No bar if the answers are printed on the same terminal.
        bar: progress.Bar[None] = progress.bar(total=len(files), desc="read", unit="clip", hidden=sys.stdout.isatty())
        with bar:
            for reads in clip_stream.read_all(files, size, self._processes or clip_stream.decoders()):
                found = [record for read in reads if (record := self._record(read)) is not None]
                self._answered += len(found)
                if found:
                    yield found
                bar.update(len(reads))

    def report(self) -> None:
        """Print which files were skipped.

        Raises:
          Mistake: all of them were.
        """
        if not self._skipped:
            return
        names = ", ".join(shown(name) for name in self._skipped[:5]) + (", ..." if len(self._skipped) > 5 else "")
        count = f"{len(self._skipped)} of {len(self.files)} files are not videos"
        if not self._answered and not self.failed and len(self._skipped) == len(self.files):
            raise Mistake(f"--video: {count}: {names}; give a folder of videos")
        print(f"{count}: {names}", file=sys.stderr)

    def _record(self, read: "Read") -> Any:
        from ymplug_jax.core import progress
        from ymplug_jax.inference import clip_stream

        clip = read.clip
        if clip_stream.left_out(read):
            self._skipped.append(read.file.name)
            return None
        if isinstance(clip, clip_stream.Reject):
            self.failed += 1
            line = f"error: {shown(read.file.name)}: {clip.reason}: {shown(clip.detail)}"
            progress.write(line)
            return None
        title = self._titles[read.number] if self._titles else ""
        return clip_stream.record_of(clip, read.file.name, title)


def say(text: str) -> None:
    """Print one answer and flush it.

    Raises:
      PlaceFailed: stdout is redirected to a disk that is full.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise _Closed from None
    except OSError as error:
        raise PlaceFailed(
            f"standard output: cannot be written ({error.strerror}); free some space or redirect to another disk, then run the same command again"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
