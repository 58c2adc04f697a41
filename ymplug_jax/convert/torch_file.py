"""Reads the tensors of PyTorch files one at a time, so that memory holds one tensor and not the model."""

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ymplug_jax.convert import pieces, source_files
from ymplug_jax.convert.source_files import SourceError
from ymplug_jax.convert.tensor_file import FLOATS, Stored, open_file, read
from ymplug_jax.core import exits

DRIFT = 1e-2  # largest difference between the copies of a parameter in two pieces, relative to its largest value
BLOCK = 2**20  # bytes hashed at a time


class Source:
    """The tensors of one or more files, by name.

    A model saved under tensor parallelism comes as several files, here called pieces. Each piece holds a slice of some tensors and
    a copy of all others.
    """

    def __init__(
        self,
        paths: list[Path],
        merge: Mapping[str, int] | None = None,
        rename: Sequence[tuple[str, str]] = (),
        copies: Sequence[tuple[str, str]] = (),
    ):
        """Open the files and read the names and shapes of their tensors.

        Args:
          paths: files, an `*.index.json` that lists them, or a folder that holds one model.
          merge: regex of a tensor name (full match) -> axis along which the tensor is split in the pieces. Files with the same
            tensor names are pieces and are joined in the order of their ranks.
          rename: (regex, replacement) pairs that map the names of other releases to one spelling.
          copies: (prefix, regex) pairs; a tensor whose whole name the regex matches is also found under its name behind the prefix.

        Raises:
          exits.Mistake: a file is missing, damaged, unsafe or of an unknown kind, or the files are not one model.
        """
        found, self.notes = source_files.listed(paths)  # lines that tell the user which files were chosen
        opened = {file: open_file(file) for file, _ in found}
        for file, names in found:
            if names is not None and (absent := sorted(names - set(opened[file][0]))):
                raise SourceError(
                    f"{file}: lacks {absent[0]}, which the index lists in it; download the model's files again"
                )
        self.files = list(opened)
        self._merge = dict(merge or {})
        self._changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._where: dict[str, list[Stored]] = {}
        given = list(self.files)
        if self._are_pieces({file: set(tensors) for file, (tensors, _) in opened.items()}):
            self.files = pieces.order(given, {file: facts for file, (_, facts) in opened.items()})
        elif self._merge and len(given) == 1:
            pieces.check_whole(given[0], opened[given[0]][1])
        if self.files != given:
            self.notes.append(f"pieces by rank: {' '.join(map(str, self.files))}")
        for file in self.files:
            for name, stored in opened[file][0].items():
                for pattern, replacement in rename:
                    name = re.sub(pattern, replacement, name)
                for prefix, pattern in (("", ".*"), *copies):
                    if re.fullmatch(pattern, name):
                        self._where.setdefault(prefix + name, []).append(stored)

    def _are_pieces(self, names: Mapping[Path, set[str]]) -> bool:
        """Whether the files are tensor-parallel pieces, which hold the same tensor names.

        Raises:
          SourceError: the files share only some names, or none of a tensor that pieces split.
        """
        files = list(names)
        pairs = ((one, two) for i, one in enumerate(files) for two in files[i + 1 :] if names[one] & names[two])
        if (pair := next(pairs, None)) is None:
            return False
        both = names[pair[0]] & names[pair[1]]
        alike = all(held == names[files[0]] for held in names.values())
        if not alike or not any(self._axis(name) is not None for name in both):
            raise SourceError(f"{pair[0]} and {pair[1]}: both hold {min(both)}; give only the files of one model")
        return True

    def check_pieces(self) -> None:
        """Check that no piece is given twice and that tensors which are not split agree in all pieces.

        Tensors without a checksum in their archive are read.

        Raises:
          SourceError: two pieces are copies, or come from different models.
        """
        cut = [name for name, where in self._where.items() if len(where) > 1 and self._axis(name) is not None]
        alike = [list(range(len(self.files)))] if cut else []
        for name in cut:  # the first tensor usually tells all pieces apart
            groups: dict[Any, list[int]] = {}
            for number, group in enumerate(alike):
                for i in group:
                    groups.setdefault((number, self._content(name, i)), []).append(i)
            alike = [group for group in groups.values() if len(group) > 1]
            if not alike:
                break
        if alike:
            one, two = (self.files[i] for i in alike[0][:2])
            raise SourceError(f"{one} and {two}: hold the same tensors; give every piece once")
        for name, where in self._where.items():
            if len(where) == 1:
                continue
            axis = self._axis(name)
            forms = [(stored.dtype, [n for d, n in enumerate(stored.shape) if d != axis]) for stored in where]
            for i, stored in enumerate(where[1:], 1):
                if forms[i] != forms[0]:
                    here, there = (f"{part.file} ({part.dtype} {part.shape})" for part in (where[0], stored))
                    raise SourceError(f"{here} and {there}: {name} differs; give only the pieces of one model")
                if axis is None and self._content(name, 0) != self._content(name, i):
                    self._check_near(name, where[0], stored)

    def _content(self, name: str, i: int) -> Any:
        """Fingerprint of piece i of a tensor: its checksum in the archive, or a hash of its values."""
        stored = self._where[name][i]
        if all(piece.crc for piece in self._where[name]):
            return stored.dtype, stored.shape, stored.crc
        if stored.dtype not in FLOATS:
            return stored.dtype, stored.shape
        return hashlib.sha256(np.ascontiguousarray(read(name, stored)).view(np.uint8).data).digest()

    def _check_near(self, name: str, first: Stored, other: Stored) -> None:
        """Accept copies that differ by accumulated rounding, as some training programs leave them.

        Raises:
          SourceError: the copies differ by more than `DRIFT`, so they belong to different models.
        """
        one, two = (read(name, stored).astype(np.float32) for stored in (first, other))
        if np.abs(one - two).max() > DRIFT * np.abs(one).max():
            raise SourceError(f"{first.file} and {other.file}: {name} differs; give only the pieces of one model")
        self.notes.append(f"{name} differs slightly in {first.file} and {other.file}; using the first")

    def join(self, other: "Source") -> None:
        """Add the tensors of another source."""
        self.files, self._where = [*self.files, *other.files], self._where | other._where

    def change(self, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        """Apply a function to each of these tensors when it is read."""
        self._changes |= changes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, with its pieces joined."""
        return {name: self.shape(name) for name in self._where}

    def dtype(self, name: str) -> str:
        """Dtype of a tensor: "float32", "float16" or "bfloat16".

        Raises:
          SourceError: the tensor has another dtype.
        """
        stored = self._where[name][0]
        if stored.dtype not in FLOATS:
            raise SourceError(
                f"{stored.file}: {name} is {stored.dtype}; save the model as {', '.join(FLOATS[:-1])} or {FLOATS[-1]} "
                "(dequantise a quantised model first)"
            )
        return stored.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, with its pieces joined."""
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
        """Values of one tensor, with its pieces joined; bfloat16 as ml_dtypes.bfloat16.

        Raises:
          SourceError: the dtype is unknown, a value is not finite, or the bytes do not match their checksum.
          exits.PlaceFailed: the disk fails.
        """
        self.dtype(name)
        where, axis = self._where[name], self._axis(name)
        parts = [read(name, stored) for stored in (where if axis is not None else where[:1])]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
        return self._changes[name](value) if name in self._changes else value

    def identity(self) -> list[tuple[str, int, int]]:
        """(path, size in bytes, modification time in ns) of each file, by which an interrupted conversion is recognised."""
        return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]

    def digests(self, ended: threading.Event) -> dict[str, str]:
        """File name (with its folder, where names repeat) -> SHA-256; incomplete once `ended` is set.

        Raises:
          exits.PlaceFailed: the disk fails.
        """
        found, names = {}, [file.name for file in self.files]
        for file in self.files:
            name = file.name if names.count(file.name) == 1 else f"{file.parent.name}/{file.name}"
            digest = hashlib.sha256()
            try:
                with file.open("rb") as stream:
                    while not ended.is_set() and (block := stream.read(BLOCK)):
                        digest.update(block)
            except OSError as error:
                raise exits.PlaceFailed(
                    f"{file}: cannot be read ({error.strerror}); repair the disk, then run the same command again to continue"
                ) from None
            found[name] = digest.hexdigest()
        return found
