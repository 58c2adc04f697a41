"""Publication of finished partitions as a data set: final shard names, metadata, rejects and, last, the manifest.

A plan is written first (`publish.json` in the work folder), and every step of it can be repeated. A build that is killed or runs out
of disk space during publication therefore resumes with `finish`, whatever was already moved.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.flags import bar, write_text
from data_prep.index_shards import BrokenShard, write_index
from ymplug_jax.data import schema
from ymplug_jax.data.video_file import JPEG_QUALITY, SHORT_SIDE

NAME = "youku_mplug"  # name of the TFDS data set
BUILDING = ".building"  # folder inside OUT for partitions that are not published yet
PLAN = "publish.json"


def publish(out: Path, work: Path, split: str, facts: dict, done: list[dict], old: dict, more: dict) -> dict:
    """Verify and index the partitions, write the plan and execute it.

    Args:
      out: folder of the data set.
      work: folder of the partitions.
      split: split to publish.
      facts: settings of the build.
      done: summary of each partition, as `builder.BuildPartition` writes it.
      old: previous manifest, or an empty dict.
      more: additional counts of this split.

    Returns:
      The new manifest.

    Raises:
      ValueError: a partition is damaged; running the command again rebuilds it.
      OSError: a file cannot be written; running the command again resumes.
    """
    kept = [i for i, part in enumerate(done) if part["written"]]
    shards, moves = [], []
    for number, i in enumerate(bar(kept, "verify and index", "shard", leave=False)):
        part = work / f"part-{i:05d}.tfrecord"
        try:
            count = write_index(part)
        except BrokenShard as error:
            (work / f"part-{i:05d}.json").unlink()
            raise ValueError(f"{error}; the same command rebuilds only this partition") from None
        if count != done[i]["written"]:
            raise ValueError(f"{part}: {count} records, expected {done[i]['written']}; delete {work} and build again")
        name = schema.shard_name(NAME, split, number, len(kept))
        shards.append({"file": name, "records": count, "bytes": part.stat().st_size})
        moves.append([part.name, name])
    rejects = [{**reject, "split": split} for part in done for reject in part["rejects"]]
    numbers = {
        "rows": sum(part["rows"] for part in done),
        "written": sum(part["written"] for part in done),
        "rejected": len(rejects),
        **more,
    }
    reasons = dict(Counter(reject["reason"] for reject in rejects))
    classes = {"classes": facts["classes"]} if "classes" in facts else {}
    facts = {key: value for key, value in facts.items() if key != "classes"}
    entry: dict[str, Any] = {
        **facts,
        **numbers,
        "bytes": sum(shard["bytes"] for shard in shards),
        "rejects": reasons,
        "shards": shards,
    }
    splits = {**old.get("splits", {}), split: entry}
    manifest = {
        "schema_version": schema.SCHEMA_VERSION,
        "name": NAME,
        "kind": facts["kind"],
        **classes,
        **{key: sum(part[key] for part in splits.values()) for key in (*numbers, "bytes")},
        "frames": {"per_clip": facts["num_frames"], "short_side": SHORT_SIDE, "jpeg_quality": JPEG_QUALITY},
        "splits": splits,
    }
    plan = {"split": split, "moves": moves, "rejects": rejects, "manifest": manifest}
    write_text(work / PLAN, json.dumps(plan, ensure_ascii=False))
    return finish(out, work)


def finish(out: Path, work: Path) -> dict:
    """Execute the plan in `work`, which may be partly done, and return the manifest. Raises OSError."""
    plan = json.loads((work / PLAN).read_text(encoding="utf-8"))
    split, manifest = plan["split"], plan["manifest"]
    (out / schema.MANIFEST).unlink(missing_ok=True)  # the data set is incomplete until the end
    wanted = {name for _, name in plan["moves"]}
    for old in out.glob(f"{NAME}-{split}.tfrecord-*"):
        if old.name.removesuffix(schema.INDEX_SUFFIX) not in wanted:
            old.unlink()
    for part, name in plan["moves"]:
        for suffix in (schema.INDEX_SUFFIX, ""):
            if (work / (part + suffix)).exists():  # else it is already moved
                (work / (part + suffix)).rename(out / (name + suffix))
    _write_rejects(out, split, plan["rejects"])
    _write_tfds(out, manifest)
    write_text(out / schema.MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(work)
    if not any((out / BUILDING).iterdir()):
        (out / BUILDING).rmdir()
    return manifest


def _write_rejects(out: Path, split: str, rejects: list[dict]) -> None:
    path = out / schema.REJECTS
    lines = (
        path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    )  # not splitlines: a title may contain U+2028
    kept = [reject for reject in map(json.loads, filter(None, lines)) if reject["split"] != split]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept + rejects))


def _write_tfds(out: Path, manifest: dict) -> None:
    """Write dataset_info.json and features.json, which make the folder a TFDS data set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds

    from data_prep.builder import features

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
        for name, entry in manifest["splits"].items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=features(manifest["kind"], manifest["frames"]["per_clip"]),
        split_infos=infos,
        version=schema.SCHEMA_VERSION,
        filename_template=template,
        check_data=False,
    )
