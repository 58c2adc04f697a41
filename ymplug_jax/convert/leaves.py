"""Parameters of a checkpoint on the disk, opened one by one, and whether their bytes are those that were written."""

import json
from pathlib import Path
from typing import Any

import tensorstore
from etils import epath

from ymplug_jax import checkpoint, checksums, exits

BLOCK = 256 * 2**20  # bytes that are read at a time


def opened(place: epath.Path) -> dict[str, tensorstore.TensorStore]:
    """Every parameter of an item folder, opened and not read.

    Raises:
      exits.Mistake: it is damaged.
    """
    leaves = {}
    try:
        driver = "zarr3" if json.loads((place / "_METADATA").read_text()).get("use_zarr3") else "zarr"
        for path in checkpoint.stored_in(place):
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

    Item folders of older versions have no checksums and are not compared.

    Raises:
      exits.Mistake: there is no checkpoint, or a parameter is damaged; the message names it.
    """
    if not folder.is_dir():
        raise exits.Mistake(
            f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a run or a conversion"
        )
    places = checkpoint.places(str(folder))
    if not places:
        raise exits.Mistake(
            f"{folder}: no checkpoint in it; give the folder of a run or of a conversion (--out of that)"
        )
    found = {}
    for place in places:
        leaves, sums = opened(place), checksums.read(place)
        if sums is not None:
            _compare(place, leaves, sums)
        found |= leaves
    return found


def _compare(place: epath.Path, leaves: dict[str, tensorstore.TensorStore], sums: dict[str, str]) -> None:
    if odd := sorted(leaves.keys() ^ sums.keys()):
        raise exits.Mistake(
            f"{checksums.file_of(place)}: does not belong to {place}, of which {odd[0]} is on one side only; copy both again"
        )
    for path, leaf in leaves.items():
        try:
            right = sum_of(leaf) == sums[path]
        except ValueError as error:  # a chunk that is shorter than it should be
            raise exits.Mistake(
                f"{place}: {path} cannot be read; convert or copy it again ({str(error)[:200]})"
            ) from None
        if not right:
            raise exits.Mistake(f"{place}: {path} is damaged, its checksum is wrong; convert or copy it again")


def sum_of(leaf: tensorstore.TensorStore) -> str:
    """`checksums.of` a stored array, read in blocks along its first axis."""
    if not leaf.shape:
        return checksums.of(leaf.read().result())
    size = leaf.dtype.numpy_dtype.itemsize * leaf.size
    rows = max(1, leaf.shape[0] * BLOCK // max(size, 1))
    crc = 0
    for i in range(0, leaf.shape[0], rows):
        crc = checksums.extended(crc, leaf[i : min(i + rows, leaf.shape[0])].read().result())
    return checksums.text(leaf.dtype.numpy_dtype, leaf.shape, crc)
