"""Attention within and between rows, of patches over frames, and of branches to a shared past.

Logits and softmax are float32. In half precision one fused kernel computes attention if the device has one.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from ymplug_jax.core import sharding
from ymplug_jax.models import kernels, plain_attention

HALF = ("bfloat16", "float16")
APART = 2.0**14  # difference of the unscaled logits between adjacent segments of a packed row
HIDDEN = 3e4  # subtracted from the unscaled logits of masked keys; float16 can hold it
CUDNN_WIDTH, HOPPER_WIDTH = 128, 256  # largest head size of cuDNN before and since compute capability 9.0


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
    segments: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    flat: bool = False,
) -> jax.Array:
    """Scaled dot-product attention, for all uses except branches and frames.

    In half precision, without `mask`, `bias` and dropout, one fused kernel computes it if the row fits: this package's on
    TPU, cuDNN's on NVIDIA. Elsewhere plain XLA computes long rows in blocks of queries, so that no array holds all logits of a
    row. A query that sees no key attends to all S keys alike, so its result is the mean of `v`.

    Args:
      q: f[B, L, N, H].
      k: f[B, S, K, H]; K divides N, and head n reads key/value head n // (N // K).
      v: f[B, S, K, H].
      causal: query i sees keys 0..i; needs L == S.
      mask: bool, broadcastable to [B, N, L, S]; True where a query sees a key.
      key_mask: bool[B, S], False at padding, which may stand anywhere.
      slopes: f32[N]; adds slopes[n] * key_positions[b, s] to the logits (ALiBi, Press et al., 2022).
      key_positions: int[B, S], 0 to 65535, for `slopes`.
      bias: f32, broadcastable to [B, N, L, S]; added to the logits.
      segments: int[B, L] of packed rows, L == S, rising along the row; 0 at padding, which may stand anywhere. A query sees the
        keys of its own segment only, and the result at padding is zero. Needs `causal`, and excludes `key_mask`.
      dropout: rate on the probabilities; applied only if `key` is given.
      key: random key of the dropout.
      flat: q, k and v are rows of N * H in memory, and so should the result be. Has an effect on TPU only, where a kernel can
        read heads side by side.

    Returns:
      f[B, L, N, H] in the type of `v`. `slopes` and the masks get no gradients.

    Raises:
      ValueError: K does not divide N, only one of `slopes` and `key_positions` is given, or `segments` without `causal` or with
        `key_mask`.
    """
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups:
        raise ValueError(
            f"attend: {heads} query heads are not a multiple of {groups} key/value heads; change heads or kv_heads"
        )
    if (slopes is None) != (key_positions is None):
        raise ValueError("attend: slopes and key_positions need each other; give both or neither")
    if segments is not None and (key_mask is not None or not causal):
        raise ValueError("attend: segments need causal and exclude key_mask; mark padding by segment 0")
    segments = None if segments is None else segments.astype(jnp.int32)
    slopes = None if slopes is None else jax.lax.stop_gradient(slopes.astype(jnp.float32))
    if mask is None and bias is None and (key is None or dropout == 0) and v.dtype in HALF:
        made = _in_kernel(q, k, v, causal, key_mask, slopes, key_positions, segments, flat)
        if made is not None:
            return tokens_only(made, segments)
    given = plain_attention.Given(causal, mask, key_mask, slopes, key_positions, bias, segments, dropout, key)
    return tokens_only(plain_attention.attend(q, k, v, given), segments)


def _in_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, key_mask: jax.Array | None, slopes: jax.Array | None,
    key_positions: jax.Array | None, segments: jax.Array | None, flat: bool,
) -> jax.Array | None:  # fmt: skip
    """`attend` by the device's fused kernel; None if the device has none or the row does not fit."""
    heads, groups, width = q.shape[2], k.shape[2], q.shape[3]
    given = causal, key_mask is not None, slopes is not None, segments is not None
    use = kernels.Use("", q.shape[1], k.shape[1], heads, groups, width, str(v.dtype), *given)
    if kernels.uses("tpu_rows") and kernels.block_of(heads, groups, q.shape[1], k.shape[1], width):
        block = _beside(q, k) if flat else None
        kernels.note(use._replace(kernel="tpu_rows", beside=block is not None))
        return _on_tpu(q, k, v, causal, key_mask, slopes, key_positions, segments, block)
    extra = 8 if any(given[1:]) else 0
    if kernels.uses("cudnn") and width % 8 == 0 and width + extra <= _widest():
        kernels.note(use._replace(kernel="cudnn"))
        return with_columns(q, k, v, causal, key_mask, slopes, key_positions, "cudnn", segments)
    return None


