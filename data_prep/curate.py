"""Curate raw uploads: from a listing of videos and titles to the clips worth training on, with a reason for every clip that is dropped.

    python -m data_prep.curate --csv raw.csv --video_root VIDEOS --out CURATED --target 100000
    python -m data_prep.build_shards --config pretrain --csv CURATED/curated.csv --video_root VIDEOS --out SHARDS

Writes curated.csv (the kept rows), decisions.parquet (every row with its scores and the reason), card.html and, last, funnel.json.
Flags of Beam may follow, as for build_shards; by default all cores of this machine are used. To resume a killed run, run the same
command again. Thresholds are settings of configs/curate.py; see docs/curate.md.
Exit codes: 2 for an error in flags, listing or folders; 5 if a disk or the machine failed.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_prep import beam_flags, raw_rows, rows, work_folder
from data_prep.archives import Tar
from data_prep.build_flags import BuildError, PlaceError, check_places
from data_prep.build_progress import Progress
from data_prep.build_rows import ARCHIVE_INDEX, absolute
from data_prep.curation import settings as settings_lib
from data_prep.curation import titles
from data_prep.curation.settings import Curation
from data_prep.flags import PLACE, Parser, local_path, place_of, run, say
from data_prep.quiet import quiet
from data_prep.scratch import Scratch
from data_prep.videos import open_videos
from data_prep.work_folder import Work
from ymplug_jax.core import config_file, places
from ymplug_jax.core.config import settings_of

NEEDS = ("apache_beam", "cv2", "datasketch", "pyarrow", "regex", "scenedetect", "scipy")  # the extra `prep`
WORK = ".curating"  # folder in --out while a curation runs
CURATED, DECISIONS, CARD, FUNNEL = "curated.csv", "decisions.parquet", "card.html", "funnel.json"
FRAMES = 16  # partitions are as large as those of a build with so many frames a clip
SHARD_ROWS = 50_000  # rows of the listing for each shard of the search for near-duplicates
VERSION = 1  # increase it when equal settings give other decisions


def parser() -> Parser:
    """Return the parser of the flags, without those of Beam."""
    made = Parser("curate", __doc__)
    add = made.add_argument
    add(
        "--csv",
        required=True,
        type=place_of("--csv"),
        help="CSV or Parquet file with video_id:FILE, title and optionally source",
    )
    add(
        "--video_root",
        required=True,
        type=place_of("--video_root"),
        help="folder of the videos, or a .zip or .tar with them",
    )
    add("--out", required=True, type=place_of("--out"), help="folder to write")
    add("--config", default="configs/curate.py", help="file of the thresholds (default configs/curate.py)")
    add("--target", type=int, help="largest number of clips to keep, sampled by config.diversity.seed (default: all)")
    add(
        "--allow_links_to",
        type=local_path,
        action="append",
        default=[],
        help="folder outside the video root that symbolic links may point to; may be repeated",
    )
    add(
        "--partition_rows",
        type=int,
        help="rows that a worker scores at a time; default: 1/16 of the listing, 16 to 591",
    )
    add(
        "--workers",
        type=int,
        help="number of local processes (default: all cores); with --runner=PortableRunner: Beam jobs side by side (default 1)",
    )
    add(
        "--stall_minutes",
        type=float,
        default=10.0,
        help="minutes without a finished row after which a worker counts as lost (default 10)",
    )
    add("--overwrite", action="store_true", help="curate again into a folder that holds another curation")
    return made


def _check(args: argparse.Namespace, more: list[str]) -> Curation:
    """Validate flags and return the settings. Raises BuildError, Mistake."""
    check_places(args)
    for name, value in (("target", args.target), ("partition_rows", args.partition_rows), ("workers", args.workers)):
        if value is not None and value < 1:
            raise BuildError(f"--{name} {value}: too small; give 1 or more")
    curation = settings_lib.from_config_dict(config_file.load(args.config))
    slowest = max(curation.content.time_limit, curation.metadata.time_limit)
    if not 60 * args.stall_minutes > slowest:
        raise BuildError(
            f"--stall_minutes {args.stall_minutes:g}: not above the {slowest:g} seconds of config.content.time_limit; give more"
        )
    try:
        beam_flags.check(more, re.findall(r"--\w+", parser().format_help()), args.workers is not None)
    except ValueError as error:
        raise BuildError(str(error)) from None
    try:
        titles.Scorer(curation.titles)  # workers read the word lists; errors are told here
    except OSError as error:
        raise BuildError(f"config.titles: {say(error)}; correct the path") from None
    model = curation.titles.language_model
    if model and not Path(model).is_dir():
        raise BuildError(
            f"config.titles.language_model {model}: no such folder; give the folder of a run of the task language"
        )
    return curation


def _facts(args: argparse.Namespace, curation: Curation, listing: Path) -> dict[str, Any]:
    """Return what the decisions depend on, as funnel.json holds it. Raises OSError."""
    lists = {name: getattr(curation.titles, name) for name in ("blocklist", "adverts", "upload_words")}
    facts = {
        "version": VERSION,
        "csv": args.csv.name,
        "csv_sha256": rows.sha256(listing),
        "video_root": absolute(args.video_root),
        "target": args.target,
        "config": settings_of(curation),
        "lists_sha256": {name: rows.sha256(Path(file)) for name, file in lists.items() if file},
    }
    read_again: dict[str, Any] = json.loads(json.dumps(facts))
    return read_again


def curate(args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Curate and return the content of funnel.json.

    Raises:
      BuildError: the input is unusable, or the folder holds another curation.
      PlaceError: a disk or the machine failed.
      OSError: a place cannot be read or written.
    """
    curation = _check(args, more)
    with Scratch() as scratch:
        listing = Path(args.csv)
        if places.is_remote(args.csv):
            listing = scratch.path / args.csv.name
            places.download(args.csv, listing)
        if curation.diversity.max_per_source and not raw_rows.has_source(listing):
            raise BuildError(
                f"{args.csv}: no column 'source', which config.diversity.max_per_source needs; add it, or set the limit to 0"
            )
        facts = _facts(args, curation, listing)
        old = _old(args.out)
        if old and old.get("settings") == facts and not args.overwrite:
            print(
                f"{args.out}: already curated with these settings; nothing to do (--overwrite does it again)",
                file=sys.stderr,
            )
            places.delete_folder(args.out / WORK)
            return old
        if old and not args.overwrite:
            raise BuildError(
                f"{args.out}: holds a curation of another listing or with other settings; give --overwrite, or choose another --out"
            )
        return _curate(args, more, curation, listing, facts, scratch.path)


