"""Publication of finished partitions as a data set: final shard names, metadata, rejects and, last, the manifest.

A plan is written first (`publish.json` in the work folder), and every step of it can be repeated. A build that is killed or runs out
of disk space during publication therefore resumes with `finish`, whatever was already moved. Meanwhile the manifest holds
`"publishing": SPLIT`, at which readers refuse the folder: in a bucket shards are moved one by one, and of a split that is built again
old and new shards could be mixed.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from etils import epath

from data_prep.flags import bar
from data_prep.part_files import GROUP, finished, group_name, part_name
from data_prep.scratch import Scratch
from ymplug_jax.core import places
from ymplug_jax.data import schema
from ymplug_jax.data.video_file import JPEG_QUALITY, SHORT_SIDE

NAME = "youku_mplug"  # name of the TFDS data set
BUILDING = ".building"  # folder inside OUT for partitions that are not published yet
PLAN = "publish.json"
THREADS = 32  # requests to a bucket at a time

Item = TypeVar("Item")


class Part(NamedTuple):
    """Facts of a finished partition."""

    number: int
    rows: int
    written: int
    bytes: int  # of its shard
    cut: int  # conversations that are longer than a row


class Done(NamedTuple):
    """Facts of all partitions of a build."""

    parts: list[Part]
    rejects: Counter[str]  # reason -> rows

    @property
    def written(self) -> int:
        """Number of records."""
        return sum(part.written for part in self.parts)

    @property
    def rejected(self) -> int:
        """Number of rejected rows."""
        return self.rejects.total()


def read_groups(work: epath.Path, partitions: int) -> Done:
    """Read the merged facts of all partitions.

    Raises:
      ValueError: a partition is missing among them, or its shard has another length; running the command again rebuilds it.
      OSError: a file cannot be read.
    """
    parts: list[Part] = []
    reasons: Counter[str] = Counter()
    groups = range(-(-partitions // GROUP))
    for found in _each(work, groups, lambda group: places.read_bytes(work / group_name(group, ".json"))):
        facts = json.loads(found)
        parts += (Part(*numbers) for numbers in facts["parts"])
        reasons.update(facts["rejects"])
    if [part.number for part in parts] != list(range(partitions)):
        raise ValueError(f"{work}: partitions are missing; delete the folder and build again")
    _, _, files = finished(work)
    for part in parts:
        name = part_name(part.number, ".tfrecord")
        if part.written and (found_bytes := files.get(name, 0)) != part.bytes:
            places.delete(work / part_name(part.number, ".json"))
            raise ValueError(
                f"{work / name}: {found_bytes:,} bytes, but {part.bytes:,} were written; the same command rebuilds only this partition"
            )
    return Done(parts, reasons)


def frames_of(num_frames: int) -> dict[str, int]:
    """Return what a manifest says of the stored frames."""
    return {"per_clip": num_frames, "short_side": SHORT_SIDE, "jpeg_quality": JPEG_QUALITY}


def publish(
    out: epath.Path, work: epath.Path, split: str, facts: dict, done: Done, old: dict, more: dict, files: dict[str, str]
) -> dict:
    """Write the plan and execute it.

    Args:
      out: folder of the data set.
      work: folder of the partitions, all of them checked and indexed by their workers.
      split: split to publish.
      facts: settings of the build.
      done: facts of the partitions.
      old: previous manifest, or an empty dict.
      more: additional counts of this split.
      files: further files of the work folder -> their names in the data set.

    Returns:
      The new manifest.

    Raises:
      OSError: a file cannot be written; running the command again resumes.
    """
    kept = [part for part in done.parts if part.written]
    shards, moves = [], []
    for number, part in enumerate(kept):
        name = schema.shard_name(NAME, split, number, len(kept))
        shards.append({"file": name, "records": part.written, "bytes": part.bytes})
        moves.append([part_name(part.number, ".tfrecord"), name])
    numbers = {
        "rows": sum(part.rows for part in done.parts),
        "written": done.written,
        "rejected": done.rejected,
        **more,
    }
    classes = {"classes": facts["classes"]} if "classes" in facts else {}
    facts = {key: value for key, value in facts.items() if key != "classes"}
    entry: dict[str, Any] = {
        **facts,
        **numbers,
        "bytes": sum(shard["bytes"] for shard in shards),
        "rejects": dict(done.rejects),
        "shards": shards,
    }
    splits = {**old.get("splits", {}), split: entry}
    manifest = {
        "schema_version": schema.SCHEMA_VERSION,
        "name": NAME,
        "kind": facts["kind"],
        **classes,
        **{key: sum(part[key] for part in splits.values()) for key in (*numbers, "bytes")},
        "frames": frames_of(facts["num_frames"]),
        "splits": splits,
    }
    plan = {
        "split": split,
        "moves": moves,
        "files": list(files.items()),
        "groups": -(-len(done.parts) // GROUP),
        "manifest": manifest,
    }
    places.write_text(work / PLAN, json.dumps(plan, ensure_ascii=False))
    return finish(out, work)


def finish(out: epath.Path, work: epath.Path) -> dict:
    """Execute the plan in `work`, which may be partly done, and return the manifest. Raises OSError, ValueError if the plan is damaged."""
    try:
        plan = json.loads(places.read_bytes(work / PLAN))
        _ = plan["split"], plan["moves"], plan["manifest"]["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{work / PLAN}: damaged ({error}); delete {work} and build again") from None
    split, manifest = plan["split"], plan["manifest"]
    others = {name: entry for name, entry in manifest["splits"].items() if name != split}
    refused = {**manifest, "splits": others, schema.PUBLISHING: split}
    places.write_text(out / schema.MANIFEST, json.dumps(refused, indent=2, ensure_ascii=False) + "\n")
    wanted = {name for _, name in plan["moves"]}
    stale = [
        name
        for name in places.sizes(out)
        if name.startswith(f"{NAME}-{split}.tfrecord-") and name.removesuffix(schema.INDEX_SUFFIX) not in wanted
    ]
    _each(out, stale, lambda name: places.delete(out / name))
    pairs = [(part + suffix, name + suffix) for part, name in plan["moves"] for suffix in (schema.INDEX_SUFFIX, "")]
    pairs += plan["files"]
    _each(
        out,
        bar(pairs, "publish", "file", leave=False),
        lambda pair: places.move(work / pair[0], out / pair[1]),
    )
    _write_rejects(out, work, split, plan["groups"])
    _write_tfds(out, manifest)
    places.write_text(out / schema.MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    remove_work(out, work)
    return manifest


def remove_work(out: epath.Path, work: epath.Path) -> None:
    """Delete the work folder of a split, the plan first: what is left after a kill is no publication to repeat. Raises OSError."""
    places.delete(work / PLAN)
    places.delete_folder(work)
    if not places.is_remote(out):
        with contextlib.suppress(OSError):  # another split is being built
            os.rmdir(out / BUILDING)


def _each(where: epath.Path, items: Iterable[Item], do: Callable[[Item], Any]) -> list[Any]:
    """Return what `do` gives for each item; requests to a bucket run side by side."""
    if not places.is_remote(where):
        return [do(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(do, items))


def _write_rejects(out: epath.Path, work: epath.Path, split: str, groups: int) -> None:
    """Write rejects.jsonl: the lines of other splits, then those of this one. Copies them as a stream: there may be millions."""
    with Scratch() as scratch:
        new = scratch.path / "new"
        with new.open("wb") as target:
            if schema.REJECTS in places.sizes(out):
                with _local(out / schema.REJECTS, scratch.path).open("rb") as lines:
                    for line in lines:  # of bytes: a title may contain U+2028, at which text would be divided
                        if line.strip() and json.loads(line)["split"] != split:
                            target.write(line.rstrip(b"\n") + b"\n")
            for group in range(groups):
                with _local(work / group_name(group, ".rejects.jsonl"), scratch.path).open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
        places.upload(new, out / schema.REJECTS)


def _local(path: epath.Path, folder: Path) -> Path:
    """Return a local file with the content of `path`."""
    if not places.is_remote(path):
        return Path(path)
    places.download(path, folder / "copy")
    return folder / "copy"


def _write_tfds(out: epath.Path, manifest: dict) -> None:
    """Write dataset_info.json and features.json, which make the folder a TFDS data set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds

    from data_prep.builder import features

    with tempfile.TemporaryDirectory() as folder:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder,
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
            for name, entry in manifest["splits"].items()
        ]
        # TFDS reads the names of the data set and of its format from the name of a shard.
        names = [shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"][:1]]
        for name in names:
            (Path(folder) / name).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features(manifest["kind"], manifest["frames"]["per_clip"]),
            split_infos=infos,
            version=schema.SCHEMA_VERSION,
            filename_template=template,
            check_data=False,
        )
        for file in sorted(Path(folder).glob("*.json")):
            places.write_bytes(out / file.name, file.read_bytes())
