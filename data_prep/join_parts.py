"""Join the parts of a data set that `build_shards --part NAME` built into one data set.

    python -m data_prep.join_parts --out SHARDS --csv pretrain.csv

Checks that the parts fit together and writes SHARDS/manifest.json and SHARDS/rejects.jsonl over all of them; shards stay where they are.
After a part was added or built again, run the same command again.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_prep import conversations
from data_prep import rows as rows_lib
from data_prep.flags import Parser, bar, run
from data_prep.parts import (
    BUILDING,
    Part,
    PartError,
    check_files,
    folders_in,
    misfit,
    read_part,
    rejects_of,
    rows_of,
    written_rows,
)  # fmt: skip
from ymplug_jax.core import places
from ymplug_jax.data import joined_set, schema

MISSING = "in no part"  # detail of a reject
SHARD = ".tfrecord-"  # in the names of shards
EXAMPLES = 3  # missing rows that are printed
ORDER = ("train", "validation", "test")
SPLIT_FACTS = ("csv", "csv_sha256", "kind", "num_frames", "tokenizer_sha256", "max_tokens", "slots")


def find_parts(out: epath.Path, names: list[str] | None) -> list[Part]:
    """Return the parts in OUT, by name, or the named ones only.

    Raises:
      PartError: there are none, one is only half built, or they do not fit together.
      OSError: a folder cannot be read.
    """
    folders = folders_in(out)
    if names is not None:
        there = {folder.name for folder in folders}
        if absent := [name for name in names if name not in there]:
            known = ", ".join(sorted(there)) or "nothing"
            raise PartError(f"--parts {absent[0]}: no such folder in {out}, which holds {known}; correct the name")
        folders = [folder for folder in folders if folder.name in names]
    parts = []
    for folder in folders:
        part = read_part(folder)
        shards = part is None and any(SHARD in name or name == schema.MANIFEST for name in places.sizes(folder))
        if shards or any((folder / BUILDING).glob("*/*")):
            raise PartError(
                f"{folder}: only half built; wait for its build or run it again to finish it, delete the folder, or give --parts "
                "with the other parts"
            )
        if part is not None:
            parts.append(part)
        elif names is not None:
            raise PartError(
                f"{folder}: no {schema.MANIFEST} in it, so it is no part; build it, or leave it out of --parts"
            )
    if not parts:
        raise PartError(
            f"--out {out}: no parts in it; build them with python -m data_prep.build_shards --part NAME --out {out}"
        )
    for part in parts[1:]:
        if what := misfit(parts[0].manifest, part.manifest):
            raise PartError(
                f"{part.folder}: differs from {parts[0].folder} in {what}; build one of them again with --overwrite, or leave it out with --parts"
            )
    return parts


def owners(parts: list[Part], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (written, rejected): int32[rows of the CSV], the number of the part that has row i as a record or a reject; -1: none.

    A row that one part rejected and another wrote, e.g. after its file was downloaded again, counts as written.

    Raises:
      PartError: a row is written in two parts.
      OSError: a part cannot be read.
    """
    count = max(part.splits[split]["csv_rows"] for part in parts if split in part.splits)
    written, rejected = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    for number, part in enumerate(parts):
        if split not in part.splits:
            continue
        mine, all_rows = written_rows(part, split), rows_of(part, split)
        entry = part.splits[split]
        if len(mine) != entry["written"] or (len(all_rows) and all_rows[-1] >= count):
            raise PartError(
                f"{part.folder}: its rejects do not fit to its manifest; copy it again or build it again with --overwrite"
            )
        if (both := mine[written[mine] >= 0]).size:
            other = parts[written[both[0]]]
            raise PartError(
                f"{part.folder} and {other.folder}: {len(both):,} rows of split {split!r} are in both, the first is row {both[0]}; "
                f"build one of them again with --overwrite, which leaves these rows to the other"
            )
        written[mine] = number
        new = np.setdiff1d(all_rows, mine, assume_unique=True)
        rejected[new[rejected[new] < 0]] = number
    rejected[written >= 0] = -1
    return written, rejected


