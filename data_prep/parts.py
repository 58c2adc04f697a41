"""Parts of a data set: folders OUT/NAME, each a data set of its own, and what must agree among them."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ymplug_jax.core import place_requests, places
from ymplug_jax.data import joined_set, schema

PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
BUILDING = ".building"  # folder of a part that is being built, see `publish`
# What all parts must have in common: key of the manifest, or of a split's entry -> what it is called.
SHARED = {
    "schema_version": "version of the shards",
    "kind": "--config",
    "frames": "--num_frames",
    "classes": "--classes",
}
SHARED_BY_SPLIT = {
    "csv_sha256": "CSV", "csv_rows": "CSV", "tokenizer_sha256": "--tokenizer", "max_tokens": "--max_tokens", "slots": "--slots",
}  # fmt: skip


class PartError(ValueError):
    """Parts that cannot be joined. The message names the part and the fix."""


class Part(NamedTuple):
    """A part that is complete."""

    folder: epath.Path
    manifest: dict[str, Any]
    sha256: str  # of the file of the manifest

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Entry of each split."""
        splits: dict[str, dict[str, Any]] = self.manifest["splits"]
        return splits


def rows_name(split: str) -> str:
    """Return the name of the file with the rows of the CSV that a part has, uint32[n], ascending."""
    return f"rows-{split}.npy"


