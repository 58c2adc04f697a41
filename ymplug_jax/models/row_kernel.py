"""Attention of whole rows as one Pallas kernel for TPU; logits and probabilities never leave VMEM.

All keys and values of a row fit into VMEM (197 patches, 208 tokens, a decoder's 2048), so there is no running softmax over
tiles of keys as in flash attention (Dao et al., 2022): a block of queries sees all keys at once, and one backward kernel
recomputes the probabilities. Short rows are a single block. In causal rows of several blocks, a block reads only the keys from
the first that one of its queries sees up to its own last query.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ymplug_jax.core import sharding
from ymplug_jax.models import row_program
from ymplug_jax.models.row_program import Block, Row, first_blocks

VMEM = 12 * 2**20  # budget of one program in bytes; TPU v4 has 16 MiB
LARGE_VMEM = 48 * 2**20  # budget for rows in several blocks since TPU v5, which has 64 MiB or more
SMALL = ("TPU v2", "TPU v3", "TPU v4")  # device kinds that are limited to VMEM bytes
LANES = 128
BESIDE = "heads_side_by_side"  # metadata of a call: its products have so many times the columns that its heads have


def block_of(heads: int, groups: int, length: int, keys: int, width: int, beside: bool = False) -> Block | None:
    """The largest block that fits into VMEM; whole rows are preferred.

    With `beside`, it has the heads of LANES columns of a row.

    Args:
      heads: N, query heads.
      groups: K, key/value heads; divides N.
      length: L, queries.
      keys: S.
      width: H.
      beside: the heads of q, k and v lie side by side in rows of N * H.

    Returns:
      None if not even one head with LANES queries fits: above about 2200 keys on TPU v4 and 9000 since v5, at H = 128. With
      `beside` also if several heads do not fill LANES columns exactly, or N and K differ.
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
        if beside:
            together = LANES // width
            if heads == groups and together > 1 and LANES % width == groups % together == 0 and each + logits <= budget:
                return Block(together, queries, beside)
        elif fits := [n for n in range(1, groups + 1) if groups % n == 0 and n * each + logits <= budget]:
            return Block(max(fits), queries)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    per_key: jax.Array | None = None,
    slopes: jax.Array | None = None,
    segments: jax.Array | None = None,
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
      segments: int[B, L] of packed rows, L == S, rising along the row, 0 at padding. A query sees the keys of its own number
        only; padding sees earlier padding, or only part of it, so that its results are finite but not defined. Needs `causal`;
        then `per_key` masks no key. Has no gradient.
      causal: query i sees keys 0..i. A query that sees no key attends to all alike.
      interpret: run the kernel in interpreter mode on any platform, for tests.
      block: the part of a row that one program computes. None means that of `block_of`.

    Returns:
      f[B, L, N, H]. Softmax is float32; matrix products keep the type of their operands and accumulate in float32.
    """
    return _forward(q, k, v, per_key, slopes, segments, causal, interpret, block)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, per_key: jax.Array | None, slopes: jax.Array | None,
    segments: jax.Array | None, causal: bool, interpret: bool, block: Block | None,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    saved = (q, k, v, per_key, slopes, segments)
    return _call(row_program.forward, saved, (), causal, interpret, block)[0], saved


def _backward(causal: bool, interpret: bool, block: Block | None, saved: tuple, grad: jax.Array) -> tuple:
    return (*_call(row_program.backward, saved, (grad,), causal, interpret, block), None, None, None)


attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None], saved: tuple, grads: tuple, causal: bool, interpret: bool, block: Block | None
) -> list[jax.Array]:
    """Run one program for each row, group of heads and block of queries.

    The arrays are f[B, N, L, H], f[B, N, H, L] for small H, and f[B, L, N * H] for blocks with heads side by side.
    """
    q, k, v, per_key, slopes, segments = saved
    b, length, heads, width = q.shape
    keys, groups = k.shape[1:3]
    block = block or block_of(heads, groups, length, keys, width)
    if block is None:
        raise ValueError(
            f"attention: {length} queries and {keys} keys do not fit into VMEM; use `attention.attend`, which checks this"
        )
    blocks, ratio = pl.cdiv(length, block.queries), heads // groups
    turned = not block.beside and -(-width // LANES) * LANES > 1.5 * width
    settings = slopes is not None, per_key is not None, segments is not None, length == keys == blocks * block.queries
    row = Row(causal, width**-0.5, width, turned, block, ratio, blocks, *settings)
    queries, whole, of_keys = _specs(row, keys)
    # Pad queries to whole blocks with zeros, which add nothing to the gradients of keys; their results are cut off.
    beyond = ((0, 0), (0, blocks * block.queries - length), (0, 0), (0, 0))
    wide = [jnp.pad(x, beyond) if beyond[1][1] else x for x in (q, *grads)]
    inputs, specs = (
        [_laid_out(x, row) for x in (wide[0], k, v, *wide[1:])],
        [queries, whole, whole, *(queries for _ in grads)],
    )
    if per_key is not None:
        inputs.append(per_key)
        specs.append(pl.BlockSpec((1, 2, keys), lambda row, place, i: (row, 0, 0)))
    if slopes is not None:
        inputs.append(slopes)
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    if segments is not None:
        padded = jnp.pad(segments, beyond[:2])
        inputs += [padded[:, :, None], segments[:, None], first_blocks(padded, block.queries)]
        specs.append(pl.BlockSpec((1, block.queries, 1), lambda row, place, i: (row, i, 0)))
        specs.append(pl.BlockSpec((1, 1, keys), lambda row, place, i: (row, 0, 0)))
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    results = [(wide[0], queries), (k, whole), (v, whole)] if grads else [(wide[0], queries)]
    summed = bool(grads) and (blocks > 1 or ratio > 1)
    out = pl.pallas_call(
        functools.partial(kernel, row=row),
        grid=(b, groups // block.groups, blocks),
        in_specs=specs,
        out_specs=[spec for _, spec in results],
        out_shape=[
            jax.ShapeDtypeStruct(jax.eval_shape(lambda x: _laid_out(x, row), x).shape, x.dtype) for x, _ in results
        ],
        scratch_shapes=[pltpu.VMEM(of_keys, jnp.float32)] * 2 if summed else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if summed else "parallel"), vmem_limit_bytes=2**26
        ),
        interpret=interpret,
        metadata={BESIDE: str(block.groups)} if block.beside else None,
    )(*inputs)
    if block.beside:
        out = [x.reshape(b, -1, heads, width) for x in out]
    else:
        out = [x.transpose((0, 3, 1, 2) if turned else (0, 2, 1, 3)) for x in out]
    return [out[0][:, :length], *out[1:]]


def _laid_out(x: jax.Array, row: Row) -> jax.Array:
    """f[B, L, N, H] as the programs read it."""
    if row.block.beside:
        return x.reshape(*x.shape[:2], -1)
    return x.transpose((0, 2, 3, 1) if row.turned else (0, 2, 1, 3))


def _specs(row: Row, keys: int) -> tuple[pl.BlockSpec, pl.BlockSpec, tuple[int, ...]]:
    """A program's part of arrays of queries and of arrays of keys, and the shape of the latter in one row."""
    block, width = row.block, row.width
    if block.beside:
        lanes = block.groups * width
        queries = pl.BlockSpec((1, block.queries, lanes), lambda row, place, i: (row, i, place))
        return queries, pl.BlockSpec((1, keys, lanes), lambda row, place, i: (row, 0, place)), (keys, lanes)
    turned = row.turned

    def part(positions: int) -> tuple[int, int]:
        return (width, positions) if turned else (positions, width)

    queries = pl.BlockSpec(
        (1, block.groups * row.ratio, *part(block.queries)),
        lambda row, place, i: (row, place, 0, i) if turned else (row, place, i, 0),
    )
    shape = (block.groups, *part(keys))
    return queries, pl.BlockSpec((1, *shape), lambda row, place, i: (row, place, 0, 0)), shape
