"""Parameters of a checkpoint on the disk, opened one by one, and whether their bytes are those that were written."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from ymplug_jax.core import checkpoint_files, exits, leaf_checksums
from ymplug_jax.core.verified_read import Damaged, stored_in

BLOCK = 256 * 2**20  # bytes that are read at a time
READERS = 4  # parameters that are read and compared side by side


def opened(place: epath.Path) -> dict[str, tensorstore.TensorStore]:
    """Every parameter of an item folder, opened and not read.

    Raises:
      exits.Mistake: it is damaged.
    """
    leaves = {}
    try:
        driver = "zarr3" if json.loads((place / "_METADATA").read_text()).get("use_zarr3") else "zarr"
        for path in stored_in(place):
            name = path.replace("/", ".")
            base = str(place) if "://" in str(place) else f"file://{place}"
            if (place / "manifest.ocdbt").exists():
                kvstore: Any = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
            else:
                kvstore = f"{base}/{name}/"
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
            leaves[path] = tensorstore.open({"driver": driver, "kvstore": kvstore}, open=True, context=context).result()
    except (ValueError, AttributeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise exits.Mistake(
            f"{place}: damaged, its parameters cannot be opened; convert or copy it again ({reason})"
        ) from None
    return leaves


def verified(folder: Path) -> dict[str, tensorstore.TensorStore]:
    """Every parameter of a run's newest step or of a conversion, opened, after their bytes were compared with their checksums.

    What an older version saved without checksums is not compared; a line says so.

    Raises:
      exits.Mistake: there is no checkpoint, or a parameter is damaged; the message names it.
    """
    if not folder.is_dir():
        raise exits.Mistake(
            f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a run or a conversion"
        )
    places = checkpoint_files.places(str(folder))
    if not places:
        raise exits.Mistake(
            f"{folder}: no checkpoint in it; give the folder of a run or of a conversion (--out of that)"
        )
    found = {}
    step = checkpoint_files.step_folder(checkpoint_files.whole(str(folder)), checkpoint_files.latest_step(str(folder)))
    for place in places:
        leaves = opened(place)
        try:
            sums = checkpoint_files.sums_in(place, step)
        except Damaged as error:
            raise exits.Mistake(f"{step}: {error}; copy it again") from None
        if sums is None:
            checkpoint_files.say_unverified(place)
        else:
            _compare(place, leaves, sums)
        found |= leaves
    return found


def _compare(place: epath.Path, leaves: dict[str, tensorstore.TensorStore], sums: dict[str, str]) -> None:
    if odd := sorted(leaves.keys() ^ sums.keys()):
        raise exits.Mistake(
            f"{place}: does not belong to its checksums: {odd[0]} is on one side only; copy all of {place.parent} again"
        )
    with ThreadPoolExecutor(READERS) as pool:
        for path, seen in zip(leaves, pool.map(sum_of, leaves.values()), strict=True):
            if isinstance(seen, ValueError):
                raise exits.Mistake(f"{place}: {path} cannot be read; convert or copy it again ({str(seen)[:200]})")
            if seen != sums[path]:
                raise exits.Mistake(f"{place}: {path} is damaged, its checksum is wrong; convert or copy it again")


def sum_of(leaf: tensorstore.TensorStore) -> str | ValueError:
    """`leaf_sums.of` a stored array, read in blocks along its first axis; the error if a chunk is shorter than it should be."""
    dtype, shape = leaf.dtype.numpy_dtype, leaf.shape
    sums = np.zeros(2, np.uint32)
    try:
        if not shape:
            return leaf_checksums.text(dtype, shape, leaf_checksums.part(leaf.read().result()))
        rows = max(1, BLOCK * shape[0] // max(dtype.itemsize * leaf.size, 1))
        for i in range(0, shape[0], rows):
            block = leaf[i : min(i + rows, shape[0])].read().result()
            sums += leaf_checksums.part(block, (i, *(0,) * (len(shape) - 1)))
    except ValueError as error:
        return error
    return leaf_checksums.text(dtype, shape, sums)
