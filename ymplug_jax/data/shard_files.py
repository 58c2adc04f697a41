"""Finds the shards of a split and reads their indices, in a data set of its own or in one joined from parts."""

import io
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ymplug_jax.data import joined_set, schema

SHARD = re.compile(r"([^/]+)-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")


class Folder(Protocol):
    """The folder of a data set, on a disk or in a bucket."""

    def names_below(self, parts: list[str]) -> list[set[str]]:
        """Return the names in each of several folders in it; a folder that does not exist has none."""
        ...

    def read_all(self, names: list[str]) -> list[bytes]:
        """Return the content of each file, or of PART/FILE. Raises FileNotFoundError."""
        ...


def shards_of(path: str, split: str, names: set[str]) -> list[str]:
    """Return the file names of the shards of a split, in order. Raises if shards are missing or of several builds."""
    found: dict[str, dict[tuple[str, int], set[int]]] = {}  # split -> (prefix, count) -> shards
    for name in names:
        if match := SHARD.fullmatch(name):
            found.setdefault(match[2], {}).setdefault((match[1], int(match[4])), set()).add(int(match[3]))
    if split not in found:
        known = f"it has {', '.join(sorted(found))}" if found else "it has no shards"
        raise FileNotFoundError(
            f"{path}: no split {split!r} here, {known}; build it, or set config.data.train_split or config.data.eval_split "
            "to another one (an empty eval_split turns evaluation off)"
        )
    if len(found[split]) > 1:
        builds = ", ".join(f"{prefix}-{split} of {count} shards" for prefix, count in sorted(found[split]))
        raise ValueError(
            f"{path}: split {split!r} holds several builds ({builds}); keep only one of them in this folder"
        )
    (prefix, count), numbers = next(iter(found[split].items()))
    if missing := sorted(set(range(count)) - numbers):
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {count} shards of split {split!r} are missing, the first is "
            f"{schema.shard_name(prefix, split, missing[0], count)}; copy them again or build the shards again"
        )
    return [schema.shard_name(prefix, split, shard, count) for shard in range(count)]


def shards_of_parts(path: str, manifest: Mapping[str, Any], split: str, folder: Folder) -> tuple[list[str], set[str]]:
    """Return the shards of a split of a joined set, as PART/FILE, and the names of all files of its parts."""
    parts = joined_set.parts_of(manifest, split, f"{path}/{schema.MANIFEST}")
    below = folder.names_below([part.name for part in parts])
    there = [part for part, names in zip(parts, below, strict=True) if schema.MANIFEST in names]
    contents = dict(zip(there, folder.read_all([f"{part.name}/{schema.MANIFEST}" for part in there]), strict=True))
    joined_set.check_parts(path, parts, [contents.get(part) for part in parts])
    shards, files = [], set()
    for part, names in zip(parts, below, strict=True):
        shards += [f"{part.name}/{name}" for name in shards_of(f"{path}/{part.name}", split, names)]
        files |= {f"{part.name}/{name}" for name in names}
    return shards, files


def indices_of(path: str, shards: list[str], names: set[str], folder: Folder) -> list[np.ndarray]:
    """Read the index of each shard, int64[n, 2]. Raises if one is missing or damaged."""
    files = [shard + schema.INDEX_SUFFIX for shard in shards]
    fix = f"python -m data_prep.index_shards {path}"
    if missing := [file for file in files if file not in names]:
        raise FileNotFoundError(f"{path}/{missing[0]} is missing (one of {len(missing)}); write it with {fix}")
    indices = []
    for file, data in zip(files, folder.read_all(files), strict=True):
        try:
            index = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}/{file} is damaged ({error}); write it again with {fix}") from None
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2:
            raise ValueError(f"{path}/{file} is not an index (int64[n, 2]); write it again with {fix}")
        indices.append(index)
    return indices
