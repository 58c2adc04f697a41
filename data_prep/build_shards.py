"""Videos and a CSV to TFRecord shards, once.

    python -m data_prep.build_shards --config pretrain --csv pretrain.csv --video_root VIDEOS --out SHARDS

Flags that are not listed go to Beam (`--runner=DataflowRunner --project=...`); by default every core of this machine works.
A killed build goes on where it stopped: give the same command again. Run it once more with the next CSV to add a split.
"""

import argparse
import json
import os
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_prep import rows as rows_lib
from data_prep.builder import NAME, BuildPartition, Settings, features
from data_prep.container import REASONS
from data_prep.index_shards import BrokenShard, write_index
from data_prep.video_frames import JPEG_QUALITY, SHORT_SIDE
from ymplug_jax.data import schema

BUILDING = ".building"  # folder inside OUT for partitions that are not yet shards


class BuildError(ValueError):
    """The build cannot go on; the message names what to change."""


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, flags for Beam)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, choices=sorted(schema.COLUMNS), help="kind of CSV")
    parser.add_argument("--csv", required=True, type=Path)
    parser.add_argument("--video_root", required=True, type=Path, help="folder that the FILE column is relative to")
    parser.add_argument("--out", required=True, type=Path, help="folder of the data set")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), help="default: by the CSV's name (_val, _test)"
    )
    parser.add_argument("--num_frames", type=int, default=16, help="frames stored of every clip")
    parser.add_argument("--time_limit", type=float, default=120.0, help="seconds a clip")
    parser.add_argument("--max_rejects", type=float, default=1.0, help="fraction of rows above which the build fails")
    parser.add_argument("--partition_rows", type=int, help="rows a shard; default: a sixteenth of the CSV, 16 to 1024")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes on this machine")
    parser.add_argument("--overwrite", action="store_true", help="build a split again that is there already")
    return parser.parse_known_args(argv)


