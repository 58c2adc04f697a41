"""Build TFRecord shards from videos and a CSV, or from conversations in JSON lines with videos and images.

    python -m data_prep.build_shards --config pretrain --csv pretrain.csv --video_root VIDEOS --out SHARDS
    python -m data_prep.build_shards --config instruct --csv instruct.jsonl --video_root VIDEOS --out CHATS

Flags of Beam may follow (`--runner=DataflowRunner --project=...`); by default the build uses all cores of this machine.
To resume a killed build, run the same command again. To add a split, run the command with its CSV and the same --out.
Exit codes: 2 for an error in flags, CSV or folders; 5 if a disk or the machine failed during the build.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import conversations, runners
from data_prep import rows as rows_lib
from data_prep.build_flags import BuildError, check, parse
from data_prep.build_progress import Progress
from data_prep.flags import PLACE, run, say
from data_prep.publish import BUILDING, PLAN, finish, publish
from data_prep.runners import PlaceError
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
    split = args.split or rows_lib.split_of(args.csv)
    classes = schema.CLASS_NAMES
    if args.classes:
        classes = schema.parse_class_names(_text(args.classes), f"--classes {args.classes}")
    talks = conversations.read_talks(args.csv) if args.config == schema.INSTRUCT else None
    rows = rows_lib.read_rows(args.csv, args.config, classes) if talks is None else talks
    size = args.partition_rows or min(1024, max(16, -(-len(rows) // 16)))
    facts = {
        "csv": args.csv.name,
        "csv_sha256": rows_lib.sha256(args.csv),
        "kind": args.config,
        "num_frames": args.num_frames,
        "partition_rows": size,
    }
    if talks is not None:
        facts["tokenizer_sha256"] = rows_lib.sha256(args.tokenizer) if args.tokenizer else None
        facts["max_tokens"], facts["slots"] = args.max_tokens, args.slots
    manifest = _old_manifest(args.out)
    _check_fits(manifest, args, classes)
    if split in manifest.get("splits", {}) and not args.overwrite:
        _check_built(args.out, split, manifest["splits"][split], facts)
        return manifest
    if args.config == "classification":
        facts["classes"] = list(classes)
    work = args.out / BUILDING / split
    _resume_folder(work, args, facts)
    try:
        done = _partitions(args, beam_flags, work, rows, size)
        written, rejected = (sum(part["written"] for part in done), sum(len(part["rejects"]) for part in done))
        if written + rejected != len(rows):
            raise BuildError(
                f"{work}: {written} written + {rejected} rejected rows are not {len(rows)}; delete the folder and build again"
            )
        _print_summary(split, done, len(rows))
        if rejected > args.max_rejects * len(rows):
            raise BuildError(
                f"{rejected} of {len(rows)} rows were rejected and nothing was published; fix the rows (reasons above) or raise --max_rejects {args.max_rejects:g}"
            )
        if written == 0:
            raise BuildError(
                f"all {len(rows)} rows were rejected and nothing was published; fix the rows (reasons above)"
            )
        more = _repeated(rows, talks)
        if talks is not None:
            more["cut"] = sum(part.get("cut", 0) for part in done)
        try:
            return publish(args.out, work, split, facts, done, manifest, more)
        except ValueError as error:
            raise BuildError(str(error)) from None
    except OSError as error:
        place = error.filename or args.out
        raise PlaceError(
            f"{place}: cannot be written ({error.strerror}); make it writable, then run the same command again"
        ) from None


def _repeated(rows: list, talks: list[conversations.Talk] | None) -> dict[str, int]:
    """Report what occurs in more than one row: a file, or a whole conversation with its files."""
    repeated = rows_lib.duplicates(rows) if talks is None else conversations.duplicates(talks)
    if repeated:
        what = "files" if talks is None else "conversations"
        examples = ", ".join(f"{name} ({count} times)" for name, count in list(repeated.items())[:3])
        print(f"{len(repeated)} {what} occur in more than one row (all rows are kept): {examples}", file=sys.stderr)
    return {"duplicated_ids": len(repeated)}


def _check_built(out: Path, split: str, old: dict[str, Any], facts: dict[str, Any]) -> None:
    """Report that the split already exists. Raises BuildError if it was built with other settings."""
    if any(old.get(key) != value for key, value in facts.items()):
        raise BuildError(
            f"{out}: split {split!r} was built from another CSV or with other settings; give --overwrite, or choose another --out"
        )
    again = f" ({old['rejected']:,} rows were rejected; --overwrite builds the split again)" if old["rejected"] else ""
    print(f"{out}: split {split!r} already exists ({old['written']:,} records); nothing to do{again}", file=sys.stderr)


def _text(path: Path) -> str:
    """Read a small UTF-8 file. Raises BuildError."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except FileNotFoundError:
        raise BuildError(f"{path}: no such file; correct the path") from None
    except OSError as error:
        raise BuildError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _partitions(args: argparse.Namespace, beam_flags: list[str], work: Path, rows: list, size: int) -> list[dict]:
    """Build the missing partitions and return the summaries of all."""
    from data_prep.builder import Partitions, Settings, write_rows

    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    todo = [i for i in range(len(parts)) if not (work / f"part-{i:05d}.json").exists()]
    if len(todo) < len(parts):
        print(f"resuming: {len(parts) - len(todo)} of {len(parts)} partitions are already built", file=sys.stderr)
    if todo:
        links = tuple(str(folder.absolute()) for folder in args.allow_links_to)
        settings = Settings(args.config, args.num_frames, args.time_limit, links)
        if args.tokenizer:
            settings = settings._replace(
                tokenizer=str(args.tokenizer.absolute()), max_tokens=args.max_tokens, slots=args.slots
            )
        step = Partitions(settings, str(args.video_root.absolute()), str(work.absolute()), tuple(todo))
        how = runners.choose(beam_flags, args.workers, len(todo))
        with Progress(work, parts):
            for i in todo:
                write_rows(work, i, parts[i])
            runners.run(step.graph, step.state, how, 60 * args.stall_minutes)
    return [json.loads((work / f"part-{i:05d}.json").read_text(encoding="utf-8")) for i in range(len(parts))]


