"""Reads the tensors of one PyTorch file without running code that the file may contain.

Opening a file reads only the names, shapes and offsets of its tensors. Files of `torch.save` are opened with `weights_only=True`,
TorchScript archives by `torch_script`, and safetensors through their header. A file that needs arbitrary objects to be unpickled
is refused. Files older than PyTorch 1.6 have no directory and are loaded into memory as a whole.
"""

import argparse
import json
import math
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from ymplug_jax.convert import pieces, torch_script
from ymplug_jax.convert.source_files import SourceError
from ymplug_jax.core import exits

NESTS = ("model", "module", "state_dict")  # keys under which training programs store the tensors
FLOATS = ("float32", "float16", "bfloat16")
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
torch.serialization.add_safe_globals([argparse.Namespace])  # Megatron stores its settings beside the tensors


class Stored(NamedTuple):
    """Location of a tensor: `shape` and `strides` (in elements) at a byte offset of a file, or an array in memory."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # None: C-contiguous
    crc: int = 0  # CRC-32 of the tensor's bytes; 0: unknown
    array: np.ndarray | None = None


def open_file(file: Path) -> tuple[Mapping[str, Stored], pieces.Facts]:
    """Locate the tensors of one file. The format is detected from the content, not from the suffix.

    Returns:
      Tensor name -> location, and the ranks and sizes that the file states.

    Raises:
      SourceError: the file is damaged, unsafe or not a state dict.
    """
    with file.open("rb") as stream:
        head = stream.read(9)
    by_header = (
        head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000
    )  # the largest header that safetensors allows
    if by_header or (file.suffix == ".safetensors" and not head.startswith(b"PK")):
        return _safetensors(file), pieces.Facts()
    if not zipfile.is_zipfile(file):
        loaded = _loaded(file)
        found = {
            name: Stored(file, 0, _dtype(tensor), tuple(tensor.shape), None, array=_numpy(tensor))
            for name, tensor in _unnested(loaded, file).items()
        }
        return found, pieces.facts_of(loaded)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in members:
                raise SourceError(
                    f"{file}: a zip archive that torch.save did not write; unpack it and give the file inside"
                )
            if "constants.pkl" in members:
                return {
                    name: _with_crc(Stored(file, offset, dtype, shape, strides), archive, member)
                    for name, (offset, dtype, shape, strides, member) in torch_script.tensors(file, archive).items()
                }, pieces.Facts()
            return _zipped(file, archive)
    except torch_script.Unsafe as error:
        raise SourceError(_unsafe(file, str(error))) from None
    except SourceError:
        raise
    except _BROKEN as error:
        raise SourceError(_broken(file, "torch.save", type(error).__name__)) from None


# Exceptions of the readers of archives and pickles for damaged files.
_BROKEN: tuple[type[Exception], ...] = (
    RuntimeError, EOFError, ValueError, LookupError, OSError, TypeError, AttributeError, AssertionError,
    zipfile.BadZipFile, struct.error, OverflowError, MemoryError, pickle.UnpicklingError, zlib.error,
)  # fmt: skip


def _loaded(file: Path) -> Any:
    """Load the tensors and plain values of a file with `torch.load`.

    The messages of `torch.load` are replaced, because they advise the user to run the code in the file.

    Raises:
      SourceError: the file is damaged or holds other objects.
    """
    try:
        # Given a name, torch.load chooses the format by the suffix.
        with file.open("rb") as stream, warnings.catch_warnings(action="ignore"):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"(?:GLOBAL|[Uu]nsupported class|unsafe class) ([\w.]+)", str(error)):
            raise SourceError(_unsafe(file, f"its pickle refers to {asked[1]}")) from None
        raise SourceError(_broken(file, "torch.save", "its pickle cannot be read")) from None
    except _BROKEN as error:
        raise SourceError(_broken(file, "torch.save", type(error).__name__)) from None


def _broken(file: Path, writer: str, reason: str) -> str:
    return f"{file}: not a file of {writer}, or damaged or truncated ({reason}); download it again"


def _unsafe(file: Path, reason: str) -> str:
    return (
        f"{file}: holds more than tensors ({reason}), and unpickling it could run any code; save only its state dict, or as "
        "safetensors, in the program that wrote it"
    )


def _safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(str(file), framework="np"):  # checks the header against the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise SourceError(_broken(file, "safetensors", str(error).splitlines()[0])) from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(
            file,
            8 + length + entry["data_offsets"][0],
            _SAFETENSORS.get(entry["dtype"], entry["dtype"]),
            tuple(entry["shape"]),
            None,
        )
        for name, entry in header.items()
    }


def _zipped(file: Path, archive: zipfile.ZipFile) -> tuple[dict[str, Stored], pieces.Facts]:
    """Tensors of a `torch.save` archive. Fake tensors give the offset of their storage without reading it."""
    with FakeTensorMode():
        loaded = _loaded(file)
    by_offset = {torch_script.data_offset(file, info): info for info in archive.infolist()}
    found = {}
    for name, tensor in _unnested(loaded, file).items():
        storage = tensor.untyped_storage()
        begin: int = storage._checkpoint_offset  # type: ignore[assignment]  # torch.load always sets it
        stored = Stored(
            file,
            begin + int(tensor.storage_offset()) * tensor.itemsize,
            _dtype(tensor),
            tuple(tensor.shape),
            None if tensor.is_contiguous() else tuple(tensor.stride()),
        )
        info = by_offset.get(begin)
        found[name] = _with_crc(stored, archive, info.filename if info else "")
    return found, pieces.facts_of(loaded)


def _with_crc(stored: Stored, archive: zipfile.ZipFile, member: str) -> Stored:
    """Add the archive's checksum, if the tensor fills its archive member."""
    if not member or stored.strides is not None or stored.dtype not in FLOATS:
        return stored
    info = archive.getinfo(member)
    size = int(np.prod(stored.shape)) * np.dtype(stored.dtype).itemsize
    return stored._replace(crc=info.CRC) if info.file_size == size else stored


