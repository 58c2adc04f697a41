"""Flags of `build_shards`, and their validation before any data is read."""

import argparse
import os
import re

from etils import epath

from data_prep import beam_flags
from data_prep.archives import check_kind, is_archive
from data_prep.flags import Parser, local_path, place_of, say
from data_prep.parts import PART_NAME
from ymplug_jax.core import places
from ymplug_jax.data import schema
from ymplug_jax.data.text import load_tokenizer


class BuildError(ValueError):
    """The build cannot continue. The message says what to change."""


class PlaceError(RuntimeError):
    """A disk, a folder or the machine failed during the build. The message names it; the same command resumes."""


def parser(description: str = "") -> Parser:
    """Return the parser of the flags of `build_shards`, without those of Beam."""
    parser = Parser("build_shards", description)
    parser.add_argument("--config", required=True, choices=sorted(schema.KINDS), help="kind of the rows")
    parser.add_argument(
        "--csv",
        required=True,
        type=place_of("--csv"),
        help="CSV file with one row per clip; instruct: one JSON object per line, with text, video and image",
    )
    parser.add_argument(
        "--video_root",
        required=True,
        type=place_of("--video_root"),
        help="folder to which the paths of the rows are relative, or a .zip or .tar with such paths",
    )
    parser.add_argument("--out", required=True, type=place_of("--out"), help="folder of the data set to write")
    parser.add_argument(
        "--part",
        help="build the folder OUT/PART from the rows whose files are in --video_root; data_prep.join_parts joins the parts",
    )
    parser.add_argument(
        "--with_text_rows", action="store_true", help="instruct with --part: this part has the rows without files too"
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="default: by the name of the CSV (*_val, *_test, else train)",
    )
    parser.add_argument(
        "--classes",
        type=place_of("--classes"),
        help="classification: file of class names, one per line; default: the 45 categories of Youku-mPLUG",
    )
    parser.add_argument(
        "--tokenizer",
        type=local_path,
        help="instruct: file of the model's tokenizer; with --max_tokens, rows without room for an answer are rejected",
    )
    parser.add_argument("--max_tokens", type=int, help="instruct: tokens of a row of the model, with --tokenizer")
    parser.add_argument("--slots", type=int, help="instruct: tokens of an image or clip, with --tokenizer (default 65)")
    parser.add_argument(
        "--allow_links_to",
        type=local_path,
        action="append",
        default=[],
        help="folder outside the video root that symbolic links may point to; may be repeated",
    )
    parser.add_argument("--num_frames", type=int, default=16, help="number of frames stored per clip (default 16)")
    parser.add_argument(
        "--time_limit", type=float, default=120.0, help="maximum seconds of decoding per clip (default 120)"
    )
    parser.add_argument(
        "--max_rejects",
        type=float,
        default=1.0,
        help="maximum fraction of rejected rows; above it nothing is published (default 1.0)",
    )
    parser.add_argument("--partition_rows", type=int, help="rows per shard; default: 1/16 of the CSV, 16 to 1024")
    parser.add_argument(
        "--workers",
        type=int,
        help="number of local processes (default: all cores); with --runner=PortableRunner: Beam jobs side by side (default 1)",
    )
    parser.add_argument(
        "--stall_minutes",
        type=float,
        default=10.0,
        help="minutes without a finished row after which a worker counts as lost (default 10)",
    )
    parser.add_argument("--overwrite", action="store_true", help="build a split again that already exists")
    return parser


def parse(argv: list[str] | None = None, description: str = "") -> tuple[argparse.Namespace, list[str]]:
    """Return (flags of this program, flags for Beam)."""
    return parser(description).parse_known_args(argv)


