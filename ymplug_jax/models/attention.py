"""Attention: of a row to itself or to others, of patches over frames, and of branches to a shared past.

Logits and softmax are float32 everywhere; in half precision a single kernel computes them where there is one for the device.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ymplug_jax.core import sharding
from ymplug_jax.models import kernels

HALF = ("bfloat16", "float16")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention; every attention but that of branches and of frames goes through here.

    In half precision, without mask, bias and dropout, it is one kernel: ours on TPU, cuDNN's on NVIDIA (through JAX). Logits and
    softmax are float32 everywhere.

    Args:
      q: f[B, L, N, H].
      k: f[B, S, N, H].
      v: f[B, S, N, H].
      causal: query i sees keys 0..i (needs L == S).
      mask: bool, broadcastable to [B, N, L, S]; True where a query sees a key. A query that sees none sees all alike.
      bias: f32, broadcastable to [B, N, L, S]; added to the logits.
      dropout: rate on the probabilities; applied only if `key` is given.
      key: randomness of the dropout.

    Returns:
      f[B, L, N, H] in the type of `v`.
    """
    if bias is None and mask is None and (key is None or dropout == 0) and v.dtype in HALF:
        if sharding.computes_on("tpu") and kernels.heads_a_block(q.shape[2], q.shape[1], k.shape[1], q.shape[3]):
            run = partial(kernels.attention, causal=causal)
            return sharding.by_device(run, q, k, v, axes=("batch", None, "tensor", None))
        if sharding.computes_on("nvidia") and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    logits = jnp.einsum("blnh,bsnh->bnls", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if causal:
        past = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
        mask = past if mask is None else mask & past
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if key is not None and dropout > 0:
        weights = jnp.where(jax.random.bernoulli(key, 1 - dropout, weights.shape), weights / (1 - dropout), 0)
    return jnp.einsum("bnls,bsnh->blnh", weights.astype(v.dtype), v)


def attend_frames(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Attention of every patch to itself in the other frames: f[B, T, P, D] -> f[B, T, P, D], heads side by side.

    T is small: one kernel on TPU in half precision; elsewhere logits [B, T, T, N, P] from operands as they lie, without copies
    that bring the frames together. Logits and softmax are float32.
    """
    d = q.shape[-1]
    if v.dtype in HALF and sharding.computes_on("tpu"):

        def run(*parts: jax.Array) -> jax.Array:
            return kernels.over_frames(*parts, heads * parts[0].shape[-1] // d)

        cut = "tensor" if heads % sharding.parts("tensor") == 0 else None
        return sharding.by_device(run, q, k, v, axes=("batch", None, None, cut))
    q, k, v = (x.reshape(*x.shape[:-1], heads, d // heads) for x in (q, k, v))  # [B, T, P, N, H]
    logits = jnp.einsum("btpnh,bspnh->btsnp", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=2).astype(v.dtype)  # [B, T, S, N, P], S the frame that is seen
    y = jnp.einsum("btsnp,bspnh->btpnh", weights, v)
    return y.reshape(*y.shape[:-2], d)  # [B, T, P, D]


def attend_branches(
    q: jax.Array,
    past: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    past_mask: jax.Array,
    own_mask: jax.Array,
) -> jax.Array:
    """Attention of several branches to a past that they share and to what each has read by itself; nothing is copied per branch.

    Args:
      q: f[B, K, L, N, H], K branches.
      past: keys and values f[B, S, N, H].
      own: keys and values f[B, K, W, N, H].
      past_mask: bool[B, S], True where the past is seen.
      own_mask: bool[L, W], True where a query sees a key of its own branch.

    Returns:
      f[B, K, L, N, H]; logits and softmax are float32.
    """
    scale, lowest = q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min
    shared = jnp.einsum("bklnh,bsnh->bknls", q, past[0], preferred_element_type=jnp.float32) * scale
    shared = jnp.where(past_mask[:, None, None, None], shared, lowest)  # [B, K, N, L, S]
    mine = jnp.einsum("bklnh,bkwnh->bknlw", q, own[0], preferred_element_type=jnp.float32) * scale
    mine = jnp.where(own_mask, mine, lowest)  # [B, K, N, L, W]
    weights = jax.nn.softmax(jnp.concatenate([shared, mine], axis=-1), axis=-1).astype(q.dtype)
    split = past[0].shape[1]
    y = jnp.einsum("bknls,bsnh->bklnh", weights[..., :split], past[1])
    return y + jnp.einsum("bknlw,bkwnh->bklnh", weights[..., split:], own[1])
