"""Attention of patches over frames as one Pallas kernel for TPU, without transposing the operands."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ymplug_jax.models.row_program import product

FRAMES = 128 * 768  # elements of one array in a block of `over_frames`; larger blocks take minutes to compile


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def over_frames(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, interpret: bool = False) -> jax.Array:
    """Attention of each patch over the frames, heads side by side in the last axis.

    There are too few frames for the matrix unit, so logits are elementwise products, which a product with a matrix of zeros and
    ones sums over each head's columns.

    Args:
      q: f[B, T, P, D].
      k: f[B, T, P, D].
      v: f[B, T, P, D].
      heads: N; head n has the columns from n * D / N on.
      interpret: run the kernel in interpreter mode on any platform, for tests.

    Returns:
      f[B, T, P, D].
    """
    return _frames_forward(q, k, v, heads, interpret)[0]


def _frames_forward(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, interpret: bool) -> tuple:
    return _call_frames(_frames_forward_kernel, (q, k, v), 1, heads, interpret)[0], (q, k, v)


def _frames_backward(heads: int, interpret: bool, saved: tuple, grad: jax.Array) -> tuple:
    return tuple(_call_frames(_frames_backward_kernel, (*saved, grad), 3, heads, interpret))


over_frames.defvjp(_frames_forward, _frames_backward)


def _call_frames(kernel: Callable[..., None], inputs: tuple, outputs: int, heads: int, interpret: bool) -> list:
    """Run one program for each row and block of patches; results beyond the last patch are discarded."""
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
    """Sum over each head's columns: f32[T, P, D], f[D, N] -> f32[T, P, N]."""
    return product(x.astype(parts.dtype), parts, 2, 0)


def _spread(x: jax.Array, parts: jax.Array) -> jax.Array:
    """Broadcast each head's number to its columns: f32[T, P, N], f[D, N] -> f32[T, P, D]."""
    return product(x.astype(parts.dtype), parts, 2, 1)


def _frame_weights(q: jax.Array, k: Any, parts: jax.Array, scale: float) -> list[jax.Array]:
    """Attention probabilities of each key frame, f32[T, P, N] each, for queries f32[T, P, D]."""
    logits = [_gather(q * k[0, s].astype(jnp.float32), parts) * scale for s in range(q.shape[0])]
    largest = functools.reduce(jnp.maximum, logits)
    weights = [jnp.exp(x - largest) for x in logits]
    total = sum(weights)
    return [x / total for x in weights]


def _frames_forward_kernel(parts: Any, q: Any, k: Any, v: Any, out: Any, *, scale: float) -> None:
    ones = parts[...]
    weights = _frame_weights(q[0].astype(jnp.float32), k, ones, scale)
    y = sum(_spread(w, ones) * v[0, s].astype(jnp.float32) for s, w in enumerate(weights))
    out[0] = y.astype(out.dtype)


def _frames_backward_kernel(
    parts: Any, q: Any, k: Any, v: Any, grad: Any, dq: Any, dk: Any, dv: Any, *, scale: float
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
