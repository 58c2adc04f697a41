"""Attention, MLP, normalisation and position tables shared by the towers.

Parameters are float32 unless the caller stores them otherwise; `dtype` is the type of the computation. Norms, attention
logits and softmax are always computed in float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ymplug_jax.core import sharding
from ymplug_jax.models import kernels

Initializer = Callable[..., jax.Array]
HALF = ("bfloat16", "float16")

# What the backward pass may keep of a block instead of computing it again: nothing, or the results of products with weights.
# With their biases: a result that is kept without would be written twice, once more for what reads it.
PRODUCT = "product"
REMAT = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT)}

# Axis words of a stack of transformer blocks, by path below the tower.
BLOCK_AXES = (
    ("blocks/(attn_norm|mlp_norm)/(scale|bias)", "layers embed"),
    ("blocks/attn/[qkv]/kernel", "layers embed heads head_dim"),
    ("blocks/attn/[qkv]/bias", "layers heads head_dim"),
    ("blocks/attn/o/kernel", "layers heads head_dim embed"),
    ("blocks/attn/o/bias", "layers embed"),
    ("blocks/mlp/up/kernel", "layers embed mlp"),
    ("blocks/mlp/up/bias", "layers mlp"),
    ("blocks/mlp/down/kernel", "layers mlp embed"),
    ("blocks/mlp/down/bias", "layers embed"),
)


def kept(x: jax.Array) -> jax.Array:
    """Marks the result of a product with weights: with remat "dots" the backward pass keeps it."""
    return checkpoint_name(x, PRODUCT)


def uniform(bound: float) -> Initializer:
    """Initialiser U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_linear(fan_in: int) -> Initializer:
    """PyTorch's default for the weight and for the bias of a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return uniform(fan_in**-0.5)


def attention(
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


def frame_attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
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


def branch_attention(
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


class _Flat(nn.Module):
    """nn.DenseGeneral over heads as a product of matrices, f[..., C] -> f[..., D], with the parameters of the former.

    A TPU lays out a result [..., N, H] with positions next to each other, and has to turn it for a kernel that reads rows of D.
    """

    kernel: tuple[int, ...]  # its shape, [D, N, H] or [N, H, D]
    bias: tuple[int, ...]  # its shape; (): there is none
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, self.kernel).reshape(x.shape[-1], -1)  # [C, D]
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.bias).reshape(-1).astype(self.dtype)
        return y


class Attention(nn.Module):
    """The projections around `attention`: kernels q, k, v [D, N, H] and o [N, H, D]; biases start at zero."""

    width: int
    heads: int
    kernel_init: Initializer
    out_init: Initializer
    key_bias: bool = True  # a key bias shifts all logits of a query alike, so some models leave it out
    flat: bool = False  # heads side by side in rows of D, as the kernel of `frame_attention` reads them
    dtype: str = "float32"

    def setup(self) -> None:
        dtype, heads = jnp.dtype(self.dtype), (self.heads, self.width // self.heads)

        def project(bias: bool) -> nn.Module:
            if self.flat:
                return _Flat((self.width, *heads), heads if bias else (), self.kernel_init, dtype)
            return nn.DenseGeneral(heads, use_bias=bias, kernel_init=self.kernel_init, dtype=dtype)

        self.q, self.k, self.v = project(True), project(self.key_bias), project(True)
        if self.flat:
            self.o = _Flat((*heads, self.width), (self.width,), self.out_init, dtype)
        else:
            self.o = nn.DenseGeneral(self.width, axis=(-2, -1), kernel_init=self.out_init, dtype=dtype)

    def project(self, x: jax.Array, context: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """f[..., D] (and f[..., S, D] to attend to, by default the same) -> q, k, v f[..., N, H] (or f[..., D], see `flat`)."""
        context = x if context is None else context
        return kept(self.q(x)), kept(self.k(context)), kept(self.v(context))

    def output(self, y: jax.Array) -> jax.Array:
        """f[..., N, H] (or f[..., D], see `flat`) -> f[..., D]."""
        return kept(self.o(y))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: jax.Array, tanh: bool = False) -> jax.Array:
    """GELU, x/2 (1 + erf(x/sqrt 2)) or its approximation by tanh, in float32 whatever the type: f[...] -> f[...].

    JAX's own takes erfc, which costs more on CPU and TPU (BENCHMARKS.md). The backward pass keeps the derivative and nothing else.
    """
    return _gelu_and_slope(x, tanh)[0]


@gelu.defjvp
def _(tanh: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, slope = _gelu_and_slope(*primals, tanh)
    return y, slope * tangents[0]


def _gelu_and_slope(x: jax.Array, tanh: bool) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    square = wide * wide
    if tanh:
        below = 0.5 + 0.5 * jnp.tanh((2 / math.pi) ** 0.5 * wide * (1 + 0.044715 * square))
        density = below * (1 - below) * (8 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * square)
    else:
        below = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5)  # the normal distribution's share below x
        density = (2 * math.pi) ** -0.5 * jnp.exp(-0.5 * square)
    return (wide * below).astype(x.dtype), (below + wide * density).astype(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with GELU between: f[..., D] -> f[..., D]."""

    hidden: int  # M
    up_init: Initializer
    down_init: Initializer
    up_bias_init: Initializer = nn.initializers.zeros
    down_bias_init: Initializer = nn.initializers.zeros
    tanh: bool = False  # GELU by tanh instead of erf
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, width = jnp.dtype(self.dtype), x.shape[-1]
        up = nn.Dense(self.hidden, kernel_init=self.up_init, bias_init=self.up_bias_init, dtype=dtype, name="up")
        x = kept(up(x))  # [..., M]
        x = gelu(x, self.tanh)
        down = nn.Dense(width, kernel_init=self.down_init, bias_init=self.down_bias_init, dtype=dtype, name="down")
        return kept(down(x))  # [..., D]


