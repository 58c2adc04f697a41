"""Flags of `build_shards`, and what is checked of them before anything is read."""

import argparse
import difflib
import os
import re

from data_prep.flags import Parser, local_path
from ymplug_jax.data import schema


class BuildError(ValueError):
    """The build cannot go on; the message names what to change."""


def parser(description: str = "") -> Parser:
    """Our flags."""
    parser = Parser("build_shards", description)
    parser.add_argument("--config", required=True, choices=sorted(schema.COLUMNS), help="kind of CSV")
    parser.add_argument("--csv", required=True, type=local_path)
    parser.add_argument(
        "--video_root", required=True, type=local_path, help="folder that the FILE column is relative to"
    )
    parser.add_argument("--out", required=True, type=local_path, help="folder of the data set")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), help="default: by the CSV's name (_val, _test)"
    )
    parser.add_argument("--classes", type=local_path, help="classification: class names, one a line; default: the 45")
    parser.add_argument(
        "--allow_links_to", type=local_path, action="append", default=[], help="folder that symbolic links may lead to"
    )
    parser.add_argument("--num_frames", type=int, default=16, help="frames stored of every clip")
    parser.add_argument("--time_limit", type=float, default=120.0, help="seconds a clip")
    parser.add_argument("--max_rejects", type=float, default=1.0, help="fraction of rows above which the build fails")
    parser.add_argument("--partition_rows", type=int, help="rows a shard; default: a sixteenth of the CSV, 16 to 1024")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes on this machine")
    parser.add_argument("--overwrite", action="store_true", help="build a split again that is there already")
    return parser


def parse(argv: list[str] | None = None, description: str = "") -> tuple[argparse.Namespace, list[str]]:
    """(our flags, flags for Beam)."""
    return parser(description).parse_known_args(argv)


def check(args: argparse.Namespace, beam_flags: list[str]) -> None:
    """Raises BuildError where a flag or a folder cannot be used."""
    if args.csv.is_dir() or not args.csv.exists():
        raise BuildError(f"--csv {args.csv}: {'a folder' if args.csv.is_dir() else 'no such file'}; give a CSV")
    for flag, folders in (("--video_root", [args.video_root]), ("--allow_links_to", args.allow_links_to)):
        for folder in folders:
            if not folder.is_dir():
                what = "no folder but a file" if folder.exists() else "no such folder"
                raise BuildError(f"{flag} {folder}: {what}; give the folder of the videos")
    for name, value, least in (
        ("num_frames", args.num_frames, 1),
        ("partition_rows", 1 if args.partition_rows is None else args.partition_rows, 1),
        ("workers", args.workers, 1),
        ("max_rejects", args.max_rejects, 0),
    ):
        if not value >= least:
            raise BuildError(f"--{name} {value}: give at least {least}")
    if not args.time_limit > 0:
        raise BuildError(f"--time_limit {args.time_limit:g}: give seconds above 0")
    if args.classes and args.config != "classification":
        raise BuildError(f"--classes is for --config classification, not for {args.config}; leave it out")
    _check_beam_flags(beam_flags)


def _check_beam_flags(flags: list[str]) -> None:
    """Raises BuildError for what is neither a flag of ours nor of Beam."""
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
                f"{name}: no such flag{f'; did you mean {near[0]}?' if near else ', neither here nor of Beam; --help lists the flags'}"
            )
        previous = flag
