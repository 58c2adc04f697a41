"""Tensors of PyTorch files, one at a time: a tensor's bytes are read from the disk when it is asked for, so that memory holds one."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ymplug_jax.convert import pieces, source_files
from ymplug_jax.convert.source_files import SourceError
from ymplug_jax.convert.tensor_file import FLOATS, Stored, open_file, read
from ymplug_jax.core import exits

DRIFT = 1e-2  # of the largest value: the most that copies of a parameter in two pieces differ


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
          paths: files, an `*.index.json` that names them, or a folder that holds one model.
          merge: regex of a name (full match) -> axis: files with the same names are tensor-parallel pieces, which are put
            together by their ranks; a name that no regex matches is the same in all of them.
          rename: (regex, replacement) pairs that bring the spellings of other releases to one.

        Raises:
          exits.Mistake: a file that is missing, broken, unsafe, or of no known kind, or files that are not one model.
        """
        found, self.notes = source_files.listed(paths)  # notes: what was chosen, for people
        opened = {file: open_file(file) for file, _ in found}
        for file, names in found:
            if names is not None and (absent := sorted(names - set(opened[file][0]))):
                raise SourceError(
                    f"{file}: lacks {absent[0]}, which the index says it holds; fetch the files of one model again"
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
                self._where.setdefault(name, []).append(stored)

    def _are_pieces(self, names: Mapping[Path, set[str]]) -> bool:
        """Whether the files are tensor-parallel pieces: they hold the same names.

        Raises:
          SourceError: they share only some, or no tensor that is cut.
        """
        files = list(names)
        pairs = ((one, two) for i, one in enumerate(files) for two in files[i + 1 :] if names[one] & names[two])
        if (pair := next(pairs, None)) is None:
            return False
        both = names[pair[0]] & names[pair[1]]
        alike = all(held == names[files[0]] for held in names.values())
        if not alike or not any(self._axis(name) is not None for name in both):
            raise SourceError(
                f"{pair[0]} and {pair[1]} both hold {min(both)}; give every tensor once, from the files of one model only"
            )
        return True

    def check_pieces(self) -> None:
        """Compare the pieces: no two are copies, and what is not cut is the same in all. Reads what has no checksum in its archive.

        Raises:
          SourceError: copies, or pieces of different models.
        """
        cut = [name for name, where in self._where.items() if len(where) > 1 and self._axis(name) is not None]
        alike = [list(range(len(self.files)))] if cut else []
        for name in cut:  # as a rule the first tensor tells all pieces apart
            groups: dict[Any, list[int]] = {}
            for number, group in enumerate(alike):
                for i in group:
                    groups.setdefault((number, self._content(name, i)), []).append(i)
            alike = [group for group in groups.values() if len(group) > 1]
            if not alike:
                break
        if alike:
            one, two = (self.files[i] for i in alike[0][:2])
            raise SourceError(f"{one} and {two} hold the same tensors; give every piece once")
        for name, where in self._where.items():
            if len(where) == 1:
                continue
            axis = self._axis(name)
            forms = [(stored.dtype, [n for d, n in enumerate(stored.shape) if d != axis]) for stored in where]
            for i, stored in enumerate(where[1:], 1):
                if forms[i] != forms[0]:
                    one, two = (f"{part.file} ({part.dtype} {part.shape})" for part in (where[0], stored))
                    raise SourceError(f"{name} differs in {one} and {two}; give the pieces of one model only")
                if axis is None and self._content(name, 0) != self._content(name, i):
                    self._check_near(name, where[0], stored)

    def _content(self, name: str, i: int) -> Any:
        """What tells the content of piece i of a tensor from others: its checksum in the archive, else a hash of its values."""
        stored = self._where[name][i]
        if all(piece.crc for piece in self._where[name]):
            return stored.dtype, stored.shape, stored.crc
        if stored.dtype not in FLOATS:
            return stored.dtype, stored.shape
        return hashlib.sha256(np.ascontiguousarray(read(name, stored)).view(np.uint8)).digest()

    def _check_near(self, name: str, first: Stored, other: Stored) -> None:
        """Copies of a parameter drift apart by roundings in some programs; those of another model are far from each other."""
        one, two = (read(name, stored).astype(np.float32) for stored in (first, other))
        if np.abs(one - two).max() > DRIFT * np.abs(one).max():
            raise SourceError(f"{name} differs in {first.file} and {other.file}; give the pieces of one model only")
        self.notes.append(f"{name} differs a little in {first.file} and {other.file}; the former's is taken")

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
        parts = [read(name, stored) for stored in (where if axis is not None else where[:1])]
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
            try:
                with file.open("rb") as stream:
                    found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise exits.PlaceFailed(f"{file}: cannot be read: {error.strerror}; the same command goes on") from None
        return found
