"""The decoders by name. This is the only file that imports all of them; a new decoder adds one line to `_TABLE`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ymplug_jax.core.sharding import AxisRules
from ymplug_jax.models import bloom, gpt3, qwen, unstacked
from ymplug_jax.models.language_model import LanguageModel


class Kind(NamedTuple):
    """A kind of decoder."""

    module: type[Any]  # the `LanguageModel`, whose fields are its settings
    axes: AxisRules  # logical axes of its parameters
    sizes: Mapping[str, LanguageModel]  # its named sizes


_TABLE = (
    Kind(gpt3.GPT3, gpt3.AXES, gpt3.SIZES),
    Kind(bloom.Bloom, bloom.AXES, bloom.SIZES),
    Kind(qwen.Qwen, qwen.AXES, qwen.SIZES),
)
TABLE = {entry.module.kind: entry for entry in _TABLE}
KINDS = {name: entry.module for name, entry in TABLE.items()}
SIZES = {size: lm for kind in TABLE.values() for size, lm in kind.sizes.items()}


def kind_of(lm: LanguageModel) -> str:
    """The name of a decoder's kind."""
    return next(name for name, module in KINDS.items() if isinstance(lm, module))


def for_steps(lm: LanguageModel, params: dict) -> dict:
    """Parameters in the form from which `lm` reads one token at a time fastest: `unstacked.split` of BLOOM on one CPU.

    Call it outside `jax.jit`. On accelerators, several devices and for other decoders they stay as they are.
    """
    one_cpu = {jax.devices("cpu")[0]}
    if isinstance(lm, bloom.Bloom) and all(leaf.devices() == one_cpu for leaf in jax.tree.leaves(params)):
        return unstacked.split(params)
    return params


def axes_of(lm: LanguageModel) -> AxisRules:
    """Logical axes of a decoder's parameters by path."""
    return TABLE[kind_of(lm)].axes