def unit(x: jax.Array) -> jax.Array:
    """L2-normalise the last axis, in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))  # the references bound the norm at 1e-12


def norm(name: str | None, eps: float, dtype: str) -> nn.LayerNorm:
    """LayerNorm in float32 with a two-pass (exact) variance, cast back to `dtype`."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.dtype(dtype), use_fast_variance=False, name=name)


def stack(
    block: type[nn.Module], depth: int, *, remat: str, in_axes: Any, static_argnums: Sequence[int] = ()
) -> Callable[..., nn.Module]:
    """`block` scanned over `depth` layers; its parameters get a leading layers axis.

    Args:
      block: module class with `__call__(carry, *args) -> (carry, None)`.
      depth: number of layers.
      remat: "none" keeps all activations, "full" only the carry, "dots" the carry and the results of matrix products.
      in_axes: scan axis (0 or `nn.broadcast`) of each of `args`.
      static_argnums: python values among the arguments, counted with self as 0.

    Raises:
      ValueError: unknown `remat`.
    """
    if remat != "none":
        if remat not in REMAT:
            raise ValueError(f'remat is {remat!r}; write "none", "full" or "dots"')
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=False, static_argnums=tuple(static_argnums))
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
    )


def resize_pos_embed(table: jax.Array, patches: int) -> jax.Array:
    """Spatial position table for another number of patches: f32[1 + P, D] -> f32[1 + patches, D].

    Row 0 (cls) is kept; the rest is a square grid, resized bilinearly with half-pixel centres and without antialiasing.

    Raises:
      ValueError: a number of patches that is not a square.
    """
    old, new = round((table.shape[0] - 1) ** 0.5), round(patches**0.5)
    if old**2 != table.shape[0] - 1 or new**2 != patches:
        raise ValueError(f"pos_embed: cannot resize {table.shape[0] - 1} to {patches} patches; both must be squares")
    grid = table[1:].astype(jnp.float32).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear", antialias=False)
    return jnp.concatenate([table[:1].astype(jnp.float32), grid.reshape(patches, -1)])  # [1 + patches, D]


def resize_temporal_embed(table: jax.Array, frames: int) -> jax.Array:
    """Temporal table for another number of frames: f32[T, D] -> f32[frames, D], linear, half-pixel centres, no antialiasing."""
    return jax.image.resize(table.astype(jnp.float32), (frames, table.shape[-1]), "linear", antialias=False)