def build(args: argparse.Namespace, beam_flags: list[str]) -> dict:
    """Build one split and return the data set's manifest.

    Raises:
      BuildError: input that cannot be used, too many rejects, or a data set of other settings in the folder.
    """
    for path, flag in ((args.csv, "--csv"), (args.video_root, "--video_root")):
        if not path.exists():
            raise BuildError(f"{flag} {path}: no such {'file' if flag == '--csv' else 'folder'}")
    split = args.split or rows_lib.split_of(args.csv)
    rows = rows_lib.read_rows(args.csv, args.config)
    size = args.partition_rows or min(1024, max(16, -(-len(rows) // 16)))
    settings = Settings(args.config, args.num_frames, args.time_limit)
    facts = {
        "csv": args.csv.name,
        "csv_sha256": rows_lib.sha256(args.csv),
        "kind": args.config,
        "num_frames": args.num_frames,
        "partition_rows": size,
    }

    manifest = _old_manifest(args.out)
    _check_same_frames(manifest, args)
    if split in manifest.get("splits", {}) and not args.overwrite:
        old = manifest["splits"][split]
        if all(old[key] == value for key, value in facts.items()):
            print(
                f"{args.out}: split {split!r} is built already ({old['written']:,} records); nothing to do",
                file=sys.stderr,
            )
            return manifest
        raise BuildError(
            f"{args.out}: split {split!r} was built from another CSV or with other settings; use --overwrite or another --out"
        )

    work = args.out / BUILDING / split
    _resume_folder(work, facts)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    todo = [i for i in range(len(parts)) if not (work / f"part-{i:05d}.json").exists()]
    if len(todo) < len(parts):
        print(f"going on: {len(parts) - len(todo)} of {len(parts)} partitions are there already", file=sys.stderr)
    if todo:
        with _Progress(work, parts):
            _run_beam([(i, [tuple(row) for row in parts[i]]) for i in todo], settings, args, work, beam_flags)
    done = [json.loads((work / f"part-{i:05d}.json").read_text(encoding="utf-8")) for i in range(len(parts))]

    rejects = [{**reject, "split": split} for part in done for reject in part["rejects"]]
    written = sum(part["written"] for part in done)
    if written + len(rejects) != len(rows):
        raise BuildError(
            f"{work}: {written} written + {len(rejects)} rejected are not {len(rows)} rows; delete the folder and build again"
        )
    _print_summary(rejects, written, len(rows))
    if len(rejects) > args.max_rejects * len(rows):
        raise BuildError(
            f"{len(rejects)} of {len(rows)} rows were rejected, more than --max_rejects {args.max_rejects:g} allows; the reasons stand above, nothing was published"
        )
    if written == 0:
        raise BuildError("no row gave a record; the reasons stand above")
    repeated = rows_lib.duplicates(rows)
    if repeated:
        examples = ", ".join(f"{name} ({count} times)" for name, count in list(repeated.items())[:3])
        print(f"{len(repeated)} files stand in more than one row (all rows are kept): {examples}", file=sys.stderr)
    return _publish(args.out, work, split, facts, done, rejects, manifest, len(repeated))


def _run_beam(elements: list, settings: Settings, args: argparse.Namespace, work: Path, beam_flags: list[str]) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    if not any(flag.startswith("--runner") for flag in beam_flags):
        workers = min(args.workers, len(elements))
        # The local runner of many processes; Prism, Beam's newer default, would need a download.
        beam_flags = [*beam_flags, "--runner=BundleBasedDirectRunner" if workers == 1 else "--runner=FnApiRunner"]
        if workers > 1:
            beam_flags += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    if not any(flag.startswith("--default_sdk_harness_log_level") for flag in beam_flags):
        beam_flags = [*beam_flags, "--default_sdk_harness_log_level=WARNING"]
    step = BuildPartition(settings, str(args.video_root.absolute()), str(work.absolute()))
    with beam.Pipeline(options=PipelineOptions(beam_flags, save_main_session=False)) as pipeline:
        pipeline | beam.Create(elements) | beam.Reshuffle() | beam.ParDo(step)


class _Progress:
    """A bar over all rows, fed by the small files that partitions leave."""

    def __init__(self, work: Path, parts: list):
        self._work, self._parts, self._end = work, parts, threading.Event()

    def __enter__(self) -> "_Progress":
        self._bar = tqdm(
            total=sum(map(len, self._parts)),
            initial=self._count(),
            unit="clip",
            desc="build",
            file=sys.stderr,
            mininterval=0.5,
        )
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._update()
        self._bar.close()

    def _watch(self) -> None:
        while not self._end.wait(0.5):
            self._update()

    def _update(self) -> None:
        self._bar.update(self._count() - self._bar.n)

    def _count(self) -> int:
        count = sum(len(self._parts[int(p.stem[5:])]) for p in self._work.glob("part-*.json"))
        for path in self._work.glob("part-*.progress"):
            try:
                count += int(path.read_text() or 0)
            except (FileNotFoundError, ValueError):  # just renamed or being written
                continue
        return count


def _old_manifest(out: Path) -> dict:
    path = out / schema.MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_same_frames(manifest: dict, args: argparse.Namespace) -> None:
    if manifest and (manifest["frames"]["per_clip"], manifest["kind"]) != (args.num_frames, args.config):
        raise BuildError(
            f"{args.out} holds a {manifest['kind']} data set with {manifest['frames']['per_clip']} frames a clip; use another --out"
        )


def _resume_folder(work: Path, facts: dict) -> None:
    """An empty folder for the partitions, or the one of an earlier try of the very same build."""
    note = work / "build.json"
    if work.exists() and (not note.exists() or json.loads(note.read_text(encoding="utf-8")) != facts):
        shutil.rmtree(work)  # of another CSV or other settings: its partitions do not fit
    work.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.partial*", "*.progress"):
        for leftover in work.glob(pattern):
            leftover.unlink()
    note.write_text(json.dumps(facts), encoding="utf-8")


def _publish(
    out: Path,
    work: Path,
    split: str,
    facts: dict,
    done: list[dict],
    rejects: list[dict],
    manifest: dict,
    duplicates: int,
) -> dict:
    """Index the partitions, give them their final names, write metadata; the manifest comes last and makes it valid."""
    kept = [i for i, part in enumerate(done) if part["written"]]
    shards = []
    for i in tqdm(kept, unit="shard", desc="verify and index", file=sys.stderr, leave=False):
        part = work / f"part-{i:05d}.tfrecord"
        try:
            count = write_index(part)
        except BrokenShard as error:
            (work / f"part-{i:05d}.json").unlink()
            raise BuildError(f"{error}. Give the same command again: only this partition is built anew") from None
        if count != done[i]["written"]:
            raise BuildError(f"{part}: {count} records, expected {done[i]['written']}; delete {work} and build again")
    (out / schema.MANIFEST).unlink(missing_ok=True)  # until the end there is no whole data set
    for old in out.glob(f"{NAME}-{split}.tfrecord-*"):
        old.unlink()
    for number, i in enumerate(kept):
        part, name = work / f"part-{i:05d}.tfrecord", schema.shard_name(NAME, split, number, len(kept))
        part.with_name(part.name + schema.INDEX_SUFFIX).rename(out / (name + schema.INDEX_SUFFIX))
        shards.append({"file": name, "records": done[i]["written"], "bytes": part.stat().st_size})
        part.rename(out / name)
    reasons = dict(Counter(reject["reason"] for reject in rejects))
    numbers = {
        "rows": sum(part["rows"] for part in done),
        "written": sum(part["written"] for part in done),
        "rejected": len(rejects),
        "duplicated_ids": duplicates,
    }
    entry = {**facts, **numbers, "bytes": sum(shard["bytes"] for shard in shards), "rejects": reasons, "shards": shards}
    splits = {**manifest.get("splits", {}), split: entry}
    _write_rejects(out, split, rejects)
    _write_tfds(out, splits, facts["num_frames"])
    manifest = {
        "schema_version": schema.SCHEMA_VERSION,
        "name": NAME,
        "kind": facts["kind"],
        **{key: sum(part[key] for part in splits.values()) for key in (*numbers, "bytes")},
        "frames": {"per_clip": facts["num_frames"], "short_side": SHORT_SIDE, "jpeg_quality": JPEG_QUALITY},
        "splits": splits,
    }
    partial = out / f"{schema.MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(out / schema.MANIFEST)
    shutil.rmtree(out / BUILDING / split)
    if not any((out / BUILDING).iterdir()):
        (out / BUILDING).rmdir()
    return manifest


def _write_rejects(out: Path, split: str, rejects: list[dict]) -> None:
    path = out / schema.REJECTS
    old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [reject for reject in old if reject["split"] != split] + rejects
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _write_tfds(out: Path, splits: dict, num_frames: int) -> None:
    """dataset_info.json and features.json, which make the folder a TFDS data set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=out,
        dataset_name=NAME,
        filetype_suffix="tfrecord",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard["records"] for shard in entry["shards"]],
            num_bytes=entry["bytes"],
            filename_template=template.replace(split=name),
        )
        for name, entry in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=features(num_frames),
        split_infos=infos,
        version=schema.SCHEMA_VERSION,
        filename_template=template,
        check_data=False,
    )


def _print_summary(rejects: list[dict], written: int, rows: int) -> None:
    print(f"{rows:,} rows: {written:,} written, {len(rejects):,} rejected", file=sys.stderr)
    for reason, count in Counter(reject["reason"] for reject in rejects).most_common():
        print(f"  {count:>9,}  {reason:<16} {REASONS[reason]}", file=sys.stderr)


def main() -> int:
    """Exit code 0; 2 with one line on stderr for what the user can mend."""
    args, beam_flags = parse()
    try:
        manifest = build(args, beam_flags)
    except (BuildError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {manifest['written']:,} records, {manifest['bytes'] / 1e6:,.1f} MB, {sum(len(s['shards']) for s in manifest['splits'].values())} shards"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
