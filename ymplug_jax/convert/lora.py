"""LoRA adapters in the PEFT layout: a folder with adapter_config.json and adapter_model.safetensors (or .bin)."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ymplug_jax.convert.source_files import SourceError, read_json
from ymplug_jax.convert.torch_file import Source

FILES = ("adapter_model.safetensors", "adapter_model.bin")


class Adapter(NamedTuple):
    """A low-rank update of some weights: W + scale * B @ A. See `docs/models/language_models.md`, LoRA."""

    source: Source
    scale: float
    pairs: dict[str, tuple[str, str]]  # weight -> tensor names of A [R, in] and B [out, R]
    config: dict[str, Any]


def read(folder: Path, rename: Sequence[tuple[str, str]]) -> Adapter:
    """Open an adapter and read its settings, tensor names and shapes.

    Args:
      folder: that PEFT wrote.
      rename: (regex, replacement) pairs for tensor names, see `Source`.

    Raises:
      SourceError: the folder holds no adapter, or one that is not plain LoRA.
    """
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        raise SourceError(f"{folder}: no adapter_config.json; give the folder that PEFT wrote")
    config = read_json(settings)
    if not isinstance(config, dict):
        raise SourceError(f"{settings}: not the settings of an adapter; download it again")
    kind = str(config.get("peft_type", "LORA"))
    odd = [
        key for key in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if kind.upper() != "LORA" or config.get("bias", "none") != "none" or odd or config.get("modules_to_save"):
        what = (
            ", ".join(odd)
            or f"peft_type {kind}, bias {config.get('bias')}, modules_to_save {config.get('modules_to_save')}"
        )
        raise SourceError(f"{settings}: only plain LoRA is supported, not {what}; merge the adapter with PEFT first")
    if not all(isinstance(config.get(name), int | float) and config[name] > 0 for name in ("r", "lora_alpha")):
        raise SourceError(f"{settings}: r and lora_alpha are not numbers above 0; download it again")
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        raise SourceError(f"{folder}: no {' or '.join(FILES)}; give the folder that PEFT wrote")
    source = Source(files[:1], rename=rename)
    pairs = {}
    for name in source.shapes():
        if match := re.fullmatch(r"(.*)\.lora_A(\.weight)", name):
            pairs[match[1] + match[2]] = (name, f"{match[1]}.lora_B.weight")
    paired = {name for pair in pairs.values() for name in pair}
    others = set(source.shapes()) ^ paired
    if not pairs or others:
        named = ", ".join(sorted(others)[:4]) or "none at all"
        raise SourceError(
            f"{files[0]}: holds other tensors than pairs of lora_A and lora_B ({named}); give the folder of a LoRA adapter"
        )
    return Adapter(source, config["lora_alpha"] / config["r"], pairs, config)


def merge(source: Source, adapter: Adapter) -> None:
    """Add the adapter to the weights of `source` as they are read. The sum is computed in float32 and cast to the weight's dtype.

    Raises:
      SourceError: the adapter changes a weight that the model lacks or that has another shape.
    """
    shapes, parts = source.shapes(), adapter.source.shapes()
    for name, (a, b) in adapter.pairs.items():
        wanted = (parts[b][0], parts[a][1])
        if shapes.get(name) != wanted:
            has = f"shape {shapes[name]}" if name in shapes else "no such tensor"
            raise SourceError(
                f"--lora: the adapter changes {name} of shape {wanted}, but the model has {has}; give an adapter of this model"
            )
    source.change({name: partial(_add, adapter, name) for name in adapter.pairs})


def _add(adapter: Adapter, name: str, weight: np.ndarray) -> np.ndarray:
    a, b = (torch.from_numpy(adapter.source.read(part).astype(np.float32)) for part in adapter.pairs[name])
    return (weight.astype(np.float32) + (b @ a).numpy() * np.float32(adapter.scale)).astype(weight.dtype)
