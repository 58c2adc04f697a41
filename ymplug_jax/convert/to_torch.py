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

from ymplug_jax.convert import hub_config, lock, lora, peft_layout, rules
from ymplug_jax.convert.leaves import verified
from ymplug_jax.convert.plan import Layout, extra, map_of
from ymplug_jax.convert.source_files import SourceError, read_json
from ymplug_jax.convert.store import check_room
from ymplug_jax.core import exits, progress, state

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def to_torch(model: str, folder: Path, out: Path, layout: str | None = None, merge: bool = False) -> list[Path]:
    """Write model.safetensors and, for a model with adapters, adapter_model.safetensors, tensor by tensor.

    For language models config.json is written too, so that the classes of Hugging Face load the folder. The layout "peft" writes the
    adapters alone, as a folder that PEFT loads.

    Args:
      model: one of `plan.MODELS`.
      folder: a run, of which the newest step is read, or a conversion.
      out: output folder, or a path that ends in .safetensors. The folder is locked meanwhile, see `lock`.
      layout: naming scheme to write; None: the one that the conversion read, or the model's first.
      merge: add the adapters to the weights, see `lora.added`, instead of writing them beside.

    Returns:
      The files written.

    Raises:
      exits.Mistake: `folder` holds no checkpoint, a damaged one, or one of another model; another conversion writes into `out`, or
        it cannot be written, has too little space or holds the files.
      exits.PlaceFailed: a disk fails during the conversion; no file is left behind.
    """
    module, record = map_of(model), folder / "conversion.json"
    if extra(module, "COPIES", ()):
        raise SourceError(f"--to torch: {folder} holds parts of one {model} several times; use the original file")
    read = read_json(record) if record.is_file() else {}
    facts = read if isinstance(read, dict) and read.get("model") == model else {}
    named = _layout(module, model, layout, facts)
    leaves = verified(folder)
    alone = layout == peft_layout.NAME
    wanted = {path for rule in named.rules for path in rule.targets if path} & set(leaves)
    if not wanted:
        raise SourceError(
            f"{folder}: no adapter of model {model} is here; give a run with config.model.llm.lora_rank above 0 or the right --model"
            if alone
            else f"{folder}: no parameter belongs to model {model}; give the right --model"
        )
    whole = _layout(module, model, None, facts)  # the adapters of another decoder may have the same paths
    placed = wanted if not alone else {path for rule in whole.rules for path in rule.targets if path}
    _refuse_left_out(folder, model, placed, set(leaves))
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
    if merge and not adapters:
        raise SourceError(f"--merge_lora: {folder} holds no adapters of model {model}; leave it out")
    files = _files(file, list(sources), alone, merge)
    scale = _settings(folder, read).get("lora_scale", 1.0) if merge else 1.0

    def plain(name: str) -> np.ndarray:
        entry = entries[sources[name]]
        parts = {p: leaves[p] if entry.layer is None else leaves[p][entry.layer] for p in entry.rule.targets if p}
        values = {p: np.asarray(part.read().result()) for p, part in parts.items()}
        value = rules.tensor_of(entry._replace(layer=None), values)
        return np.zeros_like(value) if name in zeros else value

    def tensor(name: str) -> np.ndarray:
        a, b = (f"{name.removesuffix('.weight')}.lora_{side}.weight" for side in "AB")
        if not merge or a not in adapters:
            return plain(name)
        return lora.added(plain(name), plain(a), plain(b), scale)

    def form(name: str) -> tuple[str, tuple[int, ...]]:
        entry = entries[sources[name]]
        return leaves[next(p for p in entry.rule.targets if p)].dtype.name, entry.shape

    if alone:
        config = peft_layout.config_of(_settings(folder, read), adapters, whole, str(folder))
        beside = [file.with_name(peft_layout.FILES[1])]
    else:
        config = _config(module, folder, read, facts, {form(name)[0] for name in files[0][1]})
        beside = [file.with_name(hub_config.FILE)] if config else []
    outputs = [*(path for path, _ in files), *beside]
    shown = peft_layout.stored if alone else str
    with lock.held(file.parent), _removed_on_error(out, outputs):
        for path, names in files:
            _write(path, {shown(name): form(name) for name in names}, ((name, tensor(name)) for name in names))
        for path in beside:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return outputs


def _files(file: Path, names: list[str], alone: bool, merge: bool) -> list[tuple[Path, list[str]]]:
    """(file, names of its tensors): the weights, and the adapters beside them unless they are merged; or the adapters alone."""
    adapters = sorted(name for name in names if ".lora_" in name)
    beside = [(file.with_name(peft_layout.FILES[0]), adapters)]
    if alone:
        return beside
    weights = [(file, [name for name in names if ".lora_" not in name])]
    return weights + beside if adapters and not merge else weights


def _layout(module: ModuleType, model: str, layout: str | None, facts: Mapping[str, Any]) -> Layout:
    """The naming scheme of this name; "peft": the adapters of the model's own.

    Raises:
      SourceError: the model has no such scheme.
    """
    own: Layout = module.LAYOUTS[facts.get("layout") or next(iter(module.LAYOUTS))]
    adapters = peft_layout.only_adapters(own)
    layouts = module.LAYOUTS | ({peft_layout.NAME: adapters} if adapters.rules else {})
    if layout and layout not in layouts:
        raise SourceError(f"--layout {layout}: unknown layout of model {model}; choose one of {', '.join(layouts)}")
    return layouts[layout] if layout else own


def _settings(folder: Path, record: Any) -> Mapping[str, Any]:
    """Fields of the decoder in a run or, as its conversion.json `record` states them, in a conversion."""
    if (folder / "conversion.json").is_file():
        model: Mapping[str, Any] = next(
            (sizes for sizes in record["sizes"].values() if "lora_rank" in sizes.get("llm", sizes)), {}
        )
    else:
        model = read_json(folder / "config.json")["model"]
    return model.get("llm", model)


def _refuse_left_out(folder: Path, model: str, wanted: set[str], stored: set[str]) -> None:
    """Check that a language model is written whole.

    Raises:
      SourceError: some of its parameters have no place in the layout.
    """
    others = sorted(path for path in stored - wanted if path.startswith("llm/"))
    if not others or not any(path.startswith("llm/") for path in wanted):
        return
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
        found = module.config_of(_settings(folder, record))
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