def tokens_only(y: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Zeros at the padding of packed rows: f[B, L, N, H], int[B, L] or None -> f[B, L, N, H]."""
    return y if segments is None else jnp.where((segments > 0)[..., None, None], y, 0)


def starts(segments: jax.Array) -> jax.Array:
    """Number of tokens before the first of each token's segment: int[B, L], rising, 0 at padding -> int32[B, L]."""
    token = segments > 0
    highest = jnp.pad(jax.lax.cummax(segments, axis=1), ((0, 0), (1, 0)))[:, :-1]
    before = jnp.cumsum(token, axis=1, dtype=jnp.int32) - 1
    return jax.lax.cummax(jnp.where(token & (segments > highest), before, 0), axis=1)


def _beside(q: jax.Array, k: jax.Array) -> kernels.Block | None:
    """The block of each device's shard with heads side by side; None if they cannot be."""
    parts = sharding.parts("heads")
    if q.shape[2] % parts or k.shape[2] % parts:
        return None
    return kernels.block_of(q.shape[2] // parts, k.shape[2] // parts, q.shape[1], k.shape[1], q.shape[3], beside=True)


def _on_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, key_mask: jax.Array | None, slopes: jax.Array | None,
    key_positions: jax.Array | None, segments: jax.Array | None, block: kernels.Block | None,
) -> jax.Array:  # fmt: skip
    """`kernels.attention` on each device's shard of rows and heads; `block` None chooses one there."""
    heads, groups, parts = q.shape[2], k.shape[2], sharding.parts("heads")
    if heads % parts == 0 and groups % parts and heads % math.lcm(groups, parts) == 0:
        # With fewer key/value heads than devices, repeat them, so that the query heads can be sharded.
        k, v = (jnp.repeat(x, math.lcm(groups, parts) // groups, axis=2) for x in (k, v))
    arrays: dict[str, jax.Array] = {}
    axes: list[tuple[str | None, ...]] = [("batch", None, "heads", None)] * 3
    if key_mask is not None or key_positions is not None:
        arrays["per_key"] = per_key(q.shape[0], k.shape[1], key_mask, key_positions)
        axes.append(("batch", None, None))
    if slopes is not None:
        arrays["slopes"] = slopes
        axes.append(("heads",))
    if segments is not None:
        arrays["segments"] = segments
        axes.append(("batch", None))

    def run(*parts: jax.Array) -> jax.Array:
        more = dict(zip(arrays, parts[3:], strict=True))
        keyed, slopes, segments = more.get("per_key"), more.get("slopes"), more.get("segments")
        return kernels.attention(*parts[:3], keyed, slopes, segments, causal, block=block)

    return sharding.by_device(run, q, k, v, *arrays.values(), axes=axes)


def per_key(rows: int, keys: int, key_mask: jax.Array | None, key_positions: jax.Array | None) -> jax.Array:
    """Positions and additive mask of the keys, f32[B, 2, S], for `kernels.attention`; either input may be None."""
    zeros = jnp.zeros((rows, keys), jnp.float32)
    positions = zeros if key_positions is None else key_positions.astype(jnp.float32)
    added = zeros if key_mask is None else jnp.where(key_mask.astype(bool), zeros, kernels.LOWEST)
    return jnp.stack([positions, added], axis=1)


def with_columns(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, key_mask: jax.Array | None, slopes: jax.Array | None,
    key_positions: jax.Array | None, implementation: Literal["cudnn", "xla"], segments: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """`attend` through `jax.nn.dot_product_attention`, without the array [B, N, L, S] that it needs for a bias or a mask.

    ALiBi and the key mask are products of a number of the query head and a number of the key, so they become eight more
    columns of q and k. A position is split into a multiple of 256 and a rest, and a slope into a sum of three numbers, each of
    which half precision represents exactly. In packed rows the logit of a key rises by APART with its segment: earlier segments
    fall behind a query's own by at least that, and later ones are causally hidden. Padding of packed rows gets finite results.
    """
    if key_mask is None and slopes is None and segments is None:
        return _of_even_length(q, k, v, causal, q.shape[-1] ** -0.5, implementation)
    heads, width = q.shape[2:]
    of_query, of_key = [], []  # [N] each; [B, S] each
    seen = None if key_mask is None else key_mask.astype(bool)
    if seen is not None:
        of_query.append(jnp.ones(heads))
        of_key.append(jnp.where(seen, 0, -HIDDEN))
    if slopes is not None and key_positions is not None:
        positions = key_positions if seen is None else jnp.where(seen, key_positions, 0)
        if segments is not None:  # equal differences inside a segment, and no bias against later segments
            positions = positions + starts(segments)
        rest = slopes * width**0.5  # undoes the scale, which applies to all columns
        for _ in range(3):
            # `reduce_precision` keeps XLA from computing the remainder with the unrounded number.
            part = (
                jax.lax.reduce_precision(rest, 8, 7)
                if q.dtype == jnp.bfloat16
                else jax.lax.reduce_precision(rest, 5, 10)
            )
            of_query += [part, part]
            of_key += [positions // 256 * 256, positions % 256]
            rest = rest - part
    if segments is not None:
        of_query += [jnp.full(heads, APART)] * 2
        of_key += [segments // 256 * 256, segments % 256]
    of_query += [jnp.zeros(heads)] * (8 - len(of_query))
    of_key += [jnp.zeros(k.shape[:2])] * (8 - len(of_key))
    more_q = jnp.broadcast_to(jnp.stack(of_query, -1).astype(q.dtype), (*q.shape[:3], 8))
    more_k = jnp.broadcast_to(jnp.stack(of_key, -1).astype(k.dtype)[:, :, None], (*k.shape[:3], 8))
    out = _of_even_length(
        jnp.concatenate([q, more_q], -1),
        jnp.concatenate([k, more_k], -1),
        jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 8))),
        causal,
        width**-0.5,
        implementation,
    )[..., :width]
    if seen is None:
        return out
    some = jnp.cumsum(seen, axis=1) > 0 if causal else jnp.any(seen, axis=1, keepdims=True)  # [B, L] or [B, 1]
    mean = jnp.repeat(
        jnp.mean(v, axis=1, keepdims=True, dtype=jnp.float32).astype(v.dtype), heads // v.shape[2], axis=2
    )
    return jnp.where(some[..., None, None], out, mean)


def _of_even_length(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, scale: float, implementation: Literal["cudnn", "xla"]
) -> jax.Array:
    """`jax.nn.dot_product_attention`, with one more query or key where their number is odd.

    Its cuDNN implementation has no gradient for an odd number of queries or keys, as the 197 of a frame.
    """
    (rows, length), keys = q.shape[:2], k.shape[1]
    if length % 2 == 0 and keys % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation=implementation)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    # Under a causal mask no query sees the key behind it.
    lengths = (None, None) if causal else (jnp.full(rows, length, jnp.int32), jnp.full(rows, keys, jnp.int32))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        implementation=implementation,
    )
    return out[:, :length]


def _widest() -> int:
    """Largest head size of cuDNN's fused attention on this device."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return HOPPER_WIDTH if float(capability) >= 9 else CUDNN_WIDTH


def attend_frames(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Attention of each patch over the frames.

    On TPU in half precision one kernel computes it. Elsewhere logits [B, T, T, N, P] are computed from the operands as they are
    laid out, without transposing the frames. Logits and softmax are float32.

    Args:
      q: f[B, T, P, D], heads side by side in the last axis.
      k: f[B, T, P, D].
      v: f[B, T, P, D].
      heads: N.

    Returns:
      f[B, T, P, D].
    """
    d = q.shape[-1]
    if v.dtype in HALF and kernels.uses("tpu_frames"):
        kernels.note(kernels.Use("tpu_frames", q.shape[1], q.shape[2], heads, heads, d // heads, str(v.dtype)))

        def run(*parts: jax.Array) -> jax.Array:
            return kernels.over_frames(*parts, heads * parts[0].shape[-1] // d)

        cut = "heads" if heads % sharding.parts("heads") == 0 else None
        return sharding.by_device(run, q, k, v, axes=[("batch", None, None, cut)] * 3)
    q, k, v = (x.reshape(*x.shape[:-1], heads, d // heads) for x in (q, k, v))  # [B, T, P, N, H]
    logits = jnp.einsum("btpnh,bspnh->btsnp", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=2).astype(v.dtype)  # [B, T, S, N, P], S the frame of the key
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
    """Attention of branches to their shared past and to the positions that each branch has read; no keys are copied.

    Head n reads key/value head n // (N / K).

    Args:
      q: f[B, C, L, N, H], C branches.
      past: keys and values f[B, S, K, H].
      own: keys and values f[B, C, W, K, H].
      past_mask: bool[B, S], True at visible keys of the past.
      own_mask: bool[L, W], True where a query sees a key of its own branch.
      origin: int32[B, C, W], the branch that wrote position w of branch c. None: each branch wrote its own.
      slopes: f32[N]; adds slopes[n] * position of the key to the logits (ALiBi). None adds no bias.
      past_positions: int32[B, S], for `slopes`.
      own_positions: int32[B, W], for `slopes`.

    Returns:
      f[B, C, L, N, H]; logits and softmax are float32.
    """
    b, c, length, n, h = q.shape
    kv_heads, width, split = own[0].shape[3], own[0].shape[2], past[0].shape[1]
    if origin is not None:
        # All branches of a row attend to the keys of all of them as one long row; the mask leaves each branch its own.
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