def _old(out: epath.Path) -> dict[str, Any]:
    """Return the funnel.json of a folder, {} if there is none. Raises BuildError, OSError."""
    try:
        found: dict[str, Any] = json.loads(places.read_bytes(out / FUNNEL))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise BuildError(f"{out / FUNNEL}: damaged ({error}); delete it and run again") from None
    return found


def _curate(
    args: argparse.Namespace, more: list[str], curation: Curation, listing: Path, facts: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    from data_prep.curation import decisions

    work = _score(args, more, curation, listing, facts)
    print(f"{work.rows:,} rows scored; looking for near-duplicates", file=sys.stderr)
    pairs = _pairs(args, more, curation, work)
    verdicts = decisions.decide(work.folder, work.partitions, pairs, curation, args.target)
    places.delete(args.out / FUNNEL)  # from here on, the folder is not complete
    local = scratch / "outputs"
    local.mkdir()
    decisions.write_decisions(work.folder, work.partitions, verdicts, local / DECISIONS)
    with open(local / CURATED, "w", encoding="utf-8", newline="") as stream:
        raw_rows.write_kept(listing, (code == 0 for code in verdicts.codes.tolist()), stream)
    stages = decisions.funnel(verdicts.codes)
    funnel = {
        "rows": work.rows,
        "kept": stages[-1]["kept"],
        "stages": stages,
        "clusters": len(set(verdicts.clusters.values())),
        "not_checked": list(decisions.MODEL_NAMES),
        "settings": facts,
        "sha256": {name: rows.sha256(local / name) for name in (DECISIONS, CURATED)},
    }
    _write_card(args, curation, funnel, local, verdicts.draws)
    for name in (DECISIONS, CURATED, CARD):
        places.upload(local / name, args.out / name)
    places.write_text(args.out / FUNNEL, json.dumps(funnel, indent=1, ensure_ascii=False) + "\n")
    places.delete_folder(args.out / WORK)
    return funnel


def _score(args: argparse.Namespace, more: list[str], curation: Curation, listing: Path, facts: dict[str, Any]) -> Work:
    """Score all rows, those of an interrupted run excepted. Raises BuildError, PlaceError, OSError."""
    from data_prep import runners
    from data_prep.curation.score_rows import Scoring
    from data_prep.partition import Job

    roots = [absolute(path) for path in (args.video_root, *args.allow_links_to)]
    known = {**facts, "target": None, "places": roots, "partition_rows": args.partition_rows}
    index, links = "", tuple(os.path.abspath(path) for path in args.allow_links_to)
    with contextlib.closing(open_videos(args.video_root, links, curation.content.time_limit)) as videos:
        work = work_folder.open_work(
            args.out,
            args.out / WORK / "scores",
            known,
            functools.partial(raw_rows.iter_raw, listing),
            lambda count: args.partition_rows or work_folder.default_size(count, FRAMES),
        )
        if isinstance(videos, Tar):
            videos.save_index(work.folder / ARCHIVE_INDEX)
            index = absolute(work.folder / ARCHIVE_INDEX)
    scoring = Scoring(curation, links, index)
    job = Job(absolute(work.folder), absolute(args.video_root), "scores", work.rows, work.size, scoring, token="")
    with Progress(work, "curate"):
        runners.run(job, work.partitions, more, args.workers, 60 * args.stall_minutes)
    return work


def _pairs(args: argparse.Namespace, more: list[str], curation: Curation, work: Work) -> np.ndarray:
    """Return the pairs of rows whose frames are alike, int64[p, 2]. Raises PlaceError, OSError."""
    from data_prep import runners
    from data_prep.curate_steps import Grouping
    from data_prep.curation.score_rows import read_scores
    from data_prep.partition import Job

    folder = work.folder / "pairs"  # goes with the scores when other settings replace them
    shards = max(1, min(work.partitions, -(-work.rows // SHARD_ROWS)))
    limits = curation.duplicates
    grouping = Grouping(
        absolute(work.folder), work.partitions, work.size, shards, limits.max_distance, limits.min_alike
    )
    if not places.is_remote(folder):
        Path(folder).mkdir(exist_ok=True)
    job = Job(absolute(folder), "", "pairs", work.rows, work.size, grouping, token="")
    runners.run(job, shards, more, 1, 60 * args.stall_minutes)  # one job: every key must meet every other
    tables = [read_scores(folder, shard, ["one", "other"]) for shard in range(shards)]
    return np.concatenate(
        [np.stack([table.column(name).to_numpy() for name in ("one", "other")], 1) for table in tables]
    )


def _write_card(
    args: argparse.Namespace, curation: Curation, funnel: dict[str, Any], local: Path, draws: np.ndarray
) -> None:
    """Write the page of the corpus. Raises OSError."""
    from data_prep.curation import card

    links = tuple(os.path.abspath(path) for path in args.allow_links_to)
    seconds = curation.content.time_limit
    with contextlib.closing(open_videos(args.video_root, links, seconds)) as videos:
        page = card.render(funnel, local / DECISIONS, draws, videos, seconds)
    (local / CARD).write_text(page, encoding="utf-8")


def _main(argv: list[str] | None) -> int:
    args, more = parser().parse_known_args(argv)
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise BuildError(f"{', '.join(absent)} not installed; run pip install 'ymplug_jax[prep]'")
    try:
        with quiet():
            try:
                funnel = curate(args, more)
            except OSError as error:
                raise PlaceError(f"{say(error)}; correct this, then run the same command again") from None
    except PlaceError as error:
        print(f"error: {say(error)}", file=sys.stderr)
        return PLACE
    print(f"{args.out}: {funnel['kept']:,} of {funnel['rows']:,} rows kept")
    for stage in funnel["stages"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in stage["reasons"].items())
        print(f"  {stage['stage']:<11} {stage['kept']:>9,} left{'; dropped: ' + reasons if reasons else ''}")
    print(f"  not checked: {', '.join(funnel['not_checked'])} (no model)")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, 2 after an error that the user can fix, or 5 if a disk or the machine failed."""
    return run(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
