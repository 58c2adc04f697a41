"""Tensors of PyTorch files, one at a time and without running anything that a file may carry.

Only names, shapes and places are read when a file is opened; a tensor's bytes are read from the disk when it is asked for, so
that memory holds one tensor. What `torch.save` wrote is opened with `weights_only=True`, TorchScript archives by
`torch_script`, safetensors through their header, shards through their index. A file that can only be read by unpickling
arbitrary objects is refused. Files older than PyTorch 1.6 have no directory and stand in memory as a whole.
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from ymplug_jax.convert import torch_script

NESTS = ("model", "module", "state_dict")  # where training programs keep the tensors
FLOATS = ("float32", "float16", "bfloat16")
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
torch.serialization.add_safe_globals([argparse.Namespace])  # the settings of a run, which some programs store beside


class SourceError(ValueError):
    """A source that cannot be used; the message names the file and the fix."""


class Stored(NamedTuple):
    """Where a tensor is: `shape` and `strides` (in elements) at a byte offset of a file, or an array in memory."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # None: row by row
    crc: int = 0  # of exactly these bytes; 0: unknown
    array: np.ndarray | None = None


class Source:
    """The tensors of one or more files, by name."""

    def __init__(
        self,
        paths: list[Path],
        merge: Mapping[str, int] | None = None,
        rename: Sequence[tuple[str, str]] = (),
    ):
        """Open the files; nothing but names and shapes is read.

        Args:
          paths: files, or one `*.index.json` that names them.
          merge: regex of a name (full match) -> axis: files with the same names are tensor-parallel pieces, in the order
            given; a name that no regex matches is the same in all of them.
          rename: (regex, replacement) pairs that bring the spellings of other releases to one.

        Raises:
          SourceError: a file that is missing, broken, unsafe, or of no known kind.
        """
        self.files = [file for path in paths for file in _listed(path)]
        parts = [_open(file) for file in self.files]
        self._merge = dict(merge or {})
        self._changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._where: dict[str, list[Stored]] = {}
        for part in parts:
            for name, stored in part.items():
                for pattern, replacement in rename:
                    name = re.sub(pattern, replacement, name)
                self._where.setdefault(name, []).append(stored)
        twice = [name for name, where in self._where.items() if len(where) > 1]
        if twice and not all(len(self._where[name]) == len(self.files) for name in twice):
            raise SourceError(f"{twice[0]} stands in some of the files twice; give the pieces of one model only")

    def join(self, other: "Source") -> None:
        """Take the tensors of another source in."""
        self.files, self._where = [*self.files, *other.files], self._where | other._where

    def change(self, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        """Pass the tensors of these names through functions when they are read."""
        self._changes |= changes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, pieces put together."""
        return {name: self.shape(name) for name in self._where}

    def dtype(self, name: str) -> str:
        """Type of a tensor: "float32", "float16" or "bfloat16".

        Raises:
          SourceError: it is another.
        """
        stored = self._where[name][0]
        if stored.dtype not in FLOATS:
            raise SourceError(
                f"{stored.file}: {name} is {stored.dtype}; only {', '.join(FLOATS)} are converted, so save the model in one "
                "of them (a quantised model must be unpacked first)"
            )
        return stored.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        shapes = [stored.shape for stored in self._where[name]]
        axis = self._axis(name)
        if len(shapes) == 1 or axis is None:
            return shapes[0]
        whole = list(shapes[0])
        whole[axis] = sum(shape[axis] for shape in shapes)
        return tuple(whole)

    def _axis(self, name: str) -> int | None:
        return next((axis for pattern, axis in self._merge.items() if re.fullmatch(pattern, name)), None)

    def read(self, name: str) -> np.ndarray:
        """One tensor; bfloat16 as ml_dtypes.bfloat16.

        Raises:
          SourceError: another type than `dtype` knows, values that are not finite, or bytes that are not those that were written.
        """
        self.dtype(name)
        where, axis = self._where[name], self._axis(name)
        parts = [_read(name, stored) for stored in (where if axis is not None else where[:1])]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
        return self._changes[name](value) if name in self._changes else value

    def identity(self) -> list[tuple[str, int, int]]:
        """(path, bytes, time of the last change in ns) of each file: enough to know a conversion that was begun."""
        return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]

    def digests(self) -> dict[str, str]:
        """File name (with its folder's, where names repeat) -> SHA-256."""
        found, names = {}, [file.name for file in self.files]
        for file in self.files:
            name = file.name if names.count(file.name) == 1 else f"{file.parent.name}/{file.name}"
            with file.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found


def _listed(path: Path) -> list[Path]:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise SourceError(f"{path}: no index of shards; it should be JSON with a weight_map") from None
    files = [path.parent / name for name in names]
    if escaped := [name for name in names if Path(name).name != name]:
        raise SourceError(f"{path}: names a file outside its folder: {escaped[0]}")
    if missing := [file.name for file in files if not file.is_file()]:
        raise SourceError(f"{path}: {len(missing)} of its {len(files)} files are missing, the first is {missing[0]}")
    return files


def _open(file: Path) -> Mapping[str, Stored]:
    try:
        if file.suffix == ".safetensors":
            return _safetensors(file)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                if "constants.pkl" in members:
                    found = torch_script.tensors(file, archive)
                    return {name: _with_crc(Stored(file, *rest), archive, crc) for name, (*rest, crc) in found.items()}
                return _zipped(file, archive)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, torch_script.Unsafe) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{file}: holds more than tensors and would have to be unpickled, which can run any program; save its state "
            f"dict alone, or as safetensors ({reason})"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        kind = "safetensors" if file.suffix == ".safetensors" else "torch.save"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"{file}: no file of {kind}, or broken or cut off: {reason}") from None
    return {
        name: Stored(file, 0, _dtype(tensor), tuple(tensor.shape), None, array=_numpy(tensor))
        for name, tensor in _unnested(loaded, file).items()
    }


def _safetensors(file: Path) -> dict[str, Stored]:
    with safe_open(str(file), framework="np"):  # checks the header against the size of the file
        pass
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


def _zipped(file: Path, archive: zipfile.ZipFile) -> dict[str, Stored]:
    """What `torch.save` wrote: fake tensors know their storage's offset, and no byte of it is read."""
    with FakeTensorMode():
        loaded = torch.load(file, map_location="cpu", weights_only=True)
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
    return found


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
        raise SourceError(f"{file}: holds no tensors; its keys are {', '.join(map(str, list(loaded)[:5]))}")
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


def _read(name: str, stored: Stored) -> np.ndarray:
    if stored.array is not None:
        value = stored.array
    else:
        count = int(np.prod(stored.shape))
        if stored.strides is not None:
            count = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True)) if count else 0
        flat = np.fromfile(stored.file, np.dtype(stored.dtype), count, offset=stored.offset)
        if flat.size != count:
            raise SourceError(f"{stored.file}: broken or cut off: {name} ends after {flat.size} of {count} values")
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