def csvs_of(parts: list[Part], files: list[epath.Path]) -> dict[str, epath.Path]:
    """Return the CSV of each split, found by content.

    Raises:
      PartError: one is missing, or no part was built from it.
      OSError: a file cannot be read.
    """
    wanted = {split: entry for part in parts for split, entry in part.splits.items()}
    digests = {file: _sha256(file) for file in files}
    found = {
        split: file
        for split, entry in wanted.items()
        for file, digest in digests.items()
        if digest == entry["csv_sha256"]
    }
    for file in files:
        if file not in found.values():
            built = ", ".join(sorted({entry["csv"] for entry in wanted.values()}))
            raise PartError(
                f"--csv {file}: no part was built from this file (the parts are of {built}, compared by content); give the CSV that "
                "the parts were built from"
            )
    if lacking := sorted(wanted.keys() - found.keys()):
        raise PartError(f"--csv: no file for split {lacking[0]!r}; give {wanted[lacking[0]]['csv']} too")
    return found


def _sha256(file: epath.Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except (FileNotFoundError, IsADirectoryError):
        raise PartError(f"--csv {file}: no such file; correct the path") from None
    return digest.hexdigest()


def _rows(file: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Yield (row, id) of a CSV, or of conversations."""
    rows: Iterator[Any] = conversations.iter_talks(file) if kind == schema.INSTRUCT else rows_lib.iter_rows(file, kind)
    return ((row.number, row.media_id) for row in rows)


class Joined:
    """Counts of one split over all parts, made while its rejects are written."""

    def __init__(self, parts: list[Part], split: str):
        """Find the part of each row. Raises PartError and OSError as `owners` does."""
        self._parts, self._split = parts, split
        self._written, self._rejected = owners(parts, split)
        self._reasons = Counter[str]()
        self.missing = 0  # rows in no part
        self.lost: list[str] = []  # files of the first of them

    def rejects(self, csv: Path) -> Iterator[dict[str, Any]]:
        """Yield the lines of rejects.jsonl: those of the parts, then the rows that no part has.

        Raises:
          PartError: the CSV has another number of rows than the parts say.
        """
        for line in itertools.chain(self._of_parts(), self._of_none(csv)):
            self._reasons[line["reason"]] += 1
            yield line

    def _of_parts(self) -> Iterator[dict[str, Any]]:
        for number, part in enumerate(self._parts):
            for line in rejects_of(part) if self._split in part.splits else ():
                if line["split"] == self._split and self._rejected[line["row"]] == number:
                    yield {**line, "part": part.name}

    def _of_none(self, csv: Path) -> Iterator[dict[str, Any]]:
        nobody = (self._written < 0) & (self._rejected < 0)
        rows = 0
        for row, name in bar(
            _rows(csv, self._parts[0].manifest["kind"]), f"join {self._split}", "row", total=len(nobody)
        ):
            rows += 1
            if row < len(nobody) and nobody[row]:
                self.missing += 1
                if len(self.lost) < EXAMPLES and name not in self.lost:
                    self.lost.append(name)
                yield {"row": row, "id": name, "reason": "missing_file", "detail": MISSING, "split": self._split}
        if rows != len(nobody):
            raise PartError(
                f"--csv {csv}: {rows:,} rows, but the parts were built from {len(nobody):,}; build the parts again"
            )

    def entry(self) -> dict[str, Any]:
        """Return the split's entry in the manifest of the whole."""
        entries = {part.name: part.splits[self._split] for part in self._parts if self._split in part.splits}
        first = next(iter(entries.values()))
        facts = {key: first[key] for key in SPLIT_FACTS if key in first}
        written = sum(entry["written"] for entry in entries.values())
        return {
            **facts,
            "rows": len(self._written),
            "written": written,
            "rejected": len(self._written) - written,
            "missing": self.missing,
            **{key: sum(entry.get(key, 0) for entry in entries.values()) for key in ("duplicated_ids", "bytes")},
            "rejects": dict(self._reasons),
            "parts": {
                name: {"written": entry["written"], "shards": len(entry["shards"])} for name, entry in entries.items()
            },
        }


def join(out: epath.Path, csvs: list[epath.Path], names: list[str] | None = None) -> dict[str, Any]:
    """Join the parts in OUT and return the manifest of the whole.

    Args:
      out: folder of the parts.
      csvs: the CSV of each split.
      names: parts to join; None: all.

    Raises:
      PartError: the parts do not fit together, or are incomplete.
      OSError: a file cannot be read or written.
    """
    parts = find_parts(out, names)
    _check_target(out)
    by_split = csvs_of(parts, csvs)
    for part in parts:
        check_files(part)
    joined = {split: Joined(parts, split) for split in sorted(by_split, key=ORDER.index)}
    with tempfile.TemporaryDirectory(prefix="ymplug_jax-join-") as folder:
        lines = Path(folder) / schema.REJECTS
        with lines.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for split, one in joined.items():
                csv = _local(by_split[split], Path(folder) / f"{split}.csv")
                file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in one.rejects(csv))
        places.upload(lines, out / schema.REJECTS)
    for part in parts:
        now = read_part(part.folder)
        if now is None or now.sha256 != part.sha256:
            raise PartError(
                f"{part.folder}: was built again while the parts were joined; run this command again when it is finished"
            )
    manifest = _manifest(parts, {split: one.entry() for split, one in joined.items()})
    places.write_text(out / schema.MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    for split, one in joined.items():
        if one.missing:
            print(
                f"{split}: {one.missing:,} rows are in no part: {', '.join(one.lost)}{', ...' if one.missing > len(one.lost) else ''}"
            )
    return manifest


def _check_target(out: epath.Path) -> None:
    """Raise PartError if OUT holds a data set of its own, whose manifest must not be replaced."""
    try:
        old = json.loads(places.read_bytes(out / schema.MANIFEST))
    except (FileNotFoundError, ValueError):
        return
    if not (isinstance(old, dict) and joined_set.is_joined(old)):
        raise PartError(f"--out {out}: holds a data set of its own beside the parts; move the parts to another folder")


def _local(csv: epath.Path, copy: Path) -> Path:
    if not places.is_remote(csv):
        return Path(csv)
    places.download(csv, copy)
    return copy


def _manifest(parts: list[Part], splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = parts[0].manifest
    counts = ("rows", "written", "rejected", "missing", "duplicated_ids", "bytes")
    return {
        **{key: first[key] for key in ("schema_version", "name", "kind", "classes") if key in first},
        **{key: sum(entry[key] for entry in splits.values()) for key in counts},
        "frames": first["frames"],
        "parts": [{"name": part.name, "manifest_sha256": part.sha256} for part in parts],
        "splits": splits,
    }


def _place(name: str) -> epath.Path:
    try:
        return places.place(name, "--out")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("join_parts", __doc__)
    parser.add_argument("--out", required=True, type=_place, help="folder of the parts: --out of build_shards --part")
    parser.add_argument(
        "--csv", required=True, type=_place, nargs="+", help="CSV of each split, as the parts were built from"
    )
    parser.add_argument("--parts", nargs="+", help="names of the parts to join; default: all in --out")
    args = parser.parse_args(argv)
    manifest = join(args.out, args.csv, args.parts)
    for split, entry in manifest["splits"].items():
        print(
            f"{args.out}: {split}: {entry['written']:,} of {entry['rows']:,} rows, parts {', '.join(entry['parts'])}, "
            f"{entry['bytes'] / 1e6:,.1f} MB, {sum(part['shards'] for part in entry['parts'].values())} shards"
        )
    if manifest["rejected"]:
        print(f"{manifest['rejected']:,} rows are in no part or were rejected; reasons in {args.out / schema.REJECTS}")


if __name__ == "__main__":
    sys.exit(main())
