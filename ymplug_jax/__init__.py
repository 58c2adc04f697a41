"""Train, evaluate and serve the Youku-mPLUG family of Chinese video-language models in JAX.

`load` opens a trained run for use in Python; see `ymplug_jax.api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ymplug_jax.api import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load`, imported at its first use: `import ymplug_jax` imports neither JAX nor anything else that is heavy."""
    if name == "load":
        from ymplug_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
