"""Build TFRecord shards from videos and a CSV, or from conversations in JSON lines with videos and images.

    python -m data_prep.build_shards --config pretrain --csv pretrain.csv --video_root VIDEOS --out SHARDS
    python -m data_prep.build_shards --config instruct --csv instruct.jsonl --video_root VIDEOS --out CHATS
    python -m data_prep.build_shards --config pretrain --csv pretrain.csv --video_root A.tar --out SHARDS --part A

Flags of Beam may follow (`--runner=DataflowRunner --project=...`); by default the build uses all cores of this machine.
To resume a killed build, run the same command again. To add a split, run the command with its CSV and the same --out.
With --part only the rows whose files are in --video_root are built, into a folder of their own; see data_prep.join_parts.
Exit codes: 2 for an error in flags, CSV or folders; 5 if a disk or the machine failed during the build.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from data_prep import conversations
from data_prep import rows as rows_lib
from data_prep.build_flags import BuildError, PlaceError, check, parse
from data_prep.build_progress import Progress
from data_prep.build_rows import absolute, open_rows
from data_prep.conversations import Talk
from data_prep.flags import PLACE, run, say
from data_prep.part_files import finished
from data_prep.parts import check_folder
from data_prep.publish import BUILDING, PLAN, Done, finish, publish, read_groups, remove_work
from data_prep.quiet import quiet
from data_prep.rows import Row
from data_prep.scratch import Scratch
from data_prep.work_folder import Work
from ymplug_jax.core import places
from ymplug_jax.data import schema
from ymplug_jax.data.video_container import REASONS

NEEDS = ("apache_beam", "tensorflow", "tensorflow_datasets")  # the extra `prep`


def build(args: argparse.Namespace, beam_flags: list[str]) -> dict:
    """Build one split and return the data set's manifest.

    Raises:
      BuildError: the input is unusable, too many rows are rejected, or the folder holds a data set with other settings.
      PlaceError: a disk or the machine failed during the build.
    """
    check(args, beam_flags)
    with Scratch() if places.is_remote(args.csv) else contextlib.nullcontext() as scratch:
        csv = Path(args.csv)
        if scratch is not None:
            csv = scratch.path / args.csv.name
            places.download(args.csv, csv)
        try:
            return _build(args, csv, beam_flags)
        except OSError as error:
            if not error.strerror:  # of a bucket: one line that says what to do
                message = str(error).removesuffix(", then run the same command again")
                raise PlaceError(f"{message}; run the same command again") from None
            place = error.filename or args.out
            raise PlaceError(
                f"{place}: cannot be written ({error.strerror}); make it writable, then run the same command again"
            ) from None
        except ValueError as error:
            if scratch is None:
                raise
            raise BuildError(str(error).replace(str(csv), str(args.csv))) from None


def _build(args: argparse.Namespace, csv: Path, beam_flags: list[str]) -> dict:
    """Build from a local copy of the CSV. Raises BuildError, PlaceError, ValueError about rows, OSError."""
    split = args.split or rows_lib.split_of(args.csv)
    classes = schema.CLASS_NAMES
    if args.classes:
        classes = schema.parse_class_names(_text(args.classes), f"--classes {args.classes}")
    facts = {
        "csv": args.csv.name,
        "csv_sha256": rows_lib.sha256(csv),
        "kind": args.config,
        "num_frames": args.num_frames,
        "partition_rows": args.partition_rows,
    }
    rows: Callable[[], Iterator[Row] | Iterator[Talk]]
    if args.config == schema.INSTRUCT:
        facts["tokenizer_sha256"] = rows_lib.sha256(args.tokenizer) if args.tokenizer else None
        facts["max_tokens"], facts["slots"] = args.max_tokens, args.slots
        rows = functools.partial(conversations.iter_talks, csv)
    else:
        rows = functools.partial(rows_lib.iter_rows, csv, args.config, classes)
    manifest = _old_manifest(args.out)
    check_folder(args.whole, args.part, manifest)
    _check_fits(manifest, args, classes)
    folder = args.out / BUILDING / split
    if split in manifest.get("splits", {}) and not args.overwrite:
        _check_built(args.out, split, manifest["splits"][split], facts)
        remove_work(args.out, folder)  # what a kill at the very end left
        return manifest
    if args.config == "classification":
        facts["classes"] = list(classes)
    work, index, files = open_rows(args, split, folder, facts, rows)
    done = _partitions(args, beam_flags, work, split, index)
    _check_counts(args, split, work, done)
    if work.repeated:
        what = "files" if args.config != schema.INSTRUCT else "conversations"
        examples = ", ".join(f"{name} ({count} times)" for name, count in work.examples)
        print(f"{work.repeated} {what} occur in more than one row (all rows are kept): {examples}", file=sys.stderr)
    more = {"duplicated_ids": work.repeated}
    if args.config == schema.INSTRUCT:
        more["cut"] = sum(part.cut for part in done.parts)
    manifest = _read_manifest(args.out)  # another command may have added a split meanwhile
    check_folder(args.whole, args.part, manifest)
    _check_fits(manifest, args, classes)
    return publish(args.out, folder, split, {**facts, "partition_rows": work.size}, done, manifest, more, files)


def _check_counts(args: argparse.Namespace, split: str, work: Work, done: Done) -> None:
    """Print the summary of a build. Raises BuildError if rows are lost, or too many were rejected."""
    if done.written + done.rejected != work.rows:
        raise BuildError(
            f"{work.folder}: {done.written} written + {done.rejected} rejected rows are not {work.rows}; delete the folder and build again"
        )
    print(f"{split}: {work.rows:,} rows: {done.written:,} written, {done.rejected:,} rejected", file=sys.stderr)
    reasons = {**REASONS, **conversations.REASONS}
    for reason, count in done.rejects.most_common():
        print(f"  {count:>9,}  {reason:<16} {reasons[reason]}", file=sys.stderr)
    if cut := sum(part.cut for part in done.parts):
        print(f"{cut:,} conversations are longer than --max_tokens and will be cut (they are kept)", file=sys.stderr)
    if done.rejected > args.max_rejects * work.rows:
        raise BuildError(
            f"{done.rejected} of {work.rows} rows were rejected and nothing was published; fix the rows (reasons above) or raise --max_rejects {args.max_rejects:g}"
        )
    if done.written == 0:
        raise BuildError(f"all {work.rows} rows were rejected and nothing was published; fix the rows (reasons above)")


def _check_built(out: epath.Path, split: str, old: dict[str, Any], facts: dict[str, Any]) -> None:
    """Report that the split already exists. Raises BuildError if it was built with other settings."""
    free = ("partition_rows",) if facts["partition_rows"] is None else ()  # any default of any version
    if any(old.get(key) != value for key, value in facts.items() if key not in free):
        raise BuildError(
            f"{out}: split {split!r} was built from another CSV or with other settings; give --overwrite, or choose another --out"
        )
    again = f" ({old['rejected']:,} rows were rejected; --overwrite builds the split again)" if old["rejected"] else ""
    print(f"{out}: split {split!r} already exists ({old['written']:,} records); nothing to do{again}", file=sys.stderr)


def _text(path: epath.Path) -> str:
    """Read a small UTF-8 file. Raises BuildError."""
    try:
        return places.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except FileNotFoundError:
        raise BuildError(f"{path}: no such file; correct the path") from None
    except OSError as error:
        raise BuildError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None


def _partitions(args: argparse.Namespace, beam_flags: list[str], work: Work, split: str, index: str) -> Done:
    """Build the missing partitions and return the facts of all."""
    from data_prep.builder import Settings
    from data_prep.partition import Job

    parts, _, _ = finished(work.folder)
    if parts:
        print(f"resuming: {len(parts)} of {work.partitions} partitions are already built", file=sys.stderr)
    links = tuple(os.path.abspath(folder) for folder in args.allow_links_to)
    settings = Settings(args.config, args.num_frames, args.time_limit, links, archive_index=index)
    if args.tokenizer:
        settings = settings._replace(
            tokenizer=os.path.abspath(args.tokenizer), max_tokens=args.max_tokens, slots=args.slots
        )
    root = absolute(args.video_root)
    job = Job(absolute(work.folder), root, split, work.rows, work.size, settings, token="")
    with Progress(work):
        _run_beam(job, work, args, beam_flags)
    try:
        return read_groups(work.folder, work.partitions)
    except ValueError as error:
        raise BuildError(str(error)) from None


def _run_beam(job: Any, work: Work, args: argparse.Namespace, beam_flags: list[str]) -> None:
    from data_prep import runners

    runners.run(job, work.partitions, beam_flags, args.workers, 60 * args.stall_minutes)


def _old_manifest(out: epath.Path | Path) -> dict:
    """Return the current manifest of the data set, after finishing an interrupted publication.

    Raises:
      BuildError: the folder cannot be read, or the manifest is damaged.
      OSError: the publication fails again.
    """
    out = epath.Path(out)
    try:
        stopped = [split for split in ("test", "train", "validation") if PLAN in places.sizes(out / BUILDING / split)]
    except NotADirectoryError:
        return {}  # making the folder will say so
    except OSError as error:
        raise _unreadable(out, error) from None
    for split in stopped:
        finish(out, out / BUILDING / split)
    return _read_manifest(out)


def _read_manifest(out: epath.Path) -> dict:
    """Return the manifest of the data set; {} if there is none.

    Raises:
      BuildError: the manifest cannot be read or is damaged, or another split is being published.
    """
    path = out / schema.MANIFEST
    try:
        if schema.MANIFEST not in places.sizes(out):
            return {}
        manifest: dict = json.loads(places.read_bytes(path))
        _ = manifest["kind"], manifest["frames"]["per_clip"], manifest["splits"].items()
    except OSError as error:
        raise _unreadable(out, error) from None
    except KeyError as error:
        raise BuildError(f"{path}: damaged (no {error} in it); build into another --out") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BuildError(f"{path}: damaged ({error}); build into another --out") from None
    if split := manifest.get(schema.PUBLISHING):
        raise BuildError(
            f"{path}: split {split!r} is being published by another command; wait for it, or run it again if it was stopped"
        )
    return manifest


def _unreadable(out: epath.Path, error: OSError) -> BuildError:
    if error.strerror:
        return BuildError(f"--out {out}: cannot be read ({error.strerror}); choose another folder")
    return BuildError(f"--out {error}")  # of a bucket: one line that says what to do


def _check_fits(manifest: dict, args: argparse.Namespace, classes: tuple[str, ...]) -> None:
    """Raise BuildError if the existing data set has another kind, number of frames or classes."""
    if not manifest:
        return
    if (manifest["frames"]["per_clip"], manifest["kind"]) != (args.num_frames, args.config):
        raise BuildError(
            f"{args.out} holds a {manifest['kind']} data set with {manifest['frames']['per_clip']} frames per clip; choose another --out"
        )
    if args.config == "classification":
        old = manifest.get("classes", list(schema.CLASS_NAMES))
        if old != list(classes):
            other = next(
                (
                    f"class {i} is {a!r} there, {b!r} here"
                    for i, (a, b) in enumerate(zip(old, classes, strict=False))
                    if a != b
                ),
                f"{len(old)} there, {len(classes)} here",
            )
            raise BuildError(
                f"{args.out} was built with other classes ({other}); give the same --classes, or choose another --out"
            )


def _main(argv: list[str] | None) -> int:
    args, beam_flags = parse(argv, __doc__)
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise BuildError(f"{', '.join(absent)} not installed; run pip install 'ymplug_jax[prep]'")
    try:
        with quiet():
            manifest = build(args, beam_flags)
    except PlaceError as error:
        print(f"error: {say(error)}", file=sys.stderr)
        return PLACE
    split = args.split or rows_lib.split_of(args.csv)
    entry = manifest["splits"][split]
    print(
        f"{args.out}: {split}: {entry['written']:,} rows (data set: {manifest['written']:,}), {manifest['bytes'] / 1e6:,.1f} MB, {sum(len(s['shards']) for s in manifest['splits'].values())} shards"
    )
    if entry["rejected"]:
        print(f"{entry['rejected']:,} of {entry['rows']:,} rows rejected; reasons in {args.out / schema.REJECTS}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, 2 after an error that the user can fix, or 5 if a disk or the machine failed."""
    return run(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
