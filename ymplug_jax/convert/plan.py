"""The interface of the converters, one module per model: naming schemes, and the model recognised in a source."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from flax import linen as nn

from ymplug_jax.convert.rules import Rule
from ymplug_jax.core import exits

_BESIDE = (
    *("__init__", "__main__", "check", "lora", "oracles", "plan", "rules", "store", "to_orbax", "to_torch"),
    *(
        "torch_file",
        "torch_script",
        "tensor_file",
        "source_files",
        "pieces",
        "leaves",
        "hub_config",
        "lock",
        "chat_check",
        "mplug2_check",
        "clip_video",
        "peft_layout",
        "tokenizer_copy",
    ),
)
MODELS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _BESIDE)


class Layout(NamedTuple):
    """How one code base names the tensors of a model."""

    rules: tuple[Rule, ...]
    drop: tuple[str, ...] = ()  # regexes of tensors that are ignored
    tied: tuple[tuple[str, str], ...] = ()  # (copy, original): must be equal; only the original is stored
    zeros: tuple[tuple[str, str], ...] = ()  # (name, other): not stored; written back as zeros of the other's shape


class Plan(NamedTuple):
    """A model recognised by its tensors."""

    layout: str  # one of LAYOUTS
    like: Mapping[str, Any]  # parameter tree of ShapeDtypeStructs
    model: nn.Module | tuple[nn.Module, ...]  # modules with these parameters


class UnknownModel(exits.Mistake):
    """The tensors do not belong to the model that was named."""


def map_of(model: str) -> ModuleType:
    """The converter module of a model.

    It defines `LAYOUTS` (name -> Layout) and `plan(shapes, heads)` -> Plan. Optional are:

    - `RENAME`, `MERGE` and `COPIES`: see `Source`. With copies there is no way back.
    - `RESIZE`: path -> function that resizes the parameter, see `load_params`.
    - `FROZEN`: regexes of the paths that `--dtype frozen=TYPE` casts.
    - `LACKS`: (regex of tensors that a variant of the model lacks, what to do about it).
    - `CHAT`: how `predict chat` uses the weights, which needs no other settings then; the conversion keeps their tokenizer.json.
    - `MODEL_TYPES`: values of model_type in config.json. `plan` then takes the HubConfig as third argument.
    - `config_of(settings)`: content of config.json for `--to torch`.
    """
    return importlib.import_module(f"ymplug_jax.convert.{model}")


def extra(module: ModuleType, name: str, empty: Any = MappingProxyType({})) -> Any:
    """An optional constant of a converter module."""
    return getattr(module, name, empty)


def layers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Number of layers: one more than the highest index that `pattern` captures, e.g. r"blocks\\.(\\d+)\\."."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def need(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """Shape of a tensor that the model requires.

    Raises:
      UnknownModel: the source does not have it.
    """
    if name not in shapes:
        some = ", ".join(list(shapes)[:4])
        raise UnknownModel(f"has no {name}, so it is another model; its first tensors are {some}")
    return shapes[name]


def heads_of(kind: str, width: int, known: Mapping[int, int], heads: Mapping[str, int]) -> int:
    """Number of attention heads, which no tensor's shape tells: `heads[kind]`, or the number for a known width.

    Raises:
      UnknownModel: the number is unknown, or the width is not a multiple of it.
    """
    count = heads.get(kind) or known.get(width)
    if not count:
        sizes = ", ".join(map(str, known))
        raise UnknownModel(
            f"the number of attention heads for {kind} of width {width} is unknown (known widths: {sizes}); give --heads {kind}=N"
        )
    if width % count:
        raise UnknownModel(f"width {width} of {kind} is not a multiple of {count} heads; give --heads {kind}=N")
    return count
