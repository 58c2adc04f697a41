"""Converts the parameters of a run or of a conversion back to safetensors, under the names of the original model."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from ymplug_jax.convert import hub_config, lock, rules
from ymplug_jax.convert.leaves import verified
from ymplug_jax.convert.plan import Layout, map_of
from ymplug_jax.convert.source_files import SourceError, read_json
from ymplug_jax.convert.store import check_room
from ymplug_jax.core import exits, progress, state

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def to_torch(model: str, folder: Path, out: Path, layout: str | None = None) -> list[Path]:
    """Write model.safetensors and, for a model with adapters, adapter_model.safetensors, tensor by tensor.

    For language models config.json is written too, so that the classes of Hugging Face load the folder.

    Args:
      model: one of `plan.MODELS`.
      folder: a run, of which the newest step is read, or a conversion.
      out: output folder, or a path that ends in .safetensors. The folder is locked meanwhile, see `lock`.
      layout: naming scheme to write; None: the one that the conversion read, or the model's first.

    Returns:
      The files written.

    Raises:
      exits.Mistake: `folder` holds no checkpoint, a damaged one, or one of another model; another conversion writes into `out`, or
        it cannot be written, has too little space or holds the files.
      exits.PlaceFailed: a disk fails during the conversion; no file is left behind.
    """
    module, record = map_of(model), folder / "conversion.json"
    read = read_json(record) if record.is_file() else {}
    facts = read if isinstance(read, dict) and read.get("model") == model else {}
    layout = layout or facts.get("layout") or next(iter(module.LAYOUTS))
    if layout not in module.LAYOUTS:
        raise SourceError(
            f"--layout {layout}: unknown layout of model {model}; choose one of {', '.join(module.LAYOUTS)}"
        )
    named: Layout = module.LAYOUTS[layout]
    leaves = verified(folder)
    wanted = {path for rule in named.rules for path in rule.targets if path} & set(leaves)
    if not wanted:
        raise SourceError(f"{folder}: no parameter belongs to model {model}; give the right --model")
    _refuse_left_out(folder, model, wanted, set(leaves))
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
    outputs = [*(path for path, _ in files), *beside]
    with lock.held(file.parent), _removed_on_error(out, outputs):
        for path, names in files:
            _write(path, {name: form(name) for name in names}, ((name, tensor(name)) for name in names))
        for path in beside:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return outputs


def _refuse_left_out(folder: Path, model: str, wanted: set[str], stored: set[str]) -> None:
    """Check that a language model is written whole.

    Raises:
      SourceError: some of its parameters have no place in the layout.
    """
    others = sorted(path for path in stored - wanted if path.startswith("llm/"))
    if not others or not any(path.startswith("llm/") for path in wanted):
        return
    if all("/lora/" in path for path in others):
        raise SourceError(
            f"{folder}: holds adapters ({others[0]}), which the layout of model {model} cannot store; give a run without adapters"
        )
    raise SourceError(
        f"{folder}: holds {others[0]}, which model {model} does not have; give the --model of its language model"
    )


@contextlib.contextmanager
def _removed_on_error(out: Path, files: Iterable[Path]) -> Iterator[None]:
    """Remove the files when an error or Ctrl-C ends the block, because a repeated command refuses existing files.

    Raises:
      exits.Mistake: a file exists before the block.
    """
    for path in files:
        if os.path.exists(path):
            raise exits.Mistake(f"--out {out}: {path} exists; remove it or choose another folder")
    try:
        yield
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise


def _config(
    module: ModuleType, folder: Path, record: Any, facts: Mapping[str, Any], dtypes: set[str]
) -> dict[str, Any]:
    """Content of config.json: the one that the conversion read, or one made from the decoder's settings. Empty if the model has none.

    Args:
      module: the model's converter, see `plan.map_of`.
      folder: a run or a conversion.
      record: conversion.json of the folder, of any model.
      facts: the same; empty if it is of another model.
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
    """Write a safetensors file tensor by tensor, under a temporary name until it is complete.

    Args:
      file: in a folder that exists.
      forms: tensor name -> dtype and shape.
      tensors: (name, values) in the order of `forms`.

    Raises:
      exits.Mistake: the disk has too little free space.
      exits.PlaceFailed: the disk is full or fails.
    """
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
            f"{file}: cannot be written ({error.strerror}); free some space, then run the same command again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
