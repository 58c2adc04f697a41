"""Int8 quantisation of frozen stacked matrices at the start of a run, with one scale per layer and output channel.

Checkpoints store the unquantised parameters. The scan over layers slices the quantised matrices, and a layer dequantises its
slice where it reads it (`matrix`, `promote`), so only one layer at a time exists in the computation's dtype. See
docs/models/language_models.md, "Frozen matrices in eight bits".
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

STORED = "bfloat16"  # dtype in checkpoints, and of frozen parameters that are not stacked matrices


@struct.dataclass
class Quantized:
    """A quantised parameter, equal to values * scale. It is not an array: layers read it through `matrix` or `promote`."""

    values: jax.Array  # int8, shape of the parameter
    scale: jax.Array  # bfloat16, size 1 along the contracted axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the stored values, int8."""
        return self.values.dtype

    @property
    def sharding(self) -> Any:
        """Sharding of the values. The scale is sharded alike on axes where its size is not 1."""
        return self.values.sharding


def matrix(x: jax.Array | Quantized) -> jax.Array:
    """Return a parameter as an array; a quantised one is dequantised to bfloat16."""
    return x.values.astype(x.scale.dtype) * x.scale if isinstance(x, Quantized) else x


def promote(*arrays: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """`flax.linen.dtypes.promote_dtype` that also accepts quantised arrays, for the `promote_dtype` field of Flax layers."""
    return promote_dtype(*map(matrix, arrays), dtype=dtype, inexact=inexact)


def abstract(frozen: Params, axes: AxisRules) -> Params:
    """Return the abstract tree of what `hold` returns, from ShapeDtypeStructs with shardings."""

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
    """Quantise the stacked matrices of a tree; those that are quantised stay as they are.

    The originals stay in memory until the caller releases them. `quantized_read` and `quantized_read.from_host` never hold both.
    """
    make = jax.jit(quantized, static_argnums=1)
    return _map(lambda leaf, over: leaf if isinstance(leaf, Quantized) else make(leaf, over), frozen, axes)


def summed_in(leaf: Quantized) -> tuple[int, ...]:
    """Return the contracted axes of a (possibly abstract) quantised parameter."""
    return tuple(axis for axis, size in enumerate(leaf.scale.shape) if size != leaf.values.shape[axis])


def quantized(x: jax.Array, over: tuple[int, ...]) -> Quantized:
    """Quantise symmetrically: round to multiples of 1/127 of the largest absolute value along the axes `over`."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=over, keepdims=True)
    scale = bfloat16_values(jnp.where(largest > 0, largest / 127, 1.0))
    values = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -127, 127)
    return Quantized(values.astype(jnp.int8), scale.astype(jnp.bfloat16))


def bfloat16_values(x: jax.Array) -> jax.Array:
    """Round to bfloat16 and return float32. XLA may leave out a cast to bfloat16 and back, but not this."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def _map(one: Callable[[Any, tuple[int, ...]], Quantized], frozen: Mapping[str, Any], axes: AxisRules) -> Params:
    flat = state_lib.flatten(frozen)
    chosen = {path: _summed(sharding.axis_words(path, axes)) for path in flat}
    return state_lib.unflatten({path: one(leaf, chosen[path]) if chosen[path] else leaf for path, leaf in flat.items()})


def _summed(words: tuple[str, ...]) -> tuple[int, ...]:
    """Return the contracted axes of a stacked matrix: "embed" if it is the first axis after "layers", else all axes before the last.
    Empty if the parameter is not a stacked matrix."""
    if words[:1] != ("layers",) or len(words) < 3 or "embed" not in words:
        return ()
    return (1,) if words[1] == "embed" else tuple(range(1, len(words) - 1))
