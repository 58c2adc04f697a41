"""Classify, caption and search video files with a trained run, answer questions about them, or talk about them.

    python -m ymplug_jax.predict classify --checkpoint RUN --video clip.mp4 [--title TEXT]
    python -m ymplug_jax.predict caption  --checkpoint RUN --video clip.mp4 other.mkv
    python -m ymplug_jax.predict answer   --checkpoint RUN --video clip.mp4 --question "视频里有什么"
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video FOLDER --text "红色的圆形" [--export index.npz]
    python -m ymplug_jax.predict retrieve --checkpoint RUN --index index.npz --text "红色的圆形"
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video clip.mp4 --text TEXT TEXT ... --rank texts
    python -m ymplug_jax.predict chat     --checkpoint RUN --video clip.mp4 [--question TEXT ...]
    python -m ymplug_jax.predict chat     --checkpoint RUN --questions questions.jsonl --out answers.jsonl

Files are decoded as data_prep does, so that the model sees what it was trained on. Answers are printed in the order of the
files while later files are still being decoded; memory does not grow with their number. A folder stands for all files below
it, sorted by the bytes of their names. Files in it that are not videos are skipped, counted and named. A file that cannot be
read gives one line on stderr and exit code 1; all other files are answered.

--json prints one JSON object per line. Characters that the terminal's encoding lacks are escaped, and bytes of a file name
that are not UTF-8 appear as \\udc80 to \\udcff, which os.fsencode decodes. --sheet FILE.png draws the frames that the model
saw, with the answers. --export FILE writes an index and replaces an older one when the new one is complete; if the command
is interrupted, run it again to continue from FILE.part.

chat without --question reads questions from the terminal or from stdin, one a line; /help lists its commands. Answers appear while they
are generated, and the conversation stays in memory between questions. Ctrl-C stops an answer; at the prompt it ends the program.

Exit codes: 0; 1 some files could not be read; 2 a mistake in the command; 5 a disk failed; 130 Ctrl-C.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ymplug_jax.core import exits
from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.inference import predict_flags
from ymplug_jax.inference.output import Closed, say
from ymplug_jax.inference.wording import as_json, readable, shown
from ymplug_jax.training import hosts

if TYPE_CHECKING:  # JAX is imported only after the flags were checked
    from ymplug_jax.inference.clip_stream import File, Read


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 if some files could not be read; see `exits` for the others."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape characters that the terminal cannot show
    hosts.without_accelerator()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        return run(predict_flags.parse(sys.argv[1:] if argv is None else argv, str(__doc__)))
    except (Mistake, PlaceFailed) as error:
        print("error:", " ".join(shown(line.strip()) for line in str(error).splitlines()), file=sys.stderr)
        return exits.MISTAKE if isinstance(error, Mistake) else exits.PLACE
    except Closed:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # flushing the buffer at exit must not fail again
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return exits.STOPPED


def run(args: argparse.Namespace) -> int:
    """Check the command, then answer. Returns 1 if some files or questions could not be read, else 0."""
    if args.command == "chat":
        return _chat(args)
    files = predict_flags.check(args)
    from ymplug_jax import api
    from ymplug_jax.inference import answers

    model, reading = api.load(args.checkpoint, needs=args.command), Reading(files, args)
    answers.check_lengths(args, model.predictor)
    answer_all = answers.retrieve if args.command == "retrieve" else answers.describe
    for answer in answer_all(args, model.predictor, reading):
        say(as_json(answer, sys.stdout.encoding) if args.json else readable(answer))
    reading.report()
    return 1 if reading.failed else 0


def _chat(args: argparse.Namespace) -> int:
    style = predict_flags.check_chat(args)
    from ymplug_jax import api
    from ymplug_jax.inference import chat_command

    model = api.load(args.checkpoint, tokenizer=args.tokenizer, needs="chat", int8=bool(args.int8)).chat_model()
    try:
        return chat_command.run(args, style, model)
    finally:
        model.close()


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
                if found and len(files) == 1:  # one file may have several questions
                    found = [found[0]._replace(title=title) for title in self._titles or [found[0].title]]
                for start in range(0, len(found), size):
                    yield found[start : start + size]
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


if __name__ == "__main__":
    sys.exit(main())
