"""Opens the parameters of a stored checkpoint one by one and verifies their checksums."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore
from etils import epath

from ymplug_jax.core import checkpoint_files, exits, leaf_checksums, leaf_store
from ymplug_jax.core.verified_read import Damaged, stored_in

BLOCK = 256 * 2**20  # bytes read at a time
READERS = 4  # parameters verified in parallel


def opened(place: epath.Path) -> dict[str, tensorstore.TensorStore]:
    """Open every parameter of an Orbax item folder without reading its values.

    Raises:
      exits.Mistake: the folder is damaged.
    """
    leaves = {}
    try:
        for path in stored_in(place):
            leaves[path] = leaf_store.open_leaf(place, path)
    except (ValueError, AttributeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise exits.Mistake(f"{place}: its parameters cannot be opened ({reason}); convert or copy it again") from None
    return leaves


def verified(folder: Path) -> dict[str, tensorstore.TensorStore]:
    """Open every parameter of a run's newest step or of a conversion, and verify the checksums.

    Checkpoints of older versions have no checksums: they are opened unverified, and a log line says so.

    Raises:
      exits.Mistake: the folder has no checkpoint, or a parameter is damaged.
    """
    if not folder.is_dir():
        raise exits.Mistake(
            f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}; give the --workdir of a run or the --out of a conversion"
        )
    places = checkpoint_files.places(str(folder))
    if not places:
        raise exits.Mistake(f"{folder}: no checkpoint here; give the --workdir of a run or the --out of a conversion")
    found: dict[str, tensorstore.TensorStore] = {}
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
            f"{place}: parameters and checksums do not match ({odd[0]} is in one only); copy all of {place.parent} again"
        )
    with ThreadPoolExecutor(READERS) as pool:
        for path, seen in zip(leaves, pool.map(sum_of, leaves.values()), strict=True):
            if isinstance(seen, ValueError):
                raise exits.Mistake(f"{place}: {path} cannot be read ({str(seen)[:200]}); convert or copy it again")
            if seen != sums[path]:
                raise exits.Mistake(f"{place}: {path} is damaged, its checksum is wrong; convert or copy it again")


def sum_of(leaf: tensorstore.TensorStore) -> str | ValueError:
    """`leaf_checksums.of` a stored array, read in blocks along its first axis; the error if a chunk is too short."""
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
