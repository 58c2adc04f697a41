"""Writes an Orbax checkpoint layer by layer, so that no parameter ever stands whole in memory.

A parameter is a zarr array with a chunk for each layer (large tables: for some rows), in the layout that Orbax reads. Everything is written
into a folder of another name that becomes the checkpoint when it is complete; what a killed conversion left is gone on with.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import unflatten_dict

JOURNAL = "converted.jsonl"  # names of the source tensors that are written
CHUNK = 256 * 2**20  # bytes of a chunk of a parameter without layers, at most


class Store:
    """The checkpoint in the making."""

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        """Begin, or go on with a conversion of the same identity (sources, model, types).

        Raises:
          FileExistsError: there is a checkpoint already.
        """
        self._final = out / "checkpoints" / "converted"
        if self._final.exists():
            raise FileExistsError(f"{self._final} is there already; remove it or give another --out")
        self._folder = self._final.with_name("converted.partial")
        journal = self._folder / JOURNAL
        self.done: set[str] = set()
        if journal.exists():
            first, *names = journal.read_text(encoding="utf-8").splitlines()
            if json.loads(first) == json.loads(json.dumps(identity)):
                self.done = set(names)
        if not self.done:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            journal.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        self._journal = journal.open("a", encoding="utf-8")
        self._arrays: dict[str, Any] = {}
        self._pending: list[Any] = []
        self._unfinished: list[Any] = []
        self._last = ""
        # Written to the disk once, at the end; nothing is kept in memory.
        self._context = tensorstore.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})

    def write(self, path: str, layer: int | None, value: np.ndarray, shape: tuple[int, ...]) -> None:
        """One parameter, or one layer of it; `shape` is that of the whole. Writing goes on when this returns; `wrote` waits."""
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
        """All parts of a source tensor are handed over; those of the one before are on disk."""
        self._settle()
        self._unfinished, self._pending = [*self._pending], []
        self._last = name

    def _settle(self) -> None:
        """Wait for the tensor that is being written and note it."""
        for future in self._unfinished:
            future.result()
        if self._last:
            self._journal.write(self._last + "\n")
        self._journal.flush()

    def finish(self, paths: list[str], facts: Mapping[str, Any]) -> Path:
        """Add what Orbax needs, the record of the conversion, and make the folder the checkpoint."""
        self.wrote("")
        self._journal.close()
        self._arrays.clear()
        skeleton = self._folder.with_name("converted.skeleton")
        shutil.rmtree(skeleton, ignore_errors=True)
        tree = unflatten_dict({tuple(path.split("/")): np.zeros(1, np.float32) for path in paths})
        logging.disable(logging.WARNING)  # Orbax warns of the plain layout, which is what lets us write layer by layer
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
                writer.save(skeleton, args=ocp.args.PyTreeSave(tree))
        finally:
            logging.disable(logging.NOTSET)
        for file in skeleton.iterdir():
            if file.is_file():
                shutil.copy(file, self._folder)
        shutil.rmtree(skeleton)
        (self._folder / JOURNAL).unlink()
        (self._final.parent.parent / "conversion.json").write_text(
            json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.sync()
        self._folder.rename(self._final)
        return self._final
