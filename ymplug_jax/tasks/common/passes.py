"""A model's pass inside a task's function."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax

from ymplug_jax.core.state import Params

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def within(model: M, params: Params, run: Callable[[M], T], key: jax.Array | None = None) -> T:
    """`run(model)` with parameters, as one `apply`: `run` may call several methods of the model.

    Args:
      model: a linen module.
      params: its parameters.
      run: takes the model with its parameters in place.
      key: randomness "dropout"; each call inside draws anew. None: no call needs any.
    """
    found: Any = model.apply({"params": params}, method=run, rngs={} if key is None else {"dropout": key})
    return cast(T, found)  # flax: Any, or with other arguments a tuple
