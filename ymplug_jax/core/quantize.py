"""Frozen matrices in eight bits: a scale for each output channel of each layer, made when a run starts.

Checkpoints keep what was quantised. The layer scan hands a block its own slice, and only where a layer reads it (`matrix`,
`promote`) does it become a matrix of the computation's type again: one layer at a time, gone when the layer is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.dtypes import promote_dtype
from jax.sharding import NamedSharding, PartitionSpec

from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.sharding import AxisRules
from ymplug_jax.core.state import Params

STORED = "bfloat16"  # in checkpoints, and what is not a stacked matrix


@struct.dataclass
class Quantized:
    """values * scale stands where a parameter stood. It is no array: layers read it through `matrix` or `promote`."""

    values: jax.Array  # int8, the parameter's shape
    scale: jax.Array  # bfloat16, 1 along the axes that a product sums over

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """int8."""
        return self.values.dtype

    @property
    def sharding(self) -> Any:
        """Of the values; the scale is cut like them where it is not 1."""
        return self.values.sharding


def matrix(x: jax.Array | Quantized) -> jax.Array:
    """A parameter as an array, in bfloat16 if it is held in eight bits."""
    return x.values.astype(x.scale.dtype) * x.scale if isinstance(x, Quantized) else x


def promote(*arrays: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """`flax.linen.dtypes.promote_dtype` of arrays of which some may be held in eight bits: for the field of flax's layers."""
    return promote_dtype(*map(matrix, arrays), dtype=dtype, inexact=inexact)


def abstract(frozen: Params, axes: AxisRules) -> Params:
    """The tree of `hold` from placed abstract leaves."""

    def one(leaf: jax.ShapeDtypeStruct, over: tuple[int, ...]) -> Quantized:
        shape = tuple(1 if axis in over else size for axis, size in enumerate(leaf.shape))
        names = (*leaf.sharding.spec, *(None,) * (len(shape) - len(leaf.sharding.spec)))
        spec = PartitionSpec(*(None if axis in over else name for axis, name in enumerate(names)))
        return Quantized(
            state_lib.stand_in(leaf.shape, jnp.int8, leaf.sharding),
            state_lib.stand_in(shape, jnp.bfloat16, NamedSharding(leaf.sharding.mesh, spec)),
        )

    return _map(one, frozen, axes)


def hold(frozen: Params, axes: AxisRules) -> Params:
    """Stacked matrices of a tree of arrays as `Quantized`; until the caller lets go of the arrays, both are there."""
    return _map(jax.jit(_quantize, static_argnums=1), frozen, axes)


def _quantize(x: jax.Array, over: tuple[int, ...]) -> Quantized:
    """Nearest multiples of a 127th of each channel's largest value."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=over, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0).astype(jnp.bfloat16)
    values = jnp.clip(jnp.round(x.astype(jnp.float32) / scale.astype(jnp.float32)), -127, 127)
    return Quantized(values.astype(jnp.int8), scale)


def _map(one: Callable[[Any, tuple[int, ...]], Quantized], frozen: Mapping[str, Any], axes: AxisRules) -> Params:
    flat = state_lib.flatten(frozen)
    chosen = {path: _summed(sharding.axis_words(path, axes)) for path in flat}
    return state_lib.unflatten({path: one(leaf, chosen[path]) if chosen[path] else leaf for path, leaf in flat.items()})


def _summed(words: tuple[str, ...]) -> tuple[int, ...]:
    """Axes that the product of a stacked matrix sums over: embed where it comes in first, else all that come before it. Empty:
    no stacked matrix."""
    if words[:1] != ("layers",) or len(words) < 3 or "embed" not in words:
        return ()
    return (1,) if words[1] == "embed" else tuple(range(1, len(words) - 1))
