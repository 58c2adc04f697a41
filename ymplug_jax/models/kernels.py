"""Attention as single kernels for TPU (Pallas): logits and probabilities live and die in the chip's own memory.

Our rows are short (197 patches, 208 tokens, 786 keys), so a whole row fits there: no running softmax over tiles as in flash
attention (Dao et al., 2022), and one backward kernel that computes the probabilities once more.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOWEST = -1e30  # of a masked logit; finite, so that a row of masked logits stays finite
VMEM = 12 * 2**20  # bytes that one program may take: TPU v4 has 16 MiB
FRAMES = 128 * 768  # numbers of one array in a block of `over_frames`: code for larger blocks takes minutes to compile
LANES = 128


def heads_a_block(heads: int, length: int, keys: int, width: int) -> int:
    """Most heads that one block can hold, a divisor of `heads`; 0: a row is too long for the chip's own memory."""
    lanes = -(-max(width, LANES) // LANES) * LANES
    logits = 4 * 4 * (length + 8) * -(-keys // LANES) * LANES  # of one head, four arrays of float32
    each = (
        2 * 2 * (3 * length + 4 * keys) * lanes
    )  # of one head: seven arrays of two bytes, two blocks of each on their way
    return max((n for n in range(1, heads + 1) if heads % n == 0 and n * each + logits <= VMEM), default=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False, interpret: bool = False) -> jax.Array:
    """Scaled dot-product attention of whole rows.

    Args:
      q: f[B, L, N, H].
      k: f[B, S, N, H].
      v: f[B, S, N, H].
      causal: query i sees keys 0..i.
      interpret: run the kernel's steps one by one on any platform, to test it.

    Returns:
      f[B, L, N, H]. Softmax is float32; products take their operands as they come and add up in float32.
    """
    return _forward(q, k, v, causal, interpret)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, interpret: bool) -> tuple:
    out = _call(_forward_kernel, (q, k, v), (q,), causal, interpret)[0]
    return out, (q, k, v)


def _backward(causal: bool, interpret: bool, saved: tuple, grad: jax.Array) -> tuple:
    return tuple(_call(_backward_kernel, (*saved, grad), saved, causal, interpret))


attention.defvjp(_forward, _backward)


def _call(kernel: object, inputs: tuple, outputs: tuple, causal: bool, interpret: bool) -> list:
    """One program for each row and group of heads, over arrays laid out f[B, N, L, H] or f[B, N, H, L]."""
    b, length, heads, width = inputs[0].shape
    group = heads_a_block(heads, length, inputs[1].shape[1], width)
    turned = -(-width // LANES) * LANES > 1.5 * width
    there, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if turned else ((0, 2, 1, 3), (0, 2, 1, 3))

    def part(x: jax.Array) -> tuple[int, ...]:
        return (heads, width, x.shape[1]) if turned else (heads, x.shape[1], width)

    def block(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, group, *part(x)[1:]), lambda row, place: (row, place, 0, 0))

    out = pl.pallas_call(
        functools.partial(kernel, causal=causal, scale=width**-0.5, turned=turned),
        grid=(b, heads // group),
        in_specs=[block(x) for x in inputs],
        out_specs=[block(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct((b, *part(x)), x.dtype) for x in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=2**26),
        interpret=interpret,
    )(*(x.transpose(there) for x in inputs))
    return [x.transpose(back) for x in out]


def _heads(block: object, one: Callable[[jax.Array], None]) -> None:
    """Head after head of a block: a loop, since code for all of them at once takes minutes to compile."""

    def body(head: jax.Array, carry: None) -> None:
        one(head)
        return carry

    jax.lax.fori_loop(0, block.shape[1], body, None)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(q: jax.Array, k: jax.Array, turned: bool) -> jax.Array:
    """Queries (or gradients of the output) by keys (or values), f32[L, S], over H."""
    axis = 0 if turned else 1
    return _product(q, k, axis, axis)


def _mixed(weights: jax.Array, x: jax.Array, over: str, turned: bool) -> jax.Array:
    """f32[L, S] times one part of a row: over "keys" what keys have becomes what queries get, over "queries" the reverse."""
    weights, axis = weights.astype(x.dtype), 1 if over == "keys" else 0
    return _product(x, weights, 1, axis) if turned else _product(weights, x, axis, 0)


def _probabilities(q: jax.Array, k: jax.Array, causal: bool, scale: float, turned: bool) -> jax.Array:
    """f32[L, S]."""
    logits = _rows(q, k, turned) * scale
    if causal:
        query, key = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(key <= query, logits, LOWEST)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _forward_kernel(q: object, k: object, v: object, out: object, *, causal: bool, scale: float, turned: bool) -> None:
    def one(n: jax.Array) -> None:
        weights = _probabilities(q[0, n], k[0, n], causal, scale, turned)
        out[0, n] = _mixed(weights, v[0, n], "keys", turned).astype(out.dtype)

    _heads(q, one)


def _backward_kernel(
    q: object, k: object, v: object, grad: object, dq: object, dk: object, dv: object, *, causal: bool, scale: float,
    turned: bool,
) -> None:  # fmt: skip
    def one(n: jax.Array) -> None:
        query, key, g = q[0, n], k[0, n], grad[0, n]
        weights = _probabilities(query, key, causal, scale, turned)
        dv[0, n] = _mixed(weights, g, "queries", turned).astype(dv.dtype)
        dweights = _rows(g, v[0, n], turned)
        dlogits = weights * (dweights - jnp.sum(dweights * weights, axis=-1, keepdims=True)) * scale
        dq[0, n] = _mixed(dlogits, key, "keys", turned).astype(dq.dtype)
        dk[0, n] = _mixed(dlogits, query, "queries", turned).astype(dk.dtype)

    _heads(q, one)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def over_frames(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, interpret: bool = False) -> jax.Array:
    """Attention of every patch to itself in the other frames, heads side by side in the last axis: nothing is transposed.

    A few frames are far too few for the matrix unit: logits are products of vectors, summed over each head's part by a product
    with a matrix of zeros and ones.

    Args:
      q: f[B, T, P, D].
      k: f[B, T, P, D].
      v: f[B, T, P, D].
      heads: N; head n has columns n * D / N and on.
      interpret: run the kernel's steps one by one on any platform, to test it.

    Returns:
      f[B, T, P, D].
    """
    return _frames_forward(q, k, v, heads, interpret)[0]


def _frames_forward(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, interpret: bool) -> tuple:
    return _call_frames(_frames_forward_kernel, (q, k, v), 1, heads, interpret)[0], (q, k, v)


def _frames_backward(heads: int, interpret: bool, saved: tuple, grad: jax.Array) -> tuple:
    return tuple(_call_frames(_frames_backward_kernel, (*saved, grad), 3, heads, interpret))


over_frames.defvjp(_frames_forward, _frames_backward)


def _call_frames(kernel: object, inputs: tuple, outputs: int, heads: int, interpret: bool) -> list:
    """One program for each row and stretch of patches; what a stretch has beyond the last patch is thrown away."""
    b, t, patches, width = inputs[0].shape
    part = min(patches, max(FRAMES // (t * width) // 16 * 16, 16))
    block = pl.BlockSpec((1, t, part, width), lambda row, place: (row, 0, place, 0))
    parts = jnp.repeat(jnp.eye(heads, dtype=inputs[0].dtype), width // heads, axis=0)  # [D, N]
    whole = pl.BlockSpec((width, heads), lambda row, place: (0, 0))
    return pl.pallas_call(
        functools.partial(kernel, scale=(width // heads) ** -0.5),
        grid=(b, pl.cdiv(patches, part)),
        in_specs=[whole, *(block for _ in inputs)],
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=2**26),
        interpret=interpret,
    )(parts, *inputs)


def _gather(x: jax.Array, parts: jax.Array) -> jax.Array:
    """Sums over each head's columns: f32[T, P, D], f[D, N] -> f32[T, P, N]."""
    return _product(x.astype(parts.dtype), parts, 2, 0)


def _spread(x: jax.Array, parts: jax.Array) -> jax.Array:
    """Each head's number in all of its columns: f32[T, P, N], f[D, N] -> f32[T, P, D]."""
    return _product(x.astype(parts.dtype), parts, 2, 1)


def _frame_weights(q: jax.Array, k: object, parts: jax.Array, scale: float) -> list[jax.Array]:
    """Probabilities of each frame as a key, f32[T, P, N] each; q is f32[T, P, D]."""
    logits = [_gather(q * k[0, s].astype(jnp.float32), parts) * scale for s in range(q.shape[0])]
    largest = functools.reduce(jnp.maximum, logits)
    weights = [jnp.exp(x - largest) for x in logits]
    total = sum(weights)
    return [x / total for x in weights]


def _frames_forward_kernel(parts: object, q: object, k: object, v: object, out: object, *, scale: float) -> None:
    ones = parts[...]
    weights = _frame_weights(q[0].astype(jnp.float32), k, ones, scale)
    y = sum(_spread(w, ones) * v[0, s].astype(jnp.float32) for s, w in enumerate(weights))
    out[0] = y.astype(out.dtype)


def _frames_backward_kernel(
    parts: object, q: object, k: object, v: object, grad: object, dq: object, dk: object, dv: object, *, scale: float
) -> None:
    ones, query, g = parts[...], q[0].astype(jnp.float32), grad[0].astype(jnp.float32)
    weights = _frame_weights(query, k, ones, scale)
    dweights = [_gather(g * v[0, s].astype(jnp.float32), ones) for s in range(len(weights))]
    shared = sum(w * d for w, d in zip(weights, dweights, strict=True))
    total = jnp.zeros_like(query)
    for s, (w, d) in enumerate(zip(weights, dweights, strict=True)):
        wide = _spread(w * (d - shared) * scale, ones)  # [T, P, D]
        total += wide * k[0, s].astype(jnp.float32)
        dk[0, s] = jnp.sum(wide * query, axis=0).astype(dk.dtype)
        dv[0, s] = jnp.sum(_spread(w, ones) * g, axis=0).astype(dv.dtype)
    dq[0] = total.astype(dq.dtype)
