"""Predictions of a whole split that stay on the devices, in the dtype that the model computes in.

Encodings of videos and texts are too large for every host: the 128 visual tokens of a 1.3B model's clip are 0.5 MB in bfloat16. So the
devices hold them, cut along the rows of each batch, and whoever scores pairs takes a few rows at a time.

Memory of one device for N examples of R bytes each, on D devices along the mesh axes of the batch (data x fsdp):

    ceil(N / B) * B * R / D     B: rows of a batch

Beside it stand one batch of predictions while it is written, B * R / D, and the rows that are taken. The hosts hold none of it.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ymplug_jax.core import sharding
from ymplug_jax.core.sharding import BATCH_AXES


@dataclasses.dataclass
class KeptRows:
    """Arrays [batches, B, ...] by name; row i of the split is row i % B of batch i // B."""

    mesh: Mesh
    batches: int
    arrays: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def put(self, number: int, batch: dict[str, jax.Array]) -> None:
        """Write a batch of predictions, [B, ...] each, cut over the batch axes, as batch `number`."""
        place = NamedSharding(self.mesh, P(None, BATCH_AXES))
        for name, part in batch.items():
            if name not in self.arrays:
                empty = partial(jnp.zeros, (self.batches, *part.shape), part.dtype)
                self.arrays[name] = sharding.on_all_hosts(empty, place)
            self.arrays[name] = _write(place)(self.arrays[name], part, number)


def take(table: jax.Array, rows: jax.Array, mesh: Mesh) -> jax.Array:
    """Rows of the split on every device, under `jax.jit`: table f[batches, B, ...] of `KeptRows`, int32[...] -> f[..., *row]."""
    whole = P()
    part = jax.shard_map(_take, mesh=mesh, in_specs=(P(None, BATCH_AXES), whole), out_specs=whole, check_vma=False)
    return part(table, rows)


@cache
def _write(place: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Compiled once for a place."""
    return jax.jit(_written, donate_argnums=0, out_shardings=place)


def _written(table: jax.Array, part: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(table, part, number, 0)


def _take(part: jax.Array, rows: jax.Array) -> jax.Array:
    """On one device: part [batches, b, ...] of the arrays. A row is on one device alone, so that the sum over all is that row."""
    size = part.shape[1]
    first = jax.lax.axis_index(BATCH_AXES) * size
    batch, place = jnp.divmod(rows, size * jax.lax.axis_size(BATCH_AXES))
    here = (place >= first) & (place < first + size)
    found = part[batch, jnp.clip(place - first, 0, size - 1)]
    return jax.lax.psum(jnp.where(here.reshape(here.shape + (1,) * (part.ndim - 2)), found, 0), BATCH_AXES)


def first_not_finite(x: jax.Array) -> jax.Array:
    """The first value of each row that is no finite number, 0 where all are: f[B, ...] -> f32[B]."""
    flat = x.reshape(len(x), -1).astype(jnp.float32)
    bad = ~jnp.isfinite(flat)
    value = jnp.take_along_axis(flat, jnp.argmax(bad, axis=1)[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(bad, axis=1), value, 0)