def _old_manifest(out: Path) -> dict:
    """Return the current manifest of the data set, after finishing an interrupted publication.

    Raises:
      BuildError: the folder cannot be read, or the manifest is damaged.
    """
    try:
        for plan in sorted(out.glob(f"{BUILDING}/*/{PLAN}")):
            finish(out, plan.parent)
        path = out / schema.MANIFEST
        if not path.exists():
            return {}
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["kind"], manifest["frames"]["per_clip"], manifest["splits"].items()
        return manifest
    except OSError as error:
        raise BuildError(f"--out {out}: cannot be read ({error.strerror}); choose another folder") from None
    except KeyError as error:
        raise BuildError(f"{path}: damaged (no {error} in it); build into another --out") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BuildError(f"{path}: damaged ({error}); build into another --out") from None


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


def _resume_folder(work: Path, args: argparse.Namespace, facts: dict) -> None:
    """Prepare the folder of the partitions: keep that of an interrupted build with equal settings, else empty it.

    Raises:
      BuildError: the folder cannot be made or written.
    """
    note = work / "build.json"
    places = [str(path.absolute()) for path in (args.video_root, *args.allow_links_to)]
    same = json.dumps({**facts, "places": places, "time_limit": args.time_limit})
    try:
        if work.exists() and (not note.exists() or note.read_text(encoding="utf-8") != same):
            shutil.rmtree(work)  # partitions of another CSV or other settings
        work.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.partial*", "*.progress"):
            for leftover in work.glob(pattern):
                leftover.unlink()
        note.write_text(same, encoding="utf-8")
    except OSError as error:
        raise BuildError(
            f"--out {args.out}: cannot be created or written ({error.strerror}); choose another folder"
        ) from None


def _print_summary(split: str, done: list[dict], rows: int) -> None:
    rejects = Counter(reject["reason"] for part in done for reject in part["rejects"])
    written = sum(part["written"] for part in done)
    print(f"{split}: {rows:,} rows: {written:,} written, {rejects.total():,} rejected", file=sys.stderr)
    reasons = {**REASONS, **conversations.REASONS}
    for reason, count in rejects.most_common():
        print(f"  {count:>9,}  {reason:<16} {reasons[reason]}", file=sys.stderr)
    if cut := sum(part.get("cut", 0) for part in done):
        print(f"{cut:,} conversations are longer than --max_tokens and will be cut (they are kept)", file=sys.stderr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Capture what Beam, its workers and TensorFlow write to stderr, so that only messages of this program appear.

    The last captured lines are shown if the build ends with an unexpected error.
    """
    logging.getLogger().addHandler(logging.NullHandler())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    real, shown = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as log, os.fdopen(os.dup(real), "w", encoding="utf-8", buffering=1) as ours:
        os.dup2(log.fileno(), 2)
        sys.stderr = ours
        try:
            yield
        except (BuildError, PlaceError, ValueError, OSError, KeyboardInterrupt):
            raise
        except BaseException:
            log.seek(0)
            ours.write("".join(log.read().decode("utf-8", "replace").splitlines(True)[-40:]))
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)
            sys.stderr = shown


def _main(argv: list[str] | None) -> int:
    args, beam_flags = parse(argv, __doc__)
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise BuildError(f"{', '.join(absent)} not installed; run pip install 'ymplug_jax[prep]'")
    try:
        with _quiet():
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
