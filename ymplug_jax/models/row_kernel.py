"""Attention of whole rows as one Pallas kernel for TPU; logits and probabilities never leave VMEM.

All keys and values of a row fit into VMEM (197 patches, 208 tokens, a decoder's 2048), so there is no running softmax over
tiles of keys as in flash attention (Dao et al., 2022): a block of queries sees all keys at once, and one backward kernel
recomputes the probabilities. Short rows are a single block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ymplug_jax.core import sharding

LOWEST = -1e30  # masked logit; finite, so that a fully masked row stays finite
VMEM = 12 * 2**20  # budget of one program in bytes; TPU v4 has 16 MiB
LARGE_VMEM = 48 * 2**20  # budget for rows in several blocks since TPU v5, which has 64 MiB or more
SMALL = ("TPU v2", "TPU v3", "TPU v4")  # device kinds that are limited to VMEM bytes
LANES = 128


class Block(NamedTuple):
    """The part of a row that one program computes."""

    groups: int  # number of key/value heads, each with its query heads
    queries: int  # number of queries; all of the row, or a multiple of LANES


def block_of(heads: int, groups: int, length: int, keys: int, width: int) -> Block | None:
    """The largest block that fits into VMEM; whole rows are preferred.

    Args:
      heads: N, query heads.
      groups: K, key/value heads; divides N.
      length: L, queries.
      keys: S.
      width: H.

    Returns:
      None if not even one head with LANES queries fits: above about 2200 keys on TPU v4 and 9000 since v5, at H = 128.
    """
    lanes, ratio = -(-max(width, LANES) // LANES) * LANES, heads // groups
    large = VMEM if sharding.device_kind().startswith(SMALL) else LARGE_VMEM
    parts = [n * LANES for n in (4, 2, 1) if n * LANES < length]
    for queries, budget in ((length, VMEM), *((part, large) for part in parts)):
        logits = 4 * 4 * (queries + 8) * -(-keys // LANES) * LANES  # of one head, four float32 arrays
        # Of one head: seven arrays of two bytes, double-buffered.
        each = 2 * 2 * (3 * ratio * queries + 4 * keys) * lanes
        if queries < length or ratio > 1:
            each += 2 * 4 * keys * lanes  # accumulated gradients of keys and values
        if fits := [n for n in range(1, groups + 1) if groups % n == 0 and n * each + logits <= budget]:
            return Block(max(fits), queries)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    per_key: jax.Array | None = None,
    slopes: jax.Array | None = None,
    causal: bool = False,
    interpret: bool = False,
    block: Block | None = None,
) -> jax.Array:
    """Scaled dot-product attention with all keys of a row in VMEM.

    Args:
      q: f[B, L, N, H].
      k: f[B, S, K, H]; K divides N.
      v: f[B, S, K, H].
      per_key: f32[B, 2, S], of each key its position (see `slopes`) and the number added to its logits: 0, or LOWEST to mask
        it. None masks no key. Has no gradient.
      slopes: f32[N]; adds slopes[n] * per_key[b, 0, s] to the logits (ALiBi). Needs `per_key`, has no gradient.
      causal: query i sees keys 0..i. A query that sees no key attends to all alike.
      interpret: run the kernel in interpreter mode on any platform, for tests.
      block: the part of a row that one program computes. None means that of `block_of`.

    Returns:
      f[B, L, N, H]. Softmax is float32; matrix products keep the type of their operands and accumulate in float32.
    """
    return _forward(q, k, v, per_key, slopes, causal, interpret, block)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, per_key: jax.Array | None, slopes: jax.Array | None, causal: bool,
    interpret: bool, block: Block | None,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    saved = (q, k, v, per_key, slopes)
    return _call(_forward_kernel, saved, (), causal, interpret, block)[0], saved


def _backward(causal: bool, interpret: bool, block: Block | None, saved: tuple, grad: jax.Array) -> tuple:
    return (*_call(_backward_kernel, saved, (grad,), causal, interpret, block), None, None)


attention.defvjp(_forward, _backward)


class _Row(NamedTuple):
    """Static settings of the kernels."""

    causal: bool
    scale: float
    turned: bool  # blocks are laid out [H, L] instead of [L, H]
    block: Block
    ratio: int  # number of query heads of each key/value head
    blocks: int  # number of blocks of queries
    positions: bool  # slopes are given
    masked: bool  # per_key is given

    def group(self, n: jax.Array) -> jax.Array:
        """Key/value head of a query head. Pallas lowers `//`, which rounds by the sign, for known TPUs only; hence `div`."""
        return n if self.ratio == 1 else jax.lax.div(n, jnp.int32(self.ratio))


def _call(
    kernel: Callable[..., None], saved: tuple, grads: tuple, causal: bool, interpret: bool, block: Block | None
) -> list[jax.Array]:
    """Run one program for each row, group of heads and block of queries, over arrays f[B, N, L, H] or f[B, N, H, L]."""
    q, k, v, per_key, slopes = saved
    b, length, heads, width = q.shape
    keys, groups = k.shape[1:3]
    block = block or block_of(heads, groups, length, keys, width)
    if block is None:
        raise ValueError(
            f"attention: {length} queries and {keys} keys do not fit into VMEM; use `attention.attend`, which checks this"
        )
    blocks, ratio = pl.cdiv(length, block.queries), heads // groups
    turned = -(-width // LANES) * LANES > 1.5 * width
    there, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if turned else ((0, 2, 1, 3), (0, 2, 1, 3))
    row = _Row(causal, width**-0.5, turned, block, ratio, blocks, slopes is not None, per_key is not None)

    def part(positions: int) -> tuple[int, int]:
        return (width, positions) if turned else (positions, width)

    queries = pl.BlockSpec(
        (1, block.groups * ratio, *part(block.queries)),
        lambda row, place, i: (row, place, 0, i) if turned else (row, place, i, 0),
    )
    whole = pl.BlockSpec((1, block.groups, *part(keys)), lambda row, place, i: (row, place, 0, 0))
    # Pad queries to whole blocks with zeros, which add nothing to the gradients of keys; their results are cut off.
    beyond = ((0, 0), (0, blocks * block.queries - length), (0, 0), (0, 0))
    wide = [jnp.pad(x, beyond) if beyond[1][1] else x for x in (q, *grads)]
    inputs, specs = (
        [x.transpose(there) for x in (wide[0], k, v, *wide[1:])],
        [queries, whole, whole, *(queries for _ in grads)],
    )
    if per_key is not None:
        inputs.append(per_key)
        specs.append(pl.BlockSpec((1, 2, keys), lambda row, place, i: (row, 0, 0)))
    if slopes is not None:
        inputs.append(slopes)
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    results = [(wide[0], queries), (k, whole), (v, whole)] if grads else [(wide[0], queries)]
    summed = bool(grads) and (blocks > 1 or ratio > 1)
    out = pl.pallas_call(
        functools.partial(kernel, row=row),
        grid=(b, groups // block.groups, blocks),
        in_specs=specs,
        out_specs=[spec for _, spec in results],
        out_shape=[jax.ShapeDtypeStruct(tuple(x.shape[axis] for axis in there), x.dtype) for x, _ in results],
        scratch_shapes=[pltpu.VMEM((block.groups, *part(keys)), jnp.float32)] * 2 if summed else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if summed else "parallel"), vmem_limit_bytes=2**26
        ),
        interpret=interpret,
    )(*inputs)
    out = [x.transpose(back) for x in out]
    return [out[0][:, :length], *out[1:]]


def _heads(count: int, one: Callable[[jax.Array], None]) -> None:
    """Loop over the heads of a block; unrolled code takes minutes to compile."""

    def body(head: jax.Array, carry: None) -> None:
        one(head)
        return carry

    jax.lax.fori_loop(0, count, body, None)


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Matrix product over one axis of each operand, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(q: jax.Array, k: jax.Array, turned: bool) -> jax.Array:
    """Products over H of queries (or output gradients) with keys (or values), f32[L, S]."""
    axis = 0 if turned else 1
    return product(q, k, axis, axis)


def _mixed(weights: jax.Array, x: jax.Array, over: str, turned: bool) -> jax.Array:
    """Sum `x` of the keys for each query with weights f32[L, S]; over "queries", sum `x` of the queries for each key."""
    weights, axis = weights.astype(x.dtype), 1 if over == "keys" else 0
    return product(x, weights, 1, axis) if turned else product(weights, x, axis, 0)


def _weights_of(q: Any, k: Any, more: tuple, row: _Row) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A function from a head of the block to its probabilities f32[L, S], and whether each query sees a key, bool[L, 1].

    `more` holds per_key and slopes, if they are given.
    """
    start = pl.program_id(2) * row.block.queries
    first = pl.program_id(1) * row.block.groups * row.ratio

    def one(n: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _rows(q[0, n], k[0, row.group(n)], row.turned) * row.scale
        if row.positions:
            logits = logits + more[1][first + n] * more[0][0, 0:1]
        if row.masked:
            logits = logits + more[0][0, 1:2]
        if row.causal:
            query, key = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
            logits = jnp.where(key <= query + start, logits, LOWEST)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), largest > LOWEST / 2

    return one


