"""The command line of `ymplug_jax.predict`, checked before JAX is imported or a weight is read."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ymplug_jax.core import place_copies, places
from ymplug_jax.core.exits import Mistake

if TYPE_CHECKING:
    from ymplug_jax.inference.chat_session import Style
    from ymplug_jax.inference.clip_stream import File

COMMANDS = ("classify", "caption", "answer", "retrieve", "chat")
ONLY_FOR = {
    "title": "classify", "text": "retrieve", "index": "retrieve", "export": "retrieve", "rank": "retrieve",
    "image": "chat", "question": "answer or chat", "questions": "chat", "out": "chat", "video_root": "chat", "tokenizer": "chat",
    "temperature": "chat", "top_k": "chat", "top_p": "chat", "repetition_penalty": "chat", "no_repeat_ngram": "chat",
    "int8": "chat", "beams": "chat", "new_tokens": "chat", "seed": "chat", "context": "chat", "introduction": "chat",
}  # fmt: skip
RULES = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram")  # fields of `decode_sampling.Rules`


class _Parser(argparse.ArgumentParser):
    """Raises `Mistake` instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; --help lists the flags")


def parse(argv: list[str], doc: str) -> argparse.Namespace:
    """Parse the command line; `doc` is the text of --help.

    Raises:
      Mistake: a command or flag is unknown (the message names the nearest one), or a value cannot be parsed.
    """
    parser = _Parser(
        prog="python -m ymplug_jax.predict", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", metavar="{" + ",".join(COMMANDS) + "}")
    flags = [
        parser.add_argument("--checkpoint", required=True, help="folder of the run (its --workdir, or best/ in it), local or gs://"),
        parser.add_argument("--video", nargs="+", action="extend", default=[], help="video files or folders, local or gs://"),
        parser.add_argument(
            "--title", nargs="+", action="extend", help='classify: title of each video, in their order; "" for a video without one'
        ),
        parser.add_argument("--text", nargs="+", action="extend", help="retrieve: texts to search for"),
        parser.add_argument("--index", type=place_copies.any_place, help="retrieve: search this index instead of files"),
        parser.add_argument("--export", type=place_copies.any_place, help="retrieve: write the vectors of the videos to this index (.npz)"),
        parser.add_argument("--rank", choices=["videos", "texts"], help="retrieve: rank videos for each text, or texts for each video (default videos)"),
        parser.add_argument("--best", type=int, help="number of classes, ranks or listed answers in an answer (default 5)"),
        parser.add_argument("--json", action="store_true", help="print one JSON object per line"),
        parser.add_argument("--sheet", type=place_copies.local_only, help="draw the frames of at most 64 clips, with the answers, to this PNG"),
        parser.add_argument("--decoders", type=int, help="number of decoding processes (default: one per core, at most eight)"),
        *_chat_flags(parser),
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


def _chat_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the flags of chat, in the order of --help."""
    add = parser.add_argument
    return [
        add("--image", nargs="+", action="extend", help="chat: image files, shown after the videos"),
        add("--question", nargs="+", action="extend", help="answer: question about each video, in their order, one about all, or several about one video; chat: ask these questions, one after the other, and end"),
        add("--questions", type=place_copies.local_only, help='chat: answer every line {"video": [...], "image": [...], "question": TEXT, "prompt": INTRODUCTION} of this file'),
        add("--out", type=place_copies.local_only, help="chat: write the answers to --questions to this file"),
        add("--video_root", type=place_copies.local_only, help="chat: folder of the files that --questions names (default: the current folder)"),
        add("--tokenizer", help="chat: tokenizer file of converted weights that hold none"),
        add("--int8", action="store_true", default=None, help="chat: hold frozen matrices in eight bits, in half the memory"),
        add("--temperature", type=float, help="chat: draw tokens, with logits divided by this; 0: the likeliest token (default)"),
        add("--top_k", type=int, help="chat: draw among the k likeliest tokens; 0: all (default)"),
        add("--top_p", type=float, help="chat: draw among the likeliest tokens of this total probability; 1: all (default)"),
        add("--repetition_penalty", type=float, help="chat: weaken tokens that the answer has; 1: not (default)"),
        add("--no_repeat_ngram", type=int, help="chat: no sequence of this many tokens twice in an answer; 0: any (default)"),
        add("--beams", type=int, help="chat: beam search of this width; answers appear at once (default 1: none)"),
        add("--new_tokens", type=int, help="chat: largest number of tokens of an answer (default 256)"),
        add("--seed", type=int, help="chat: of the draws (default 0)"),
        add("--introduction", help='chat: text before the first turn; "" for none (default: that of the conversations of the training)'),
        add("--context", type=int, help="chat: largest number of tokens of a conversation (default: that of the training)"),
    ]  # fmt: skip


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

    _check_flags(args)
    if args.best is not None and args.command == "caption":
        raise Mistake("--best: caption gives one answer for each video; leave it out")
    for flag in ("best", "decoders"):
        if (number := getattr(args, flag)) is not None and number < 1:
            raise Mistake(f"--{flag} {number}: too small; give 1 or more")
    args.best, args.rank = args.best or 5, args.rank or "videos"
    _check_texts(args)
    if args.command == "retrieve":
        _check_search(args)
    elif not args.video:
        raise Mistake(f"--video: missing; give the files to {args.command}")
    _check_places(args)
    files = clip_stream.files_of(args.video)
    if args.title and len(args.title) != len(files):
        raise Mistake(f"--title: {len(args.title)} titles for {len(files)} files; give one for each, in their order")
    if args.command == "answer":
        args.title = _questions(args.question, len(files))
    return files


def _questions(given: list[str] | None, files: int) -> list[str]:
    """The question about each file, or the questions about a single file.

    Raises:
      Mistake: there are neither as many questions as files nor one, and several files.
    """
    if not given:
        raise Mistake("--question: missing; give the question about each video, or one about all")
    if files > 1 and len(given) not in (1, files):
        raise Mistake(
            f"--question: {len(given)} questions for {files} files; give one for each, in their order, one for all, or several about one file"
        )
    return given * files if len(given) == 1 else given


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of other commands and an empty checkpoint."""
    for flag, commands in ONLY_FOR.items():
        if getattr(args, flag) is not None and args.command not in commands.split(" or "):
            raise Mistake(f"--{flag}: {args.command} does not use it, only {commands} does; leave it out")
    if not args.checkpoint:
        raise Mistake("--checkpoint: the name is empty; give the --workdir of a run")


def check_chat(args: argparse.Namespace) -> "Style":
    """Check everything about a chat that needs no model.

    Returns:
      How answers are generated.

    Raises:
      Mistake: flags exclude each other, or a value is out of range.
    """
    _check_flags(args)
    _check_source(args)
    for flag in ("video", "image"):
        for name in getattr(args, flag) or []:
            if places.is_remote(places.place(name, f"--{flag}")):
                raise Mistake(f"--{flag} {name}: chat reads local files; copy it to the disk first")
    args.question = [_as_text("question", text) for text in args.question or []]
    from ymplug_jax.data import conversation
    from ymplug_jax.inference import chat_session

    if args.introduction is not None:
        try:
            args.introduction = chat_session.introduction_from(_as_text("introduction", args.introduction))
        except Mistake as error:
            raise Mistake(f"--{str(error).removeprefix('--')}") from None
    for text in args.question:
        if not conversation.plain(text):
            raise Mistake(f"--question {text!r}: nothing is left of it; give words")
    if args.context is not None and args.context < 1:
        raise Mistake(f"--context {args.context}: too small; give 1 or more")
    given = {
        name: value for name in (*RULES, "beams", "new_tokens", "seed") if (value := getattr(args, name)) is not None
    }
    try:
        return chat_session.style_of({name: given.pop(name) for name in RULES if name in given}, **given)
    except Mistake as error:
        raise Mistake(f"--{error}") from None


def _check_source(args: argparse.Namespace) -> None:
    """Check where the questions of a chat come from.

    Raises:
      Mistake: flags exclude each other.
    """
    for flag in ("best", "sheet", "decoders"):
        if getattr(args, flag) is not None:
            raise Mistake(f"--{flag}: chat does not use it; leave it out")
    if args.questions:
        for flag in ("video", "image", "question", "json"):
            if getattr(args, flag):
                raise Mistake(f"--{flag}: the rows of --questions say it; leave it out")
        if not args.out:
            raise Mistake("--out: missing; give the file for the answers to --questions")
    for flag in ("out", "video_root"):
        if getattr(args, flag) is not None and not args.questions:
            raise Mistake(f"--{flag}: belongs to --questions; give both, or leave it out")


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

    for flag in ("text", "title", "question"):
        if given := getattr(args, flag):
            setattr(args, flag, [_as_text(flag, text) for text in given])
    for flag in ("text", "question"):
        for text in getattr(args, flag) or []:
            if not clean_text(text, 30):
                raise Mistake(f"--{flag} {text!r}: nothing is left after cleaning; give words")


def _as_text(flag: str, text: str) -> str:
    """Decode a text as UTF-8 if the locale could not decode it, for example under LC_ALL=C."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeError:
        raise Mistake(f"--{flag} {text!r}: encoded neither as this terminal nor as UTF-8; give UTF-8") from None


def _check_places(args: argparse.Namespace) -> None:
    from ymplug_jax.core import index_file

    if (path := args.export) and places.is_remote(path):
        with place_copies.failing():
            places.check_bucket(path)
            if places.below(path).keys() - {""}:
                raise Mistake(f"--export {path}: a folder, not a file; give a file in it")
    elif path:
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
