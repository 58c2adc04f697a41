"""Writes an Orbax checkpoint layer by layer, so that a stack of layers is never in memory as a whole.

Each parameter is a zarr array in the layout that Orbax reads, with one chunk per layer, or per block of rows for large tables.
Everything is written into `converted.partial`, which is renamed to `converted` when it is complete. A conversion that was killed
resumes from its journal.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import unflatten_dict

from ymplug_jax.core import exits, leaf_checksums

JOURNAL = "converted.jsonl"  # one line per written source tensor: its name and its contribution to the checksums
CHUNK = 64 * 2**20  # largest chunk of a parameter without layers, in bytes


class _Block(NamedTuple):
    """A parameter or one of its layers: path, dtype and shape of the whole parameter, and the block's two checksum terms."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    sums: Future[np.ndarray]


class Store:
    """A checkpoint that is being written."""

    def __init__(self, out: Path, identity: Mapping[str, Any], size: int = 0):
        """Start a conversion, or resume an interrupted one with the same identity.

        Args:
          out: output folder of the conversion.
          identity: model, source files and options; a partial conversion with another identity is discarded.
          size: total size of the parameters in bytes.

        Raises:
          exits.Mistake: a checkpoint exists, the folder cannot be created or written, or the disk has too little free space.
        """
        self._final = out / "checkpoints" / "converted"
        if os.path.exists(self._final):
            raise exits.Mistake(f"--out {out}: {self._final} exists; remove it or choose another folder")
        self._folder = self._final.with_name("converted.partial")
        self._made = [path for path in (self._final.parent, out, *out.parents) if not os.path.exists(path)]
        try:
            lines = self._begun(identity)
            done = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
            check_room(out, size - done)
            self._folder.mkdir(parents=True, exist_ok=True)
            journal = self._folder / JOURNAL
            journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            self._journal = journal.open("a", encoding="utf-8")
        except OSError as error:
            self._remove()
            raise exits.Mistake(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
        self.done = {line["tensor"] for line in lines[1:]}
        self._sums: dict[str, list[int]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}  # dtype and shape
        for line in lines[1:]:
            self._add(line["sums"])
        self._arrays: dict[str, Any] = {}
        # Writes and blocks of the current tensor, and of the previous one (with its name), which is still being written.
        self._pending: list[Any] = []
        self._blocks: list[_Block] = []
        self._unfinished: tuple[str, list[Any], list[_Block]] = ("", [], [])
        self._beside = ThreadPoolExecutor(min(os.cpu_count() or 1, 4))
        # No fsync per chunk (`finish` syncs once) and no cache.
        self._context = tensorstore.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})

    def _begun(self, identity: Mapping[str, Any]) -> list[Any]:
        """Lines of the journal to resume from. A partial conversion of another identity is removed."""
        first = json.loads(json.dumps(identity))
        journal = self._folder / JOURNAL
        lines: list[Any] = []
        for text in journal.read_bytes().split(b"\n") if journal.is_file() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:  # the last line, cut short by a kill
                break
        if len(lines) > 1 and lines[0] == first:
            return lines
        if self._folder.exists():
            shutil.rmtree(self._folder)
        return [first]

    def stop(self) -> None:
        """Wait for the writes in progress and close the journal, from which a later conversion resumes."""
        self._journal.close()
        for future in (*self._pending, *self._unfinished[1]):
            with contextlib.suppress(ValueError):
                future.result()
        self._beside.shutdown(cancel_futures=True)
        self._arrays.clear()

    def discard(self) -> None:
        """Remove the partial checkpoint and the folders created for it, because its source is invalid."""
        self.stop()
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Turn errors of the disk into PlaceFailed. TensorStore reports them as ValueErrors that contain the system's error code."""
        try:
            yield
        except OSError as error:
            raise exits.PlaceFailed(self._failed(error.strerror or str(error))) from None
        except ValueError as error:
            if not (found := re.search(r"([^:\[\]]+) \[.*os_error_code", str(error))):
                raise
            raise exits.PlaceFailed(self._failed(found[1].strip())) from None

    def _failed(self, reason: str) -> str:
        return f"{self._folder}: cannot be written ({reason}); free some space or repair the disk, then run the same command again to continue"

    def write(self, path: str, layer: int | None, value: np.ndarray, shape: tuple[int, ...]) -> None:
        """Start writing a parameter or one of its layers. The call returns before the data is on disk; `wrote` waits for it.

        Args:
          path: of the parameter.
          layer: index along the first axis; None for a parameter without layers.
          value: the parameter or the layer. The caller must not modify it afterwards.
          shape: of the whole parameter.

        Raises:
          exits.PlaceFailed: the disk is full or fails.
        """
        kind = (value.dtype.name, tuple(shape))
        if self._kinds.setdefault(path, kind) != kind:
            raise AssertionError(f"{path}: layer {layer} is {kind} after {self._kinds[path]}")
        block, start = (value, ()) if layer is None else (value[None], (layer, *(0,) * value.ndim))
        self._blocks.append(_Block(path, *kind, self._beside.submit(leaf_checksums.part, block, start)))
        with self._place():
            self._write(path, layer, value, shape)

    def _write(self, path: str, layer: int | None, value: np.ndarray, shape: tuple[int, ...]) -> None:
        if path not in self._arrays:
            chunks = list(shape) if layer is None else [1, *shape[1:]]
            if layer is None and value.nbytes > CHUNK:
                chunks[0] = math.ceil(shape[0] / math.ceil(value.nbytes / CHUNK))
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(self._folder / path.replace("/", ".")) + "/"},
                "metadata": {
                    "shape": list(shape),
                    "chunks": [max(1, size) for size in chunks],
                    "dtype": "bfloat16" if value.dtype.name == "bfloat16" else value.dtype.str,
                    "compressor": None,
                },
            }
            self._arrays[path] = tensorstore.open(spec, create=True, open=True, context=self._context).result()
        array = self._arrays[path]
        step = array.chunk_layout.write_chunk.shape[0] if layer is None and shape else 1
        if layer is not None:
            self._pending.append(array[layer].write(value))
        elif not shape:
            array.write(value).result()
        else:
            for i in range(0, shape[0], step):
                array[i : i + step].write(value[i : i + step]).result()

    def wrote(self, name: str) -> None:
        """Declare a source tensor complete, after `write` was called for all its parts, and wait for the previous tensor.

        Raises:
          exits.PlaceFailed: the disk is full or fails.
        """
        with self._place():
            self._settle()
        self._unfinished = (name, self._pending, self._blocks)
        self._pending, self._blocks = [], []

    def _settle(self) -> None:
        """Wait for the previous tensor and record it in the journal."""
        name, writes, blocks = self._unfinished
        for future in writes:
            future.result()
        if name:
            added = [(block.path, block.dtype, block.shape, block.sums.result().tolist()) for block in blocks]
            self._journal.write(json.dumps({"tensor": name, "sums": added}) + "\n")
            self._add(added)
        self._journal.flush()

    def _add(self, added: list[Any]) -> None:
        """Add the blocks of one tensor, as its journal line lists them, to the checksums."""
        for path, dtype, shape, sums in added:
            self._kinds[path] = (dtype, tuple(shape))
            before = self._sums.get(path, [0, 0])
            self._sums[path] = [(old + new) % 2**32 for old, new in zip(before, sums, strict=True)]

    def finish(self, paths: list[str], facts: Mapping[str, Any]) -> Path:
        """Write Orbax's metadata, conversion.json and the checksums, and rename the folder to its final name.

        Args:
          paths: of all parameters.
          facts: content of conversion.json.

        Returns:
          The folder of the checkpoint.

        Raises:
          exits.PlaceFailed: the disk is full or fails.
        """
        self.wrote("")
        with self._place():
            self._journal.close()
            self._arrays.clear()
            self._beside.shutdown()
            self._describe(paths)
            record = self._final.parent.parent / "conversion.json"
            record.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            sums = {path: leaf_checksums.text(*self._kinds[path], sums) for path, sums in self._sums.items()}
            leaf_checksums.write(epath.Path(self._final), sums)
            os.sync()
            (self._folder / JOURNAL).unlink()
            self._folder.rename(self._final)
        return self._final

    def _describe(self, paths: list[str]) -> None:
        """Write the metadata files with which Orbax finds the arrays."""
        skeleton = self._folder.with_name("converted.skeleton")
        shutil.rmtree(skeleton, ignore_errors=True)
        tree = unflatten_dict({tuple(path.split("/")): np.zeros(1, np.float32) for path in paths})
        logging.disable(logging.WARNING)  # Orbax warns about use_ocdbt=False, which writing layer by layer requires
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
                writer.save(skeleton, args=ocp.args.PyTreeSave(tree))
        finally:
            logging.disable(logging.NOTSET)
        for file in skeleton.iterdir():
            if file.is_file():
                shutil.copy(file, self._folder)
        shutil.rmtree(skeleton)


def check_room(out: Path, size: int) -> None:
    """Check the free space of the disk that holds `out`, which need not exist yet.

    Raises:
      exits.Mistake: fewer than `size` bytes are free.
    """
    there = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    if size > free:
        raise exits.Mistake(
            f"--out {out}: needs {size:,} bytes, but only {free:,} are free; free some space or choose another folder"
        )
