"""The other direction: a run's or a converted folder's parameters as safetensors under the names of the source."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from ymplug_jax.convert import hub_config, rules
from ymplug_jax.convert.leaves import verified
from ymplug_jax.convert.plan import Layout, map_of
from ymplug_jax.convert.source_files import SourceError, read_json
from ymplug_jax.convert.store import check_room
from ymplug_jax.core import exits, progress, state

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def to_torch(model: str, folder: Path, out: Path, layout: str | None = None) -> list[Path]:
    """Write model.safetensors, and adapter_model.safetensors where there are adapters, tensor by tensor; returns the files.

    Where the model's table can, config.json stands beside them: with it Hugging Face's classes load the folder.

    Args:
      model: name of the map file.
      folder: a run (its newest step) or the folder of a conversion.
      out: folder, or the file model.safetensors itself.
      layout: names to write; None: those that the conversion read, else the first that the map knows.

    Raises:
      exits.Mistake: no checkpoint there, a damaged one, or not of this model; `out` cannot be made, has not enough room, or holds
        the file already.
      exits.PlaceFailed: a disk fails on the way; nothing half-written stays.
    """
    module, record = map_of(model), folder / "conversion.json"
    read = read_json(record) if record.is_file() else {}
    facts = read if isinstance(read, dict) and read.get("model") == model else {}
    layout = layout or facts.get("layout") or next(iter(module.LAYOUTS))
    if layout not in module.LAYOUTS:
        raise SourceError(f"--layout {layout}: model {model} has {', '.join(module.LAYOUTS)}")
    named: Layout = module.LAYOUTS[layout]
    leaves = verified(folder)
    wanted = {path for rule in named.rules for path in rule.targets if path} & set(leaves)
    if not wanted:
        raise SourceError(f"{folder}: none of its parameters belong to model {model}")
    decoder = any(path.startswith("llm/") for path in wanted)
    if decoder and (others := sorted(path for path in set(leaves) - wanted if path.startswith("llm/"))):
        raise SourceError(f"{folder}: model {model} has no {others[0]}, so the language model in it is of another kind")
    like = state.unflatten(
        {p: jax.ShapeDtypeStruct(leaves[p].shape, leaves[p].dtype.numpy_dtype) for p in sorted(wanted)}
    )
    entries = rules.expand(named.rules, like)
    zeros = {
        pattern.format(entry.layer): name
        for pattern, other in named.zeros
        for name, entry in entries.items()
        if entry.rule.source == other
    }
    copies = {copy: original for copy, original in facts.get("tied", ()) if original in entries}
    sources = {name: name for name in entries} | copies | zeros
    file = out if out.suffix == ".safetensors" else out / "model.safetensors"
    adapters = {name for name in sources if ".lora_" in name}
    files = [(file, [name for name in sources if name not in adapters])]
    if adapters:
        files.append((file.with_name("adapter_model.safetensors"), sorted(adapters)))

    def tensor(name: str) -> np.ndarray:
        entry = entries[sources[name]]
        parts = {p: leaves[p] if entry.layer is None else leaves[p][entry.layer] for p in entry.rule.targets if p}
        values = {p: np.asarray(part.read().result()) for p, part in parts.items()}
        value = rules.tensor_of(entry._replace(layer=None), values)
        return np.zeros_like(value) if name in zeros else value

    def form(name: str) -> tuple[str, tuple[int, ...]]:
        entry = entries[sources[name]]
        return leaves[next(p for p in entry.rule.targets if p)].dtype.name, entry.shape

    config = _config(module, folder, read, facts, {form(name)[0] for name in files[0][1]})
    beside = [file.with_name(hub_config.FILE)] if config else []
    for path in [*(path for path, _ in files), *beside]:
        if os.path.exists(path):
            raise exits.Mistake(f"{path} is there already; remove it or give another --out")
    for path, names in files:
        _write(path, {name: form(name) for name in names}, ((name, tensor(name)) for name in names))
    for path in beside:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*(path for path, _ in files), *beside]


def _config(
    module: ModuleType, folder: Path, record: Any, facts: Mapping[str, Any], dtypes: set[str]
) -> dict[str, Any]:
    """config.json to write: that which the conversion read, else made of the decoder's settings; empty: none is known.

    Args:
      module: the model's map file.
      folder: a run or a conversion.
      record: conversion.json of the folder, of any model.
      facts: the same, empty if it is of another model.
      dtypes: of the tensors that are written.
    """
    if not hasattr(module, "config_of"):
        return {}
    found = facts.get("config")
    if not found:
        if (folder / "conversion.json").is_file():
            (model,) = record["sizes"].values()
        else:
            model = read_json(folder / "config.json")["model"]
        found = module.config_of(model.get("llm", model))
    one = dtypes.pop() if len(dtypes) == 1 else "float32"
    return {**{name: value for name, value in found.items() if name != "dtype"}, "torch_dtype": one}


def _write(
    file: Path, forms: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """A safetensors file, written as the tensors come; it gets its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in forms.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(file.name + ".partial")
    check_room(file.parent, end)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise exits.Mistake(f"--out {file.parent}: cannot be made: {error.strerror}; give another folder") from None
    try:
        with partial.open("wb") as stream:
            bar: progress.Bar[None] = progress.bar(total=end, unit="B", scale=True, desc=file.name)
            with bar:
                stream.write(len(text).to_bytes(8, "little") + text)
                for _, value in tensors:
                    stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
                    bar.update(value.nbytes)
        partial.rename(file)
    except OSError as error:
        raise exits.PlaceFailed(
            f"{file}: cannot be written: {error.strerror}; make room and run the same command again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
