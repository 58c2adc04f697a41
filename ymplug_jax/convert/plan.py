"""What a source turned out to be: the rules to read it by, and the parameters that come of it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ymplug_jax.convert.rules import Rule


class Plan(NamedTuple):
    """A model recognised by its tensors."""

    rules: tuple[Rule, ...]
    like: Mapping[str, Any]  # nested ShapeDtypeStructs
    drop: tuple[str, ...]  # regexes of names that are known and not wanted


class UnknownModel(ValueError):
    """Tensors that are not those of the model that was named."""


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
      UnknownModel: neither.
    """
    count = heads.get(kind) or known.get(width)
    if not count:
        sizes = ", ".join(map(str, known))
        raise UnknownModel(f"{kind} of width {width}: heads unknown (known widths: {sizes}); give --heads {kind}=N")
    return count
