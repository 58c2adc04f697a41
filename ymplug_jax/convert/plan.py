"""What a map file gives: the layouts of its model, and what a source turned out to be."""

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
    *(
        "__init__",
        "__main__",
        "chat_check",
        "check",
        "lora",
        "oracles",
        "plan",
        "rules",
        "store",
        "to_orbax",
        "to_torch",
    ),
    *("torch_file", "torch_script", "tensor_file", "source_files", "pieces", "leaves", "hub_config"),
)
MODELS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _BESIDE)


class Layout(NamedTuple):
    """How one code base names a model's tensors."""

    rules: tuple[Rule, ...]
    drop: tuple[str, ...] = ()  # regexes of names that are known and not wanted
    tied: tuple[tuple[str, str], ...] = ()  # (copy, original): equal where both are there, stored once
    zeros: tuple[tuple[str, str], ...] = ()  # (name, other): not stored, written back as zeros of the other's shape


class Plan(NamedTuple):
    """A model recognised by its tensors."""

    layout: str  # one of LAYOUTS
    like: Mapping[str, Any]  # nested ShapeDtypeStructs
    model: nn.Module | tuple[nn.Module, ...]  # the modules that have these parameters


class UnknownModel(exits.Mistake):
    """Tensors that are not those of the model that was named."""


def map_of(model: str) -> ModuleType:
    """The map file of a model: LAYOUTS (name -> Layout), plan(shapes, heads) -> Plan, and where they apply RENAME and MERGE
    (see `Source`), RESIZE (path -> function, see `load_params`) and FROZEN (path regexes). With MODEL_TYPES (names of model_type)
    `plan` also takes the config.json beside the weights, see `hub_config`; config_of(settings) writes one.
    """
    return importlib.import_module(f"ymplug_jax.convert.{model}")


def extra(module: ModuleType, name: str, empty: Any = MappingProxyType({})) -> Any:
    """An optional constant of a map file."""
    return getattr(module, name, empty)


def layers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Number of layers: one more than the highest index in names that match, e.g. r"blocks\\.(\\d+)\\."."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def need(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """Shape of a tensor that the model cannot be without.

    Raises:
      UnknownModel: it is not there.
    """
    if name not in shapes:
        some = ", ".join(list(shapes)[:4])
        raise UnknownModel(f"the source has no {name}, so it is another model; its first tensors are {some}")
    return shapes[name]


def heads_of(kind: str, width: int, known: Mapping[int, int], heads: Mapping[str, int]) -> int:
    """Attention heads, which no shape tells: those of the known widths, or given.

    Raises:
      UnknownModel: neither, or the width is no multiple of them.
    """
    count = heads.get(kind) or known.get(width)
    if not count:
        sizes = ", ".join(map(str, known))
        raise UnknownModel(f"{kind} of width {width}: heads unknown (known widths: {sizes}); give --heads {kind}=N")
    if width % count:
        raise UnknownModel(f"{kind} of width {width} cannot have {count} heads; give --heads {kind}=N")
    return count
