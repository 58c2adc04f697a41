"""Compare the fused attention kernels of a program with plain XLA on this device.

Other compilers than XLA build these kernels, and a fault may show as wrong numbers instead of an error. So each kernel is
compared before a training step or an evaluation depends on it.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ymplug_jax.core import sharding
from ymplug_jax.models import attention, kernels
from ymplug_jax.models.kernels import Use

# Largest relative error (2-norm) against float32. Half precision has 0.003 to 0.01 on either path; one wrong key has over 0.1.
BOUND = 0.03
LOGITS = 2**26  # largest number of float32 logits in a comparison; rows and groups of heads are left out above it


class Difference(NamedTuple):
    """Relative errors against float32; infinite if the kernel does not compile or returns non-finite numbers."""

    output: float
    gradient: float  # largest of the errors of q, k and v


def differing(uses: Iterable[Use]) -> frozenset[str]:
    """Names of the kernels that differ from plain XLA on the first device of this process. Logs every comparison.

    Args:
      uses: the kernel uses of a program, see `kernels.recording`.
    """
    off = set()
    for use in sorted(set(uses)):
        found = difference(use)
        fits = found.output <= BOUND and found.gradient <= BOUND
        told = (use.kernel, use.text(), 100 * found.output, 100 * found.gradient, 100 * BOUND)
        if fits:
            logging.info("kernel %s, %s: error %.2f %%, gradients %.2f %% (bound %.0f %%)", *told)
        else:
            off.add(use.kernel)
            logging.warning(
                "kernel %s, %s: error %.2f %%, gradients %.2f %% (bound %.0f %%); plain XLA computes it in this run, which "
                "takes more memory and time. Please report the device, the driver and the version of JAX",
                *told,
            )
    return frozenset(off)


def difference(use: Use) -> Difference:
    """Compare one use of a kernel, forward and backward, with plain XLA in float32 on a small random input."""
    arrays, row = _inputs(use)
    plain, fused = _plain(use, row), _fused(use, row)
    exact = _values(plain, [x.astype(jnp.float32) for x in arrays])
    try:
        made = _values(fused, arrays)
    except Exception as error:  # each kernel compiler raises its own errors
        logging.warning("kernel %s, %s: %s", use.kernel, use.text(), (str(error).splitlines() or [repr(error)])[0])
        return Difference(float("inf"), float("inf"))
    errors = [_error(x, y) for x, y in zip(made, exact, strict=True)]
    return Difference(errors[0], max(errors[1:]))


class _Row(NamedTuple):
    """Arguments of a use beside q, k and v; None where it has none."""

    mask: jax.Array | None  # bool[B, S], with padding on either side
    slopes: jax.Array | None  # f32[N]
    positions: jax.Array | None  # int32[B, S]
    segments: jax.Array | None  # int32[B, S]


def _inputs(use: Use) -> tuple[list[jax.Array], _Row]:
    """Random q, k, v and output gradient, and the other arguments."""
    heads, groups = use.heads, use.groups
    if use.kernel != "tpu_frames":
        ratio = heads // groups
        least = kernels.LANES // use.width if use.beside else 1  # heads side by side are computed together
        groups = next(
            n
            for n in range(groups, 0, -1)
            if groups % n == n % least == 0 and (n == least or n * ratio * use.length * use.keys <= LOGITS)
        )
        heads = groups * ratio
    rows = 2 if 2 * heads * use.length * use.keys <= LOGITS else 1
    if use.kernel == "tpu_frames":
        shapes = [(rows, use.length, use.keys, heads * use.width)] * 4
    else:
        shapes = [
            (rows, n, count, use.width) for n, count in ((use.length, heads), (use.keys, groups), (use.keys, groups))
        ]
        shapes.append(shapes[0])
    with jax.default_device(jax.local_devices()[0]):
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [jax.random.normal(key, shape).astype(use.dtype) for key, shape in zip(keys, shapes, strict=True)]
        place = jnp.arange(use.keys)
        seen = jnp.stack([place >= use.keys // 4, place < use.keys - use.keys // 4][:rows])
        at = (jnp.cumsum(seen, axis=1) - 1) * seen
        segments = None
        if use.packed:  # 24 texts, long ones before short ones or the other way round, and padding at the end
            share = place / use.keys
            numbers = 1 + (24 * jnp.stack([share**2, 1 - (1 - share) ** 2][:rows])).astype(jnp.int32)
            segments = jnp.where(place < use.keys - use.keys // 16, numbers, 0)
            at = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1 - attention.starts(segments), 0)
        slopes = 2.0 ** (-8 * jnp.arange(1, heads + 1) / heads) if use.alibi else None
        return arrays, _Row(seen if use.masked else None, slopes, at if use.alibi else None, segments)


def _plain(use: Use, row: _Row) -> Callable[..., jax.Array]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with kernels.without(kernels.KERNELS):
            if use.kernel == "tpu_frames":
                return attention.attend_frames(q, k, v, use.heads)
            return attention.attend(
                q, k, v, causal=use.causal, key_mask=row.mask, slopes=row.slopes, key_positions=row.positions,
                segments=row.segments,
            )  # fmt: skip

    return run


def _fused(use: Use, row: _Row) -> Callable[..., jax.Array]:
    there = sharding.computes_on_first(kernels.KERNELS[use.kernel])  # other devices run the kernel in interpreter mode

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask, slopes, positions, segments = row
        if use.kernel == "tpu_frames":
            return kernels.over_frames(q, k, v, use.heads, not there)
        if use.kernel == "cudnn":
            name: Literal["cudnn", "xla"] = "cudnn" if there else "xla"
            made = attention.with_columns(q, k, v, use.causal, mask, slopes, positions, name, segments)
        else:
            keyed = None
            if mask is not None or positions is not None:
                keyed = attention.per_key(q.shape[0], k.shape[1], mask, positions)
            sizes = q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3]
            block = kernels.block_of(*sizes, beside=True) if use.beside else None
            made = kernels.attention(q, k, v, keyed, slopes, segments, use.causal, not there, block)
        return attention.tokens_only(made, segments)

    return run


def _values(run: Callable[..., jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
    """The output, and the gradients of q, k and v."""
    *inputs, grad = arrays

    @jax.jit
    def both(*given: jax.Array) -> list[jax.Array]:
        out, back = jax.vjp(run, *given[:3])
        return [out, *back(given[3])]

    return both(*inputs, grad)


def _error(made: jax.Array, exact: jax.Array) -> float:
    error = jnp.linalg.norm((made.astype(jnp.float32) - exact).ravel()) / jnp.linalg.norm(exact.ravel())
    return float(jnp.where(jnp.isfinite(error), error, jnp.inf))
