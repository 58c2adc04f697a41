"""LoRA adapters in the PEFT layout: a folder with adapter_config.json and adapter_model.safetensors (or .bin)."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ymplug_jax.convert.plan import UnknownModel
from ymplug_jax.convert.source_files import SourceError, read_json
from ymplug_jax.convert.torch_file import Source

# Settings of PEFT that change what an adapter computes; empty or false in plain LoRA.
_OTHER_KINDS = (
    *(
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "lora_bias",
        "layer_replication",
    ),
    *(
        "enable_lora",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
    ),
    *("arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
_KEEPING_STARTS = ("gaussian", "eva", "orthogonal")  # initialisations that leave the model's weights as they are
# PEFT adds these parts to the names of a model's tensors.
RENAME = ((r"^base_model\.model\.", ""), (r"\.lora_([AB])\.default\.", r".lora_\1."))
FUSED_LAYERS = {  # linear layer of a block with q, k and v in one matrix -> path in `lora_targets`
    "self_attention.query_key_value": "attn/[qkv]",
    "self_attention.dense": "attn/o",
    "mlp.dense_h_to_4h": "mlp/up",
    "mlp.dense_4h_to_h": "mlp/down",
}
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
    _refuse_other_kinds(settings, config)
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
    rank = config["r"]
    for a, b in pairs.values():
        one, two = source.shape(a), source.shape(b)
        if len(one) != 2 or len(two) != 2:
            raise SourceError(
                f"{files[0]}: {b} has shape {two}: an old PEFT adapted parts of a fused matrix through a grouped convolution; merge the "
                "adapter with that PEFT and give the merged weights"
            )
        if one[0] != rank or two[1] != rank:
            raise SourceError(
                f"{settings}: r is {rank}, but {a} is {one} and {b} is {two}; merge the adapter with PEFT and give the merged weights"
            )
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(source, scale, pairs, config)


def _refuse_other_kinds(file: Path, config: Mapping[str, Any]) -> None:
    """Check that the settings of an adapter describe low-rank matrices of one rank and scale beside unchanged weights.

    Raises:
      SourceError: they do not.
    """
    plain = {"peft_type": ("LORA",), "bias": ("none",)}
    odd = [f"{name} {config[name]}" for name, values in plain.items() if config.get(name, values[0]) not in values]
    odd += [name for name in _OTHER_KINDS if config.get(name)]
    if isinstance(start := config.get("init_lora_weights"), str) and start not in _KEEPING_STARTS:
        odd.append(f"init_lora_weights {start}, which changes the weights of the model")
    if odd:
        raise SourceError(
            f"{file}: only plain LoRA is supported, not {', '.join(odd)}; merge the adapter with PEFT and give the merged weights"
        )


def kept_in(
    shapes: Mapping[str, tuple[int, ...]], block: str, layers: Mapping[str, str]
) -> tuple[int, tuple[str, ...]] | None:
    """Rank and targets of the adapters among the tensors of a decoder, or None.

    Args:
      shapes: of the tensors by name.
      block: regex of the beginning of the names in a block.
      layers: linear layer of a block -> its path in `lora_targets`.

    Raises:
      UnknownModel: the adapters belong to other layers or have several ranks.
    """
    found, ranks = [], set()
    names = {name for name in shapes if ".lora_" in name}
    for layer, target in layers.items():
        pattern = re.compile(rf"{block}{re.escape(layer)}\.lora_([AB])\.weight")
        own = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
        names -= own.keys()
        ranks |= {shapes[name][0 if side == "A" else 1] for name, side in own.items()}
        found += [target] if own else []
    if names:
        raise UnknownModel(
            f"{min(names)}: adapters of this layer cannot be kept; merge the adapter with --lora DIR, without --keep_lora"
        )
    if len(ranks) > 1:
        raise UnknownModel(
            f"the adapters have several ranks, {sorted(ranks)}; merge them with --lora DIR, without --keep_lora"
        )
    return (ranks.pop(), tuple(found)) if ranks else None


def settings_of(shapes: Mapping[str, tuple[int, ...]], block: str, layers: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a decoder for the adapters that `kept_in` finds: none without adapters."""
    found = kept_in(shapes, block, layers)
    return {"lora_rank": found[0], "lora_targets": found[1]} if found else {}


def scaled(model: Any, scale: float) -> Any:
    """The decoder, or the model with a decoder in `llm`, with this scale of the adapters, which no tensor holds."""
    return model.clone(lora_scale=scale) if hasattr(model, "lora_scale") else model.clone(llm=scaled(model.llm, scale))


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
    a, b = map(adapter.source.read, adapter.pairs[name])
    return added(weight, a, b, adapter.scale)


def added(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale * B @ A, computed in float32 and cast to the weight's dtype: [out, in], [R, in], [out, R] -> [out, in]."""
    product = torch.from_numpy(b.astype(np.float32)) @ torch.from_numpy(a.astype(np.float32))
    return (weight.astype(np.float32) + product.numpy() * np.float32(scale)).astype(weight.dtype)