def read_part(folder: epath.Path) -> Part | None:
    """Read the manifest of a part; None if there is none or the part is being published.

    Raises:
      PartError: the manifest is damaged, or is not that of a part.
      OSError: it cannot be read.
    """
    file = folder / schema.MANIFEST
    try:
        content = places.read_bytes(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(content)
        _ = manifest["kind"], manifest["frames"], [entry["shards"] for entry in manifest["splits"].values()]
        entries = manifest["splits"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartError(f"{file}: damaged ({error!r}); build the part again with --overwrite") from None
    if manifest.get(schema.PUBLISHING):
        return None
    if not all("rows_sha256" in entry for entry in entries):
        raise PartError(
            f"{folder}: built without --part, so its rows are not recorded; move it out of the folder of the parts"
        )
    return Part(folder, manifest, hashlib.sha256(content).hexdigest())


def folders_in(out: epath.Path) -> list[epath.Path]:
    """Return the folders in OUT that may hold parts, by name, in one listing. Raises OSError."""
    try:
        if places.is_remote(out):
            url = os.fspath(out)
            found = place_requests.asked(out, "listed", lambda files: files.ls(url, detail=True, refresh=True))
            names = [str(one["name"]).rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory"]
        else:
            with os.scandir(out) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    return [out / name for name in sorted(names) if PART_NAME.fullmatch(name)]


def misfit(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return in what two manifests differ that parts must share, e.g. "--num_frames"; "" if they fit together."""
    for key, what in SHARED.items():
        if first.get(key) != second.get(key):
            return f"{what} ({_short(first.get(key))} and {_short(second.get(key))})"
    for split in sorted(first["splits"].keys() & second["splits"].keys()):
        one, other = first["splits"][split], second["splits"][split]
        for key, what in SHARED_BY_SPLIT.items():
            if key in one and key in other and one[key] != other[key]:
                names = {entry.get("csv") for entry in (one, other)}
                of = f", {' and '.join(map(str, sorted(names)))}" if what == "CSV" else ""
                return f"{what} of split {split!r} ({_short(one[key])} and {_short(other[key])}{of})"
    return ""


def _short(value: object) -> str:
    text = str(value.get("per_clip") if isinstance(value, dict) else value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def rows_of(part: Part, split: str) -> np.ndarray:
    """Return the rows of the CSV that a part has, written or rejected, uint32[n], ascending.

    Raises:
      PartError: the file is missing, damaged or that of another build.
      OSError: it cannot be read.
    """
    file = part.folder / rows_name(split)
    fix = "copy the part again or build it again with --overwrite"
    try:
        rows = np.lib.format.read_array(io.BytesIO(places.read_bytes(file)), allow_pickle=False)
    except FileNotFoundError:
        raise PartError(f"{file}: missing; {fix}") from None
    except (ValueError, EOFError) as error:
        raise PartError(f"{file}: damaged ({error}); {fix}") from None
    entry = part.splits[split]
    if hashlib.sha256(rows.tobytes()).hexdigest() != entry["rows_sha256"] or len(rows) != entry["rows"]:
        raise PartError(f"{file}: not the rows of this part's manifest; {fix}")
    return np.asarray(rows, np.uint32)


def rejects_of(part: Part) -> Iterator[dict[str, Any]]:
    """Yield the lines of a part's rejects, one after the other.

    Raises:
      PartError: they are missing or damaged.
      OSError: they cannot be read.
    """
    file = part.folder / schema.REJECTS
    try:
        with file.open("rb") as lines:  # not text: a title may hold U+2028
            for number, line in enumerate(lines, 1):
                try:
                    reject = json.loads(line)
                    _ = reject["split"], reject["row"], reject["reason"]
                    yield reject
                except (ValueError, KeyError, TypeError):
                    raise PartError(f"{file}, line {number}: damaged; copy the part again or build it again") from None
    except FileNotFoundError:
        if any(entry["rejected"] for entry in part.splits.values()):
            raise PartError(f"{file}: missing; copy the part again or build it again") from None


def check_files(part: Part) -> None:
    """Check that all shards of a part and their indices are there, by one listing.

    Raises:
      PartError: one is missing or has another size than the manifest says.
      OSError: the folder cannot be listed.
    """
    there = places.sizes(part.folder)
    for entry in part.splits.values():
        for shard in entry["shards"]:
            size, index = there.get(shard["file"]), f"{shard['file']}{schema.INDEX_SUFFIX}"
            if size != shard["bytes"]:
                what = "missing" if size is None else f"has {size:,} bytes, not {shard['bytes']:,}"
                raise PartError(
                    f"{part.folder / shard['file']}: {what}; copy the part again, or build it again with --overwrite"
                )
            if not there.get(index):
                raise PartError(
                    f"{part.folder / index}: missing; write it with python -m data_prep.index_shards {part.folder}"
                )


def check_folder(whole: epath.Path, name: str | None, manifest: Mapping[str, Any]) -> None:
    """Check that parts, joined sets and data sets of their own are not built into one another.

    Args:
      whole: --out.
      name: --part.
      manifest: of the folder to build into; empty if there is none.

    Raises:
      PartError: they would be.
      OSError: a manifest cannot be read.
    """
    recorded = any("rows_sha256" in entry for entry in manifest.get("splits", {}).values())
    if name is None:
        if joined_set.is_joined(manifest):
            raise PartError(f"--out {whole}: a data set of parts; give --part NAME too, or choose another --out")
        if recorded:
            raise PartError(
                f"--out {whole}: a part; give --part {whole.name} --out {whole.parent}, or choose another --out"
            )
        return
    if manifest and not recorded:
        raise PartError(f"--part {name}: {whole / name} was built without --part; choose another name")
    try:
        old = json.loads(places.read_bytes(whole / schema.MANIFEST))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return
    if isinstance(old, dict) and not joined_set.is_joined(old):
        raise PartError(f"--out {whole}: holds a data set of its own; choose another folder for the parts")


def taken_rows(out: epath.Path, name: str, split: str, manifest: Mapping[str, Any]) -> np.ndarray:
    """Return which rows of a split the parts beside a part have as records, and check that it fits to them.

    Args:
      out: folder of the parts.
      name: name of the part that is about to be built.
      split: split to build.
      manifest: what is known of its manifest.

    Returns:
      bool[n]: whether another part has row i. n is at most the number of rows; further rows are in no part.

    Raises:
      PartError: the part would have other settings than one beside it, or that one is damaged.
      OSError: a part cannot be read.
    """
    taken = np.zeros(0, bool)
    for folder in folders_in(out):
        if folder.name == name or (other := read_part(folder)) is None:
            continue
        if what := misfit(other.manifest, manifest):
            raise PartError(
                f"--part {name}: differs from part {folder} in {what}; give the same, or choose another --out"
            )
        if split in other.splits:
            rows = written_rows(other, split)
            taken = np.pad(taken, (0, max(0, int(rows[-1]) + 1 - len(taken)) if len(rows) else 0))
            taken[rows] = True
    return taken


def written_rows(part: Part, split: str) -> np.ndarray:
    """Return the rows of a part that are records, uint32[n], ascending. Raises PartError, OSError."""
    rejected = [reject["row"] for reject in rejects_of(part) if reject["split"] == split]
    return np.setdiff1d(rows_of(part, split), np.array(rejected, np.uint32), assume_unique=True)
