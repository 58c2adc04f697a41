"""The decoders by name: the only file that imports all of them. A further decoder is one more line in `TABLE`."""

from typing import Any, NamedTuple

from ymplug_jax.core.sharding import AxisRules
from ymplug_jax.models import bloom, gpt3, qwen
from ymplug_jax.models.language_model import LanguageModel


class Kind(NamedTuple):
    """One decoder."""

    module: type[Any]  # a `LanguageModel`; its fields are its settings
    axes: AxisRules  # axis words of its parameters
    sizes: dict[str, LanguageModel]  # its named sizes


TABLE = {
    "gpt3": Kind(gpt3.GPT3, gpt3.AXES, gpt3.SIZES),
    "bloom": Kind(bloom.Bloom, bloom.AXES, bloom.SIZES),
    "qwen": Kind(qwen.Qwen, qwen.AXES, qwen.SIZES),
}
KINDS = {name: kind.module for name, kind in TABLE.items()}
SIZES = {size: lm for kind in TABLE.values() for size, lm in kind.sizes.items()}


def kind_of(lm: LanguageModel) -> str:
    """Name of a decoder's kind."""
    return next(name for name, module in KINDS.items() if isinstance(lm, module))


def axes_of(lm: LanguageModel) -> AxisRules:
    """Axis words of a decoder's parameters by path."""
    return TABLE[kind_of(lm)].axes
