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
    key_mask: jax.Array | None = None,
    slopes: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    bias: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention; every attention but that of branches and of frames goes through here.

    In half precision, without mask, bias and dropout, it is one kernel: ours on TPU, cuDNN's on NVIDIA (through JAX). Logits and
    softmax are float32 everywhere.

    Args:
      q: f[B, L, N, H].
      k: f[B, S, K, H]; K divides N, and head n reads key/value head n // (N / K).
      v: f[B, S, K, H].
      causal: query i sees keys 0..i (needs L == S).
      mask: bool, broadcastable to [B, N, L, S]; True where a query sees a key. A query that sees none sees all alike.
      key_mask: bool[B, S], False at padding, which no query sees.
      slopes: f32[N]; slopes[n] * position of the key is added to the logits (ALiBi). None: no such bias.
      key_positions: int32[B, S], with `slopes`.
      bias: f32, broadcastable to [B, N, L, S]; added to the logits.
      dropout: rate on the probabilities; applied only if `key` is given.
      key: randomness of the dropout.

    Returns:
      f[B, L, N, H] in the type of `v`.
    """
    if k.shape[2] != q.shape[2]:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    if key_mask is not None:
        mask = key_mask[:, None, None] if mask is None else mask & key_mask[:, None, None]
    if slopes is not None and key_positions is not None:
        alibi = slopes[:, None, None] * key_positions[:, None, None]  # [B, N, 1, S]
        bias = alibi if bias is None else bias + alibi
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
    *,
    origin: jax.Array | None = None,
    slopes: jax.Array | None = None,
    past_positions: jax.Array | None = None,
    own_positions: jax.Array | None = None,
) -> jax.Array:
    """Attention of several branches to a past that they share and to what each has read by itself; nothing is copied per branch.

    Queries are grouped: head n reads key/value head n // (N / K).

    Args:
      q: f[B, C, L, N, H], C branches.
      past: keys and values f[B, S, K, H].
      own: keys and values f[B, C, W, K, H].
      past_mask: bool[B, S], True where the past is seen.
      own_mask: bool[L, W], True where a query sees a key of its own branch.
      origin: int32[B, C, W], the branch of the row that holds position w of branch c; None: each branch holds its own.
      slopes: f32[N]; slopes[n] * position of the key is added to the logits (ALiBi). None: no bias.
      past_positions: int32[B, S], with `slopes`.
      own_positions: int32[B, W], with `slopes`.

    Returns:
      f[B, C, L, N, H]; logits and softmax are float32.
    """
    b, c, length, n, h = q.shape
    kv_heads, width, split = own[0].shape[3], own[0].shape[2], past[0].shape[1]
    if origin is not None:
        # All branches of a row attend to the positions of all of them, as one branch would, each seeing those that are its own.
        holds = origin[:, :, None, None] == jnp.arange(c)[:, None]  # [B, C, 1, C, W]
        own_mask = (holds & own_mask[:, None]).reshape(b, 1, 1, 1, c * length, c * width)
        own = own[0].reshape(b, 1, c * width, kv_heads, h), own[1].reshape(b, 1, c * width, kv_heads, h)
    grouped = q.reshape(b, own[0].shape[1], -1, kv_heads, n // kv_heads, h)  # [B, C, L, K, G, H]
    scale, lowest = h**-0.5, jnp.finfo(jnp.float32).min
    shared = jnp.einsum("bclkgh,bskh->bckgls", grouped, past[0], preferred_element_type=jnp.float32) * scale
    mine = jnp.einsum("bclkgh,bcwkh->bckglw", grouped, own[0], preferred_element_type=jnp.float32) * scale
    if slopes is not None and past_positions is not None and own_positions is not None:
        slopes = slopes.reshape(kv_heads, -1, 1, 1)  # [K, G, 1, 1]
        if origin is not None:
            own_positions = jnp.tile(own_positions, c)  # [B, C * W]
        shared = shared + slopes * past_positions[:, None, None, None, None]
        mine = mine + slopes * own_positions[:, None, None, None, None]
    shared = jnp.where(past_mask[:, None, None, None, None], shared, lowest)  # [B, C, K, G, L, S]
    mine = jnp.where(own_mask, mine, lowest)  # [B, C, K, G, L, W]
    weights = jax.nn.softmax(jnp.concatenate([shared, mine], axis=-1), axis=-1).astype(q.dtype)
    y = jnp.einsum("bckgls,bskh->bclkgh", weights[..., :split], past[1])
    y = y + jnp.einsum("bckglw,bcwkh->bclkgh", weights[..., split:], own[1])
    return y.reshape(q.shape)
