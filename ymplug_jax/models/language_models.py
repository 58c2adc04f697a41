"""The decoders by name. This is the only file that imports all of them; a new decoder adds one line to `_TABLE`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ymplug_jax.core.sharding import AxisRules
from ymplug_jax.models import bloom, gpt3, qwen
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


def axes_of(lm: LanguageModel) -> AxisRules:
    """Logical axes of a decoder's parameters by path."""
    return TABLE[kind_of(lm)].axes
