"""Full-gallery ranking by inner products: the gallery is cut over all devices, and no device ever holds the whole matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "gallery"


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
    """Ranks of the right entries, and the best entries, of every query.

    Args:
      queries: f32[N, E], unit vectors.
      gallery: f32[G, E], unit vectors.
      query_ids: int[N]; every entry of the gallery with the same id is right.
      gallery_ids: int[G].
      best: how many entries to return for each query (fewer if the gallery is smaller).
      chunk: queries at a time; a device holds chunk x G / devices similarities.
      devices: None: all there are.

    Returns:
      int[N] rank of the best right entry (1: nothing scores higher; G + 1: none is right), int[N, best] entries, best
      first, and f32[N, best] their similarities.
    """
    devices = devices or jax.devices()
    mesh = Mesh(np.array(devices), (AXIS,))
    count, best = len(gallery), min(best, len(gallery))
    pad = -count % len(devices)
    cut, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())

    def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    entries = place(np.pad(gallery.astype(np.float32), ((0, pad), (0, 0))), cut)
    ids = place(np.pad(gallery_ids.astype(np.int32), (0, pad)), cut)
    there = place(np.arange(count + pad) < count, cut)
    step = jax.jit(
        jax.shard_map(
            partial(_rank_chunk, best=min(best, (count + pad) // len(devices)), keep=best),
            mesh=mesh,
            in_specs=(P(), P(), P(AXIS), P(AXIS), P(AXIS)),
            out_specs=P(),
            check_vma=False,
        )
    )
    parts = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk].astype(np.float32)
        part_ids = query_ids[start : start + chunk].astype(np.int32)
        fill = min(chunk, len(queries)) - len(part)  # one shape for all chunks
        padded = place(np.pad(part, ((0, fill), (0, 0))), whole), place(np.pad(part_ids, (0, fill)), whole)
        out = step(*padded, entries, ids, there)
        parts.append([np.asarray(x)[: len(part)] for x in out])
    ranks, order, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ranks, order, similarity


def _rank_chunk(queries, query_ids, gallery, gallery_ids, there, *, best: int, keep: int):
    """One chunk on one device's share: f32[C, E], int32[C], f32[g, E], int32[g], bool[g]."""
    scores = jnp.einsum("ce,ge->cg", queries, gallery, precision="highest")
    scores = jnp.where(there, scores, -jnp.inf)
    same = (query_ids[:, None] == gallery_ids) & there
    right = jax.lax.pmax(jnp.where(same, scores, -jnp.inf).max(axis=1), AXIS)  # [C]
    above = jax.lax.psum(jnp.sum(scores > right[:, None], axis=1), AXIS)
    values, here = jax.lax.top_k(scores, best)
    here = here + jax.lax.axis_index(AXIS) * gallery.shape[0]
    values, here = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (values, here))  # [C, devices * best]
    values, pick = jax.lax.top_k(values, keep)
    return above + 1, jnp.take_along_axis(here, pick, axis=1), values
