"""Apply a model with its parameters inside the functions of a task."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax

from ymplug_jax.core.state import Params

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def within(model: M, params: Params, run: Callable[[M], T], key: jax.Array | None = None) -> T:
    """Return `run(model)` with bound parameters, as one `apply`: `run` may call several methods of the model.

    Args:
      model: A linen module.
      params: Its parameters.
      run: Function of the bound model.
      key: PRNG key of the collection "dropout"; every call inside draws a new one. None: deterministic.
    """
    found: Any = model.apply({"params": params}, method=run, rngs={} if key is None else {"dropout": key})
    return cast(T, found)  # flax annotates Any, or a tuple with mutable collections