def _forward_kernel(q: Any, k: Any, v: Any, *refs: Any, row: _Row) -> None:
    *more, out = refs
    weights_of = _weights_of(q, k, tuple(more), row)

    def one(n: jax.Array) -> None:
        out[0, n] = _mixed(weights_of(n)[0], v[0, row.group(n)], "keys", row.turned).astype(out.dtype)

    _heads(row.block.groups * row.ratio, one)


def _backward_kernel(q: Any, k: Any, v: Any, grad: Any, *refs: Any, row: _Row) -> None:
    extra = row.positions + row.masked
    more, (dq, dk, dv, *sums) = refs[:extra], refs[extra:]
    weights_of = _weights_of(q, k, more, row)
    if sums:

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for x in sums:
                x[...] = jnp.zeros_like(x)

    def one(n: jax.Array) -> None:
        m = row.group(n)
        query, g, (weights, seen) = q[0, n], grad[0, n], weights_of(n)
        dweights = _rows(g, v[0, m], row.turned)
        dlogits = weights * (dweights - jnp.sum(dweights * weights, axis=-1, keepdims=True)) * row.scale
        if row.masked:
            # A fully masked query attends to all keys alike, but masked logits have no gradient.
            dlogits = jnp.where(seen, dlogits, 0.0)
        dq[0, n] = _mixed(dlogits, k[0, m], "keys", row.turned).astype(dq.dtype)
        of_key, of_value = (_mixed(x, y, "queries", row.turned) for x, y in ((dlogits, query), (weights, g)))
        if sums:
            sums[0][m] += of_key
            sums[1][m] += of_value
        else:
            dk[0, m], dv[0, m] = of_key.astype(dk.dtype), of_value.astype(dv.dtype)

    _heads(row.block.groups * row.ratio, one)
    if sums:

        @pl.when(pl.program_id(2) == row.blocks - 1)
        def _() -> None:
            for made, total in zip((dk, dv), sums, strict=True):
                made[0] = total[...].astype(made.dtype)
