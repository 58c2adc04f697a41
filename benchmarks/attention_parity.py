"""Fused attention against plain XLA on this device: forward pass, gradient, and time. A step of `benchmarks.device`.

Each case has the shapes that one attention of the model has. Errors are those of the fused path and of plain XLA in the same
type, both against plain XLA in float32 with exact products.
"""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.models import attention
from ymplug_jax.models.mplug_video import MPLUGVideo

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
ALLOWED = 2.0  # accepted error, as a multiple of plain XLA's in the same dtype
FLOOR = 1e-5  # errors below this are float32 rounding
# Implementation -> pattern of its custom call in a compiled program.
KERNELS = {"cuDNN": "fmha", "Pallas on TPU": "tpu_custom_call", "Pallas on GPU": "mosaic_gpu|triton_kernel_call"}


class Case(NamedTuple):
    """One attention layer of the model."""

    fused: Attend  # as the model calls it
    plain: Attend  # the same computation with einsum and softmax
    queries: tuple[int, ...]  # shape of q
    keys: tuple[int, ...]  # shape of k and v


def cases(model: MPLUGVideo, batch: int, length: int, long: int) -> dict[str, Case]:
    """The attention layers of a training step, and those of a decoder with long rows.

    Args:
      model: gives the sizes.
      batch: batch size B.
      length: L, tokens of a title.
      long: tokens of a long row.
    """
    vision, llm, count = model.vision, model.llm, model.abstractor.queries
    patches = (vision.image_size // vision.patch_size) ** 2
    head = vision.width // vision.heads
    space = (batch * vision.frames, 1 + patches, vision.heads, head)
    frames = (batch, vision.frames, patches, vision.width)
    queries = (batch, count, model.abstractor.heads, vision.width // model.abstractor.heads)
    keys = (batch, 2 + vision.frames * patches, *queries[2:])
    row = (batch, count + length, llm.heads, llm.width // llm.heads)

    def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attend(q, k, v, causal=True)

    def in_time(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attend_frames(q, k, v, vision.heads)

    def plain_in_time(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        b, t, p, d = q.shape
        parts = (x.reshape(b, t, p, vision.heads, head).swapaxes(1, 2).reshape(b * p, t, -1, head) for x in (q, k, v))
        return plain(*parts).reshape(b, p, t, d).swapaxes(1, 2)

    seen = jnp.arange(row[1]) >= jnp.arange(batch)[:, None] % 8  # bool[B, S]: up to 7 padded on the left
    places = jnp.maximum(jnp.cumsum(seen, axis=1) - 1, 0)
    slopes = 2.0 ** -(8 * jnp.arange(1, llm.heads + 1) / llm.heads)
    # A padded query sees no key, and plain XLA has no defined result for it: exclude these queries.
    rows = seen[:, :, None, None]

    def padded(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.where(rows, attention.attend(q, k, v, causal=True, key_mask=seen), 0)

    def plain_padded(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return plain_causal(q, k, v, seen)

    def alibi(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        y = attention.attend(q, k, v, causal=True, key_mask=seen, slopes=slopes, key_positions=places)
        return jnp.where(rows, y, 0)

    def plain_alibi(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return plain_causal(q, k, v, seen, slopes[:, None, None] * places[:, None, None])

    grouped = (*row[:2], max(llm.heads // 4, 1), row[3])
    return {
        "decoder, padded left": Case(padded, plain_padded, row, row),
        "decoder, ALiBi": Case(alibi, plain_alibi, row, row),
        "decoder, grouped": Case(causal, plain_causal, row, grouped),
        "video encoder, space": Case(attention.attend, plain, space, space),
        "video encoder, time": Case(in_time, plain_in_time, frames, frames),
        "abstractor": Case(attention.attend, plain, queries, keys),
        "decoder, causal": Case(causal, plain_causal, row, row),
        **long_cases(long, llm.heads, row[3]),
    }


def long_cases(length: int, heads: int, width: int) -> dict[str, Case]:
    """Rows of the chat model with ALiBi: one text, and about 20 texts with padding behind them."""
    shape = (1, length, heads, width)
    slopes = 2.0 ** -(8 * jnp.arange(1, heads + 1) / heads)
    share = jnp.arange(length)[None] / length
    segments = jnp.where(share < 0.95, 1 + (20 * share**2).astype(jnp.int32), 0)
    starts = attention.starts(segments)

    def case(packed: bool) -> Case:
        places = jnp.arange(length)[None] - (starts if packed else 0)
        given = {"segments": segments} if packed else {}

        def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention.attend(q, k, v, causal=True, slopes=slopes, key_positions=places, **given)

        def by_hand(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask, bias = jnp.tri(length, dtype=bool), slopes[:, None, None] * places[:, None, None]
            if packed:
                mask = mask & (segments[:, None, :, None] == segments[:, None, None])
            y = plain(q, k, v, mask, bias)
            return jnp.where((segments > 0)[..., None, None], y, 0) if packed else y

        return Case(fused, by_hand, shape, shape)

    return {"decoder, long, ALiBi": case(False), "decoder, long, packed": case(True)}


def plain(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, bias: jax.Array | None = None
) -> jax.Array:
    """Softmax attention, f[B, L, N, H] and f[B, S, K, H] twice -> f[B, L, N, H]; mask and bias broadcast to [B, N, L, S]."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("blnh,bsnh->bnls", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    logits = logits if bias is None else logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    return jnp.einsum("bnls,bsnh->blnh", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


def plain_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None = None, bias: jax.Array | None = None
) -> jax.Array:
    """Causal `plain`; `seen`, bool[B, S], masks further keys, and queries without a visible key return zeros."""
    mask = jnp.arange(k.shape[1]) <= jnp.arange(q.shape[1])[:, None]
    if seen is None:
        return plain(q, k, v, mask, bias)
    return jnp.where(seen[:, :, None, None], plain(q, k, v, mask & seen[:, None, None], bias), 0)


def measure(case: Case, dtype: str, rounds: int) -> dict[str, Any]:
    """Compare and time one case on random inputs.

    Returns:
      kernel (its name, or "none" where the program is plain XLA), forward_error and gradient_error (relative, in the Euclidean
      norm, the largest of dq, dk and dv), the same of plain XLA, agrees, milliseconds of forward and backward pass and those of
      plain XLA, medians.
    """
    rng = np.random.default_rng(0)
    shapes = (case.queries, case.keys, case.keys, case.queries)  # q, k, v and the gradient of the output
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(_with_gradient(case.plain))(*(x.astype(jnp.float32) for x in arrays))
    result: dict[str, Any] = {}
    for name, attend in (("", case.fused), ("plain_", case.plain)):
        run = jax.jit(_with_gradient(attend)).lower(*arrays).compile()
        if not name:
            result["kernel"] = kernel_of(run.as_text() or "")
        forward, *gradient = (_error(*pair) for pair in zip(run(*arrays), exact, strict=True))
        result |= {name + "forward_error": forward, name + "gradient_error": max(gradient, key=_worst)}
        result[name + "milliseconds"] = 1e3 * statistics.median(_seconds(run, arrays) for _ in range(rounds))
    result["agrees"] = all(  # comparisons with NaN are false
        result[part] <= ALLOWED * result["plain_" + part] + FLOOR for part in ("forward_error", "gradient_error")
    )
    return result


def kernel_of(program: str) -> str:
    """Name of the attention implementation in a compiled program."""
    targets = " ".join(re.findall(r'custom_call_target="([^"]+)"', program))
    return next((name for name, pattern in KERNELS.items() if re.search(pattern, targets)), "none")


def _with_gradient(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(gradient)

    return run


def _error(got: jax.Array, exact: jax.Array) -> float:
    difference = np.asarray(got, np.float64) - np.asarray(exact, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(exact, np.float64)))


def _worst(error: float) -> float:
    return error if error == error else float("inf")  # NaN is the largest


def _seconds(run: Callable[..., Any], arrays: list[jax.Array]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    return time.perf_counter() - began
