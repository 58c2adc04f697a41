"""Full-gallery ranking by inner products. The gallery is sharded over all devices; no device holds the whole similarity matrix."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ymplug_jax.tasks.common import task_metrics

AXIS = "gallery"
WIDE = 128  # entries per group in `_largest`


def rank(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    *,
    best: int = 10,
    chunk: int = 1024,
    devices: list | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank of the correct entry and the best entries for every query.

    Args:
      queries: f32[N, E], unit vectors.
      gallery: f32[G, E], unit vectors.
      query_ids: int[N]; every gallery entry with the same id is correct.
      gallery_ids: int[G].
      best: Number of entries to return per query (fewer if the gallery is smaller).
      chunk: Queries per step; a device holds chunk x G / devices similarities.
      devices: Devices to use; None: all devices.

    Returns:
      int[N], the rank of the best correct entry: 1 + the number of wrong entries with an equal or higher similarity, or G + 1
      if no entry is correct; int[N, best], the best entries in descending order, ties by lower number; and f32[N, best],
      their similarities.

    Raises:
      ValueError: There are no queries or no gallery entries.
      Mistake: A vector or a similarity is not finite.
    """
    if not len(queries) or not len(gallery):
        raise ValueError(f"{len(queries)} queries and {len(gallery)} entries in the gallery; give at least one of each")
    task_metrics.check_finite(queries, "the query's vector", "query {}".format)
    task_metrics.check_finite(gallery, "the entry's vector", "entry {} of the gallery".format)
    devices = devices or jax.devices()
    count, best = len(gallery), min(best, len(gallery))
    pad = -count % (WIDE * len(devices))
    mesh, step = _program(tuple(devices), min(best, (count + pad) // len(devices)), best)
    cut, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())

    def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    entries = place(np.pad(gallery.astype(np.float32), ((0, pad), (0, 0))), cut)
    ids = place(np.pad(gallery_ids.astype(np.int32), (0, pad)), cut)
    there = place(np.arange(count + pad) < count, cut)
    parts = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk].astype(np.float32)
        part_ids = query_ids[start : start + chunk].astype(np.int32)
        fill = min(chunk, len(queries)) - len(part)  # all chunks have one shape and compile once
        padded = place(np.pad(part, ((0, fill), (0, 0))), whole), place(np.pad(part_ids, (0, fill)), whole)
        out = step(*padded, entries, ids, there)
        parts.append([np.asarray(x)[: len(part)] for x in out])
    ranks, order, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    task_metrics.check_finite(
        similarity, "the similarity", "query {}".format
    )  # products of finite vectors may overflow
    return ranks, order, similarity


@cache
def _program(devices: tuple, best: int, keep: int) -> tuple[Mesh, Callable]:
    """The mesh and the jitted step of one chunk, cached so that a gallery of the same shape does not recompile."""
    mesh = Mesh(np.array(devices), (AXIS,))
    return mesh, jax.jit(
        jax.shard_map(
            partial(_rank_chunk, best=best, keep=keep),
            mesh=mesh,
            in_specs=(P(), P(), P(AXIS), P(AXIS), P(AXIS)),
            out_specs=P(),
            check_vma=False,
        )
    )


def _rank_chunk(
    queries: jax.Array,
    query_ids: jax.Array,
    gallery: jax.Array,
    gallery_ids: jax.Array,
    there: jax.Array,
    *,
    best: int,
    keep: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rank one chunk of C queries against one device's shard of g entries: f32[C, E], int32[C], f32[g, E], int32[g], bool[g]."""
    # Queries are on the minor axis: XLA vectorises reductions over the major axis.
    scores = jnp.einsum("ge,ce->gc", gallery, queries, precision="highest")  # [g, C]
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k orders -0.0 below 0.0
    scores = jnp.where(there[:, None], scores, -jnp.inf)
    same, there = query_ids == gallery_ids[:, None], there[:, None]
    right = jax.lax.pmax(jnp.where(same & there, scores, -jnp.inf).max(axis=0), AXIS)  # [C]
    ahead = jax.lax.psum(jnp.sum(~same & there & (scores >= right), axis=0), AXIS)
    values, here = _largest(scores, best)
    here = here + jax.lax.axis_index(AXIS) * gallery.shape[0]
    values, here = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (values, here))  # [C, devices * best]
    values, pick = jax.lax.top_k(values, keep)
    return ahead + 1, jnp.take_along_axis(here, pick, axis=1), values


def _largest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values of every column and their rows, ties by lower row: f[g, C] -> [C, k] each.

    As `models.decode_sampling.top_k` along the major axis: it sorts only the maxima of groups of 128 rows, then the k best groups.
    """
    groups, width = scores.shape[0] // WIDE, scores.shape[1]
    if groups <= 2 * k:
        return jax.lax.top_k(scores.T, k)
    cut = scores.reshape(groups, WIDE, width)
    chosen = jnp.sort(
        jax.lax.top_k(cut.max(axis=1).T, k)[1], axis=-1
    )  # [C, k], in row order, so that ties stay in order
    column = jnp.arange(width)[:, None, None]
    few = cut[chosen[:, :, None], jnp.arange(WIDE), column].reshape(width, k * WIDE)
    values, place = jax.lax.top_k(few, k)
    return values, jnp.take_along_axis(chosen, place // WIDE, axis=-1) * WIDE + place % WIDE
