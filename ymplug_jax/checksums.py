"""Checksums of saved parameters: what they are, and the file beside an item folder of a checkpoint that holds them.

Zarr stores chunks without checksums, so that a damaged byte would be read as another weight. Beside `checkpoints/frozen/` stands
`checkpoints/frozen.checksums.json`: {"path of a parameter": "float32[8,16]:crc32c of its bytes, row by row"}. Orbax passes over the file.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import google_crc32c
import numpy as np
from etils import epath

from ymplug_jax import exits

SUFFIX = ".checksums.json"
BLOCK = 64 * 2**20  # bytes that are copied at a time where an array is not contiguous


def of(array: np.ndarray) -> str:
    """Content hash of the dtype, the shape and the bytes in row-major order, e.g. "float32[8,16]:0a1b2c3d".

    An array that is not contiguous is copied in blocks, never as a whole.
    """
    return text(array.dtype, array.shape, extended(0, array))


def extended(crc: int, part: np.ndarray) -> int:
    """CRC-32C of what `crc` covers (0: nothing), followed by the bytes of `part` in row-major order.

    So the slices of an array along its first axis, one after the other, give the value of the whole array.
    """
    if part.flags.c_contiguous:
        return google_crc32c.extend(crc, part.reshape(-1).view(np.uint8))
    if part.shape[0] == 1:
        return extended(crc, part[0])
    rows = max(1, BLOCK * part.shape[0] // part.nbytes)
    for i in range(0, part.shape[0], rows):
        block = part[i : i + rows]
        crc = extended(crc, np.ascontiguousarray(block) if block.nbytes <= BLOCK else block)
    return crc


def text(dtype: np.dtype, shape: Iterable[int], crc: int) -> str:
    """The checksum as `of` writes it, for an array of which the CRC-32C is known."""
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]:{crc:08x}"


def file_of(folder: epath.Path) -> epath.Path:
    """Where the checksums of an item folder stand: beside it."""
    return folder.with_name(folder.name + SUFFIX)


def write(folder: epath.Path, sums: Mapping[str, str]) -> None:
    """Write the checksums of an item folder (path of a leaf -> `of` its value). The file appears as a whole or not at all.

    Raises:
      FileNotFoundError: there is no such folder; write the checksums when the item is whole.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: not there, so its checksums cannot be written")
    content = json.dumps(dict(sorted(sums.items())), indent=0) + "\n"
    file = file_of(folder)
    if "://" in str(file):  # an object of a bucket is written as a whole
        file.write_text(content, encoding="utf-8")
        return
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(file)


def read(folder: epath.Path) -> dict[str, str] | None:
    """The checksums of an item folder; None if it has none, as those of older versions.

    Raises:
      exits.Mistake: the file is damaged.
    """
    file = file_of(folder)
    if not file.exists():
        return None
    try:
        sums = json.loads(file.read_bytes())
    except ValueError:
        sums = None
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise exits.Mistake(f"{file}: damaged, it should be JSON of checksums; copy it again with the checkpoint")
    return sums


def fingerprint(folders: Iterable[epath.Path]) -> str | None:
    """SHA-256 over the checksums of all item folders of a checkpoint: equal for equal parameters, in whatever folders they stand.

    None if one of the folders has no checksums.

    Raises:
      exits.Mistake: a file of checksums is damaged.
    """
    lines: list[str] = []
    for folder in folders:
        if (sums := read(folder)) is None:
            return None
        lines += [f"{path} {value}\n" for path, value in sums.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
