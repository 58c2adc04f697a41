"""Flags of `build_shards`, and their validation before any data is read."""

import argparse
import difflib
import os
import re

from data_prep.flags import Parser, local_path
from ymplug_jax.data import schema


class BuildError(ValueError):
    """The build cannot continue. The message says what to change."""


def parser(description: str = "") -> Parser:
    """Return the parser of the flags of `build_shards`, without those of Beam."""
    parser = Parser("build_shards", description)
    parser.add_argument("--config", required=True, choices=sorted(schema.COLUMNS), help="kind of the CSV")
    parser.add_argument("--csv", required=True, type=local_path, help="CSV file with one row per clip")
    parser.add_argument(
        "--video_root", required=True, type=local_path, help="folder to which the FILE column is relative"
    )
    parser.add_argument("--out", required=True, type=local_path, help="folder of the data set to write")
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="default: by the name of the CSV (*_val, *_test, else train)",
    )
    parser.add_argument(
        "--classes",
        type=local_path,
        help="classification: file of class names, one per line; default: the 45 categories of Youku-mPLUG",
    )
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
        "--workers", type=int, default=os.cpu_count(), help="number of local processes; default: all cores"
    )
    parser.add_argument("--overwrite", action="store_true", help="build a split again that already exists")
    return parser


def parse(argv: list[str] | None = None, description: str = "") -> tuple[argparse.Namespace, list[str]]:
    """Return (flags of this program, flags for Beam)."""
    return parser(description).parse_known_args(argv)


def check(args: argparse.Namespace, beam_flags: list[str]) -> None:
    """Validate flags and folders.

    Raises:
      BuildError: a flag or a folder cannot be used.
    """
    if args.csv.is_dir() or not args.csv.exists():
        raise BuildError(
            f"--csv {args.csv}: {'a folder, not a file' if args.csv.is_dir() else 'no such file'}; give a CSV"
        )
    for flag, folders in (("--video_root", [args.video_root]), ("--allow_links_to", args.allow_links_to)):
        for folder in folders:
            if not folder.is_dir():
                what = "a file, not a folder" if folder.exists() else "no such folder"
                raise BuildError(f"{flag} {folder}: {what}; give the folder of the videos")
    for name, value, least in (
        ("num_frames", args.num_frames, 1),
        ("partition_rows", 1 if args.partition_rows is None else args.partition_rows, 1),
        ("workers", args.workers, 1),
        ("max_rejects", args.max_rejects, 0),
    ):
        if not value >= least:
            raise BuildError(f"--{name} {value}: too small; give {least} or more")
    if not args.time_limit > 0:
        raise BuildError(f"--time_limit {args.time_limit:g}: too small; give more than 0 seconds")
    if args.classes and args.config != "classification":
        raise BuildError(f"--classes: applies to --config classification only, not to {args.config}; leave it out")
    _check_beam_flags(beam_flags)


def _check_beam_flags(flags: list[str]) -> None:
    """Raise BuildError for flags that neither this program nor Beam knows."""
    from apache_beam.options.pipeline_options import PipelineOptions

    if not flags:
        return
    ours = re.findall(r"--\w+", parser().format_help())
    known = {f"--{name}" for name in PipelineOptions([]).get_all_options()}
    runner = any(flag.split("=")[0] == "--runner" for flag in flags)
    previous = ""
    for flag in flags:
        name = flag.split("=")[0]
        near = difflib.get_close_matches(name, ours, 1, 0.75)
        value = not flag.startswith("-") and previous.startswith("--") and "=" not in previous
        if not value and name not in known and (not runner or near or not flag.startswith("--")):
            raise BuildError(
                f"{name}: unknown flag; {f'did you mean {near[0]}?' if near else 'neither this program nor Beam has it, --help lists the flags'}"
            )
        previous = flag
