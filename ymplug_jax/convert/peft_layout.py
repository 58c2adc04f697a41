"""Names and settings of LoRA adapters as PEFT stores them: adapter_model.safetensors and adapter_config.json."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ymplug_jax.convert.plan import Layout
from ymplug_jax.convert.source_files import SourceError

NAME = "peft"  # of the layout, for `--layout`
FILES = ("adapter_model.safetensors", "adapter_config.json")
_PART = re.compile(r"(?P<head>.*?\.)\d+\.(?P<layer>.+)\.lora_[AB]\.weight")


def stored(name: str) -> str:
    """PEFT's name of an adapter's tensor."""
    return f"base_model.model.{name}"


def only_adapters(layout: Layout) -> Layout:
    """The rules of a layout that concern adapters."""
    return Layout(tuple(rule for rule in layout.rules if ".lora_" in rule.source))


def config_of(settings: Mapping[str, Any], names: Iterable[str], layout: Layout, where: str) -> dict[str, Any]:
    """Content of adapter_config.json.

    Args:
      settings: fields of the decoder.
      names: of the adapters' tensors, without PEFT's prefix.
      layout: of the whole model.
      where: folder of the run or conversion, for messages.

    Raises:
      SourceError: the settings have no rank.
    """
    rank, scale = settings.get("lora_rank", 0), settings.get("lora_scale", 1.0)
    if not rank:
        raise SourceError(
            f"{where}: holds adapters, but its settings say lora_rank 0; give the folder as it was written"
        )
    alpha = scale * rank
    found = [match for name in names if (match := _PART.fullmatch(name))]
    heads, layers = {match["head"] for match in found}, sorted({match["layer"] for match in found})
    targets: str | list[str] = [layer.rpartition(".")[2] for layer in layers]
    # Short names must not reach layers outside the decoder, such as those of a vision tower.
    others = (rule.source for rule in layout.rules if not rule.source.startswith(tuple(heads)))
    whole = not any(source.endswith(tuple(f".{target}.weight" for target in targets)) for source in others)
    if not whole:
        (head,) = heads
        targets = rf"{re.escape(head)}\d+\.({'|'.join(map(re.escape, layers))})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if whole else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
    }
