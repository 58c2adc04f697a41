"""Predictions of a whole split that stay on the devices, in the model's compute dtype.

Encodings of videos and texts are too large to gather to every host: the 128 visual tokens of one clip in the 1.3B model take 0.5 MB in
bfloat16. They are kept on the devices, sharded along the rows of each batch, and pair scoring takes a few rows at a time.

Memory per device for N examples of R bytes each and batches of B rows, on D devices along the mesh axes of the batch (data x fsdp):

    ceil(N / B) * B * R / D

Writing a batch needs B * R / D bytes more, and the rows taken for scoring are held as well. The hosts hold none of it.
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
        """Write a batch of predictions, [B, ...] each, sharded over the batch axes, as batch `number`."""
        place = NamedSharding(self.mesh, P(None, BATCH_AXES))
        for name, part in batch.items():
            if name not in self.arrays:
                empty = partial(jnp.zeros, (self.batches, *part.shape), part.dtype)
                self.arrays[name] = sharding.on_all_hosts(empty, place)
            self.arrays[name] = _write(place)(self.arrays[name], part, number)


def take(table: jax.Array, rows: jax.Array, mesh: Mesh) -> jax.Array:
    """Take rows of the split and replicate them; call it under `jax.jit`.

    Args:
      table: f[batches, B, ...], one of `KeptRows.arrays`.
      rows: int32[...], positions in the split.
      mesh: the mesh of the table.

    Returns:
      f[..., *row], the same on every device.
    """
    whole = P()
    part = jax.shard_map(_take, mesh=mesh, in_specs=(P(None, BATCH_AXES), whole), out_specs=whole, check_vma=False)
    return part(table, rows)


@cache
def _write(place: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The compiled write, cached per sharding."""
    return jax.jit(_written, donate_argnums=0, out_shardings=place)


def _written(table: jax.Array, part: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(table, part, number, 0)


def _take(part: jax.Array, rows: jax.Array) -> jax.Array:
    """`take` on one device, which holds [batches, b, ...]. Exactly one device holds each row, so the sum over devices is the row."""
    size = part.shape[1]
    first = jax.lax.axis_index(BATCH_AXES) * size
    batch, place = jnp.divmod(rows, size * jax.lax.axis_size(BATCH_AXES))
    here = (place >= first) & (place < first + size)
    found = part[batch, jnp.clip(place - first, 0, size - 1)]
    return jax.lax.psum(jnp.where(here.reshape(here.shape + (1,) * (part.ndim - 2)), found, 0), BATCH_AXES)


def first_not_finite(x: jax.Array) -> jax.Array:
    """First non-finite value of each row, 0 if the row is finite: f[B, ...] -> f32[B]."""
    flat = x.reshape(len(x), -1).astype(jnp.float32)
    bad = ~jnp.isfinite(flat)
    value = jnp.take_along_axis(flat, jnp.argmax(bad, axis=1)[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(bad, axis=1), value, 0)
