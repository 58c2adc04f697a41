"""The tensors of one PyTorch file, without running anything that it may carry.

Only names, shapes and places are read when a file is opened. What `torch.save` wrote is opened with `weights_only=True`, TorchScript
archives by `torch_script`, safetensors through their header. A file that can only be read by unpickling arbitrary objects is refused.
Files older than PyTorch 1.6 have no directory and stand in memory as a whole.
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

NESTS = ("model", "module", "state_dict")  # where training programs keep the tensors
FLOATS = ("float32", "float16", "bfloat16")
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
torch.serialization.add_safe_globals([argparse.Namespace])  # the settings of a run, which some programs store beside


class Stored(NamedTuple):
    """Where a tensor is: `shape` and `strides` (in elements) at a byte offset of a file, or an array in memory."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # None: row by row
    crc: int = 0  # of exactly these bytes; 0: unknown
    array: np.ndarray | None = None


def open_file(file: Path) -> tuple[Mapping[str, Stored], pieces.Facts]:
    """The tensors of one file and what it says of itself; by its content, whatever its suffix.

    Raises:
      SourceError: broken, unsafe, or no state dict.
    """
    with file.open("rb") as stream:
        head = stream.read(9)
    by_header = (
        head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000
    )  # the most that safetensors allows
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
                raise SourceError(f"{file}: a zip archive that torch.save did not write; unpack it")
            if "constants.pkl" in members:
                found = torch_script.tensors(file, archive)
                scripted = {name: _with_crc(Stored(file, *rest), archive, crc) for name, (*rest, crc) in found.items()}
                return scripted, pieces.Facts()
            return _zipped(file, archive)
    except torch_script.Unsafe as error:
        raise SourceError(_unsafe(file, str(error))) from None
    except SourceError:
        raise
    except _BROKEN as error:
        raise SourceError(f"{file}: no file of torch.save, or broken or cut off ({type(error).__name__})") from None


# What the readers of archives and pickles raise on bytes that their writers did not write.
_BROKEN = (RuntimeError, EOFError, ValueError, LookupError, OSError, TypeError, AttributeError, AssertionError)
_BROKEN += (zipfile.BadZipFile, struct.error, OverflowError, MemoryError, pickle.UnpicklingError, zlib.error)


def _loaded(file: Path) -> Any:
    """What `torch.load` finds in a file, of tensors and plain values only. Its own messages advise to let the file run: none is passed on.

    Raises:
      SourceError: broken, or it holds more.
    """
    try:
        # As a stream: torch goes by the suffix where it is given a name.
        with file.open("rb") as stream, warnings.catch_warnings(action="ignore"):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"(?:GLOBAL|[Uu]nsupported class|unsafe class) ([\w.]+)", str(error)):
            raise SourceError(_unsafe(file, f"it asks for {asked[1]}")) from None
        raise SourceError(f"{file}: no file of torch.save, or broken or cut off (its pickle cannot be read)") from None
    except _BROKEN as error:
        raise SourceError(f"{file}: no file of torch.save, or broken or cut off ({type(error).__name__})") from None


def _unsafe(file: Path, reason: str) -> str:
    return (
        f"{file}: holds more than tensors ({reason}) and would have to be unpickled, which can run any program; save its state dict "
        "alone, or as safetensors, where it was made"
    )


def _safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(str(file), framework="np"):  # checks the header against the size of the file
            pass
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"{file}: no file of safetensors, or broken or cut off ({reason})") from None
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
    """What `torch.save` wrote: fake tensors know their storage's offset, and no byte of it is read."""
    with FakeTensorMode():
        loaded = _loaded(file)
    by_offset = {torch_script.data_offset(file, info): info for info in archive.infolist()}
    found = {}
    for name, tensor in _unnested(loaded, file).items():
        storage = tensor.untyped_storage()
        stored = Stored(
            file,
            storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize,
            _dtype(tensor),
            tuple(tensor.shape),
            None if tensor.is_contiguous() else tuple(tensor.stride()),
        )
        info = by_offset.get(storage._checkpoint_offset)
        found[name] = _with_crc(stored, archive, info.filename if info else "")
    return found, pieces.facts_of(loaded)


def _with_crc(stored: Stored, archive: zipfile.ZipFile, member: str) -> Stored:
    """The archive's checksum, where the tensor is all of its member."""
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
        raise SourceError(f"{file}: holds a {type(loaded).__name__}, no state dict")
    tensors = dict(_flat(loaded))
    if not tensors:
        raise SourceError(
            f"{file}: holds no tensors; its keys are {', '.join(str(key)[:40] for key in list(loaded)[:5])}"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dicts, as Megatron stores them; what else a training program keeps is passed over."""
    for name, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and name != "optimizer":
            yield from _flat(value, f"{prefix}{name}.")


def read(name: str, stored: Stored) -> np.ndarray:
    """The values of one tensor; bfloat16 as ml_dtypes.bfloat16.

    Raises:
      SourceError: values that are not finite, or bytes that are not those that were written.
      exits.PlaceFailed: the disk fails.
    """
    if stored.array is not None:
        value = stored.array
    else:
        if min((stored.offset, *stored.shape, *(stored.strides or ())), default=0) < 0:
            raise SourceError(f"{stored.file}: broken: {name} has a negative size or place")
        count = math.prod(stored.shape)
        if stored.strides is not None:
            count = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True)) if count else 0
        dtype = np.dtype(stored.dtype)
        if stored.offset + count * dtype.itemsize > stored.file.stat().st_size:
            raise SourceError(f"{stored.file}: broken or cut off: {name} ends behind the end of the file")
        try:
            flat = np.fromfile(stored.file, dtype, count, offset=stored.offset)
        except OSError as error:
            raise exits.PlaceFailed(
                f"{stored.file}: cannot be read: {error.strerror}; the same command goes on"
            ) from None
        if flat.size != count:
            raise SourceError(
                f"{stored.file}: cut off while it was read: {name} ends after {flat.size} of {count} values"
            )
        if stored.crc and zlib.crc32(flat.view(np.uint8).data) != stored.crc:
            raise SourceError(f"{stored.file}: broken: the checksum of {name} is wrong; fetch the file again")
        if stored.strides is None:
            value = flat.reshape(stored.shape)
        else:
            steps = [step * flat.itemsize for step in stored.strides]
            value = np.lib.stride_tricks.as_strided(flat, stored.shape, steps, writeable=False)
    if not _finite(value):
        raise SourceError(f"{stored.file}: {name} holds values that are no finite numbers; the file is damaged")
    return value


def _finite(value: np.ndarray, block: int = 1 << 18) -> bool:
    """Whether no value is infinite or not a number: without its sign, its bits are below those of infinity."""
    bits, infinity = {
        "float32": (np.uint32, 0x7F800000),
        "float16": (np.uint16, 0x7C00),
        "bfloat16": (np.uint16, 0x7F80),
    }[value.dtype.name]
    flat, magnitude = value.reshape(-1).view(bits), bits(np.iinfo(bits).max >> 1)
    return all((flat[i : i + block] & magnitude).max() < infinity for i in range(0, flat.size, block))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
