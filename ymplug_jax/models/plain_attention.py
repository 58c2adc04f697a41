"""Attention in plain XLA, the definition that the fused kernels are compared with.

Rows of up to `WHOLE` queries are one array of logits. Longer rows are computed in blocks of queries, each with the keys that a
causal query of the block can see, and the backward pass recomputes a block's logits. So no array [B, N, L, S] exists. Without
causality all blocks are alike and run in a loop, so that the logits of only one block exist at a time.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

WHOLE = 1024  # largest number of queries that are computed at once
BLOCK = 512  # number of queries of a block in longer rows


_UNDIVIDED: ContextVar[bool] = ContextVar("long rows are not divided into blocks", default=False)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Compute rows of any length at once in programs traced inside, for counts of FLOPs without recomputation."""
    token = _UNDIVIDED.set(True)
    try:
        yield
    finally:
        _UNDIVIDED.reset(token)


class Given(NamedTuple):
    """The optional arguments of `attention.attend`, which describes them."""

    causal: bool
    mask: jax.Array | None
    key_mask: jax.Array | None
    slopes: jax.Array | None
    key_positions: jax.Array | None
    bias: jax.Array | None
    segments: jax.Array | None
    dropout: float
    key: jax.Array | None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: Given) -> jax.Array:
    """See `attention.attend`; the results at padding of packed rows are finite."""
    length, keys = q.shape[1], k.shape[1]
    if length <= WHOLE or _UNDIVIDED.get():
        own = None if given.segments is None else (given.segments, given.segments)
        return _block(q, k, v, given, jnp.tri(length, keys, dtype=bool), own)
    alike = all(x is None or x.ndim < 2 or x.shape[-2] == 1 for x in (given.mask, given.bias))
    if alike and not given.causal and given.segments is None:
        return _in_turn(q, k, v, given)
    return jnp.concatenate([_rows(q, k, v, given, start) for start in range(0, length, BLOCK)], axis=1)


def _in_turn(q: jax.Array, k: jax.Array, v: jax.Array, given: Given) -> jax.Array:
    """Blocks of queries that all see the same keys, one after the other in both passes."""
    b, length, heads, width = q.shape
    count = -(-length // BLOCK)
    size = -(-length // count)
    padded = jnp.pad(q, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, count, size, heads, width), 1, 0)  # [blocks, B, size, N, H]
    every = jnp.ones((size, k.shape[1]), bool)

    def run(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, q = block
        key = None if given.key is None else jax.random.fold_in(given.key, number)
        return _block(q, k, v, given._replace(key=key), every, None)

    out = jax.lax.map(jax.checkpoint(run), (jnp.arange(count), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * size, heads, v.shape[-1])[:, :length]


def _rows(q: jax.Array, k: jax.Array, v: jax.Array, given: Given, start: int) -> jax.Array:
    """The queries from `start` on, one block of them; their logits are recomputed in the backward pass."""
    length, keys = q.shape[1], k.shape[1]
    stop = min(start + BLOCK, length)
    # A query that sees no key attends to all keys, so keys can only be left out if every query sees one: itself.
    ends = given.causal and given.mask is None and given.key_mask is None
    seen = min(stop, keys) if ends else keys

    def cut(x: jax.Array | None) -> jax.Array | None:
        """The block's part of an array that broadcasts to [B, N, L, S]."""
        if x is None:
            return None
        x = x[..., start:stop, :] if x.ndim > 1 and x.shape[-2] == length else x
        return x[..., :seen] if x.shape[-1] == keys else x

    part = given._replace(
        mask=cut(given.mask), bias=cut(given.bias), key_mask=_first(given.key_mask, seen),
        key_positions=_first(given.key_positions, seen), segments=None,
        key=None if given.key is None else jax.random.fold_in(given.key, start),
    )  # fmt: skip
    own = None if given.segments is None else (given.segments[:, start:stop], given.segments[:, :seen])
    causal = jnp.arange(seen) <= jnp.arange(start, stop)[:, None]

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _block(q, k, v, part, causal, own)

    return jax.checkpoint(run)(q[:, start:stop], k[:, :seen], v[:, :seen])


def _first(x: jax.Array | None, count: int) -> jax.Array | None:
    return None if x is None else x[:, :count]


def _block(
    q: jax.Array, k: jax.Array, v: jax.Array, given: Given, causal: jax.Array, own: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Attention of f[B, L, N, H] to f[B, S, K, H]; `causal` is bool[L, S], `own` the segments int[B, L] and int[B, S]."""
    b, length, heads, width = q.shape
    keys, groups = k.shape[1:3]
    if groups == heads:
        logits = jnp.einsum("blnh,bsnh->bnls", q, k, preferred_element_type=jnp.float32)
    else:
        split = q.reshape(b, length, groups, heads // groups, width)  # [B, L, K, N / K, H]
        logits = jnp.einsum("blkgh,bskh->bkgls", split, k, preferred_element_type=jnp.float32)
        logits = logits.reshape(b, heads, length, keys)
    logits = logits * width**-0.5
    if given.slopes is not None and given.key_positions is not None:
        logits = logits + (given.slopes[:, None] * given.key_positions[:, None].astype(jnp.float32))[:, :, None]
    if given.bias is not None:
        logits = logits + given.bias
    seen = [] if given.mask is None else [given.mask]
    if given.causal:
        seen.append(causal)
    if given.key_mask is not None:
        seen.append(given.key_mask.astype(bool)[:, None, None])
    if own is not None:
        seen.append((own[0][:, :, None] == own[1][:, None])[:, None])
    if seen:
        logits = jnp.where(reduce(jnp.logical_and, seen), logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if given.key is not None and given.dropout > 0:
        kept = jax.random.bernoulli(given.key, 1 - given.dropout, weights.shape)
        weights = jnp.where(kept, weights / (1 - given.dropout), 0)
    weights = weights.astype(v.dtype)
    if groups == heads:
        return jnp.einsum("bnls,bsnh->blnh", weights, v)
    weights = weights.reshape(b, groups, heads // groups, length, keys)
    return jnp.einsum("bkgls,bskh->blkgh", weights, v).reshape(q.shape)