def check(args: argparse.Namespace, more: list[str]) -> None:
    """Validate flags and folders. `more` are the flags for Beam.

    Raises:
      BuildError: a flag or a folder cannot be used.
    """
    check_places(args)
    _check_part(args)
    for name, value, least in (
        ("num_frames", args.num_frames, 1),
        ("partition_rows", 1 if args.partition_rows is None else args.partition_rows, 1),
        ("workers", 1 if args.workers is None else args.workers, 1),
        ("max_tokens", 1 if args.max_tokens is None else args.max_tokens, 1),
        ("slots", 1 if args.slots is None else args.slots, 1),
        ("max_rejects", args.max_rejects, 0),
    ):
        if not value >= least:
            raise BuildError(f"--{name} {value}: too small; give {least} or more")
    if not args.time_limit > 0:
        raise BuildError(f"--time_limit {args.time_limit:g}: too small; give more than 0 seconds")
    if not 60 * args.stall_minutes > args.time_limit:
        raise BuildError(
            f"--stall_minutes {args.stall_minutes:g}: not above the {args.time_limit:g} seconds of --time_limit; give more"
        )
    if args.classes and args.config != "classification":
        raise BuildError(f"--classes: applies to --config classification only, not to {args.config}; leave it out")
    _check_lengths(args)
    _check_beam_flags(args, more)


def check_places(args: argparse.Namespace) -> None:
    """Raise BuildError unless the CSV is a file and the others are folders."""
    flags = (
        ("--csv", [args.csv]),
        ("--video_root", [args.video_root]),
        ("--allow_links_to", args.allow_links_to),
    )
    for flag, paths in flags:
        for path in paths:
            try:
                found = kind_of(path)
            except OSError as error:
                raise BuildError(f"{flag} {say(error)}") from None
            if flag == "--csv" and found != "file":
                what = "a folder, not a file" if found else "no such file"
                raise BuildError(f"{flag} {path}: {what}; give a CSV")
            if flag == "--video_root" and found == "file" and is_archive(path.name):
                check_kind(os.fspath(path))
            elif flag != "--csv" and found != "folder":
                what = "a file, not a folder" if found else "no such folder"
                raise BuildError(f"{flag} {path}: {what}; give the folder of the videos")
    if places.is_remote(args.video_root) and args.allow_links_to:
        raise BuildError("--allow_links_to: a bucket has no links; leave it out")


def _check_part(args: argparse.Namespace) -> None:
    """Check the flags of a part, and set `args.whole` to --out and `args.out` to the folder of the part in it. Raises BuildError."""
    if args.with_text_rows and (not args.part or args.config != schema.INSTRUCT):
        raise BuildError("--with_text_rows: applies to --config instruct with --part only; leave it out")
    args.whole = args.out
    if args.part is not None:
        if not PART_NAME.fullmatch(args.part):
            raise BuildError(
                f"--part {args.part}: not a name; use letters, digits, '_', '-' and '.', beginning with a letter or digit"
            )
        args.out = args.out / args.part


def kind_of(path: epath.Path) -> str:
    """Return "file", "folder" or "" for nothing. Raises OSError if a bucket does not answer."""
    if not places.is_remote(path):
        return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else ""
    if not places.exists(path):
        return ""
    return "file" if path.is_file() else "folder"


def _check_lengths(args: argparse.Namespace) -> None:
    """Raise BuildError unless the tokenizer and the length are given together, for conversations."""
    for name in ("tokenizer", "max_tokens", "slots"):
        if getattr(args, name) is not None and args.config != schema.INSTRUCT:
            raise BuildError(f"--{name}: applies to --config instruct only, not to {args.config}; leave it out")
    if (args.tokenizer is None) != (args.max_tokens is None):
        given, other = ("tokenizer", "max_tokens") if args.tokenizer else ("max_tokens", "tokenizer")
        raise BuildError(f"--{given}: needs --{other} too, to measure the rows; give both or neither")
    if args.slots is not None and args.tokenizer is None:
        raise BuildError(
            "--slots: needs --tokenizer and --max_tokens too, to measure the rows; give them or leave it out"
        )
    if args.tokenizer is not None:
        args.slots = 65 if args.slots is None else args.slots
        try:
            load_tokenizer(str(args.tokenizer))
        except FileNotFoundError:
            raise BuildError(f"--tokenizer {args.tokenizer}: no such file; correct the path") from None
        except ValueError as error:
            raise BuildError(f"--{error}") from None


def _check_beam_flags(args: argparse.Namespace, flags: list[str]) -> None:
    """Raise BuildError for flags that neither this program nor Beam knows, and for values that Beam refuses."""
    ours = re.findall(r"--\w+", parser().format_help())
    try:
        beam_flags.check(flags, ours, args.workers is not None)
    except ValueError as error:
        raise BuildError(str(error)) from None