def _unnested(loaded: Any, file: Path) -> dict[str, torch.Tensor]:
    for key in NESTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise SourceError(f"{file}: holds a {type(loaded).__name__}, not a state dict; give the model's state dict")
    tensors = dict(_flat(loaded))
    if not tensors:
        raise SourceError(
            f"{file}: holds no tensors (keys: {', '.join(str(key)[:40] for key in list(loaded)[:5])}); give the model's weights"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dicts, as Megatron stores them. Other values and the optimizer's state are skipped."""
    for name, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and name != "optimizer":
            yield from _flat(value, f"{prefix}{name}.")


def read(name: str, stored: Stored) -> np.ndarray:
    """Values of one tensor; bfloat16 as ml_dtypes.bfloat16.

    Raises:
      SourceError: a value is not finite, or the bytes are truncated or do not match their checksum.
      exits.PlaceFailed: the disk fails.
    """
    if stored.array is not None:
        value = stored.array
    else:
        if min((stored.offset, *stored.shape, *(stored.strides or ())), default=0) < 0:
            raise SourceError(f"{stored.file}: damaged, {name} has a negative size or offset; download it again")
        count = math.prod(stored.shape)
        if stored.strides is not None:
            count = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True)) if count else 0
        dtype = np.dtype(stored.dtype)
        if stored.offset + count * dtype.itemsize > stored.file.stat().st_size:
            raise SourceError(f"{stored.file}: damaged or truncated, {name} ends beyond the file; download it again")
        try:
            flat = np.fromfile(stored.file, dtype, count, offset=stored.offset)
        except OSError as error:
            raise exits.PlaceFailed(
                f"{stored.file}: cannot be read ({error.strerror}); repair the disk, then run the same command again to continue"
            ) from None
        if flat.size != count:
            raise SourceError(
                f"{stored.file}: truncated while it was read, {name} has {flat.size} of {count} values; download it again"
            )
        if stored.crc and zlib.crc32(flat.view(np.uint8).data) != stored.crc:
            raise SourceError(f"{stored.file}: damaged, {name} does not match its checksum; download it again")
        if stored.strides is None:
            value = flat.reshape(stored.shape)
        else:
            steps = [step * flat.itemsize for step in stored.strides]
            value = np.lib.stride_tricks.as_strided(flat, stored.shape, steps, writeable=False)
    if not _finite(value):
        raise SourceError(f"{stored.file}: {name} has values that are not finite; download it again")
    return value


def _finite(value: np.ndarray, block: int = 1 << 18) -> bool:
    """Whether all values are finite: without the sign, their bits are below those of infinity."""
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[value.dtype.name]
    bits = np.dtype(f"uint{8 * value.dtype.itemsize}")
    flat, magnitude = value.reshape(-1).view(bits), np.array(np.iinfo(bits).max >> 1, bits)
    return all((flat[i : i + block] & magnitude).max() < infinity for i in range(0, flat.size, block))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
