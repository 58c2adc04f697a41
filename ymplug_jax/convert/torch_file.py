"""Tensors of PyTorch files, one at a time and without running anything that a file may carry.

safetensors are mapped, zip archives of `torch.save` are mapped and read with `weights_only=True`, shards are found through
their index. A file that can only be read by unpickling arbitrary objects is refused.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

NESTS = ("model", "module", "state_dict")  # where training programs keep the tensors


class SourceError(ValueError):
    """A source that cannot be used; the message names the file and the fix."""


class Source:
    """The tensors of one or more files, by name."""

    def __init__(self, paths: list[Path], merge: Mapping[str, int] | None = None):
        """Open the files; nothing but names and shapes is read.

        Args:
          paths: files, or one `*.index.json` that names them.
          merge: regex of a name (full match) -> axis: files with the same names are tensor-parallel pieces, in the order
            given; a name that no regex matches is the same in all of them.

        Raises:
          SourceError: a file that is missing, broken, unsafe, or of no known kind.
        """
        self.files = [file for path in paths for file in _listed(path)]
        self._parts: list[dict[str, Any]] = [_open(file) for file in self.files]
        self._merge = dict(merge or {})
        self._where: dict[str, list[int]] = {}
        for i, part in enumerate(self._parts):
            for name in part:
                self._where.setdefault(name, []).append(i)
        twice = [name for name, where in self._where.items() if len(where) > 1]
        if twice and not all(len(self._where[name]) == len(self.files) for name in twice):
            raise SourceError(f"{twice[0]} stands in some of the files twice; give the pieces of one model only")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, pieces put together."""
        return {name: self._shape(name) for name in self._where}

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(_shape_of(self._parts[i], name)) for i in self._where[name]]
        axis = self._axis(name)
        if len(shapes) == 1 or axis is None:
            return shapes[0]
        whole = list(shapes[0])
        whole[axis] = sum(shape[axis] for shape in shapes)
        return tuple(whole)

    def _axis(self, name: str) -> int | None:
        return next((axis for pattern, axis in self._merge.items() if re.fullmatch(pattern, name)), None)

    def read(self, name: str) -> np.ndarray:
        """One tensor; bfloat16 as ml_dtypes.bfloat16."""
        parts = [_numpy(self._parts[i][name]) for i in self._where[name]]
        axis = self._axis(name)
        return parts[0] if len(parts) == 1 or axis is None else np.concatenate(parts, axis=axis)

    def digests(self) -> dict[str, str]:
        """File name -> SHA-256."""
        found = {}
        for file in self.files:
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found


class _SafeTensors(Mapping):
    """Lazy: a tensor is read where it is asked for."""

    def __init__(self, file: Path):
        self._file = safe_open(str(file), framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> list[int]:
        return self._file.get_slice(name).get_shape()


def _listed(path: Path) -> list[Path]:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if not path.name.endswith(".index.json"):
        return [path]
    names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [path.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise SourceError(f"{path}: {len(missing)} of its {len(files)} files are missing, the first is {missing[0]}")
    return files


def _open(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        try:
            return _SafeTensors(file)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file}: broken or cut off: {error}") from None
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{file}: holds more than tensors and would have to be unpickled, which can run any program; save its state "
            f"dict alone, or as safetensors ({reason})"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise SourceError(
            f"{file}: no file of torch.save, or broken or cut off: {str(error).splitlines()[0]}"
        ) from None
    return _unnested(loaded, file)


def _unnested(loaded: Any, file: Path) -> dict[str, torch.Tensor]:
    for key in NESTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise SourceError(f"{file}: holds a {type(loaded).__name__}, no state dict")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SourceError(f"{file}: holds no tensors; its keys are {', '.join(map(str, list(loaded)[:5]))}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _shape_of(part: Mapping[str, Any], name: str) -> Any:
    return part.shape(name) if isinstance(part, _SafeTensors) else part[name].shape


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
