"""Projections, MLP, normalisation and position tables shared by the towers.

Parameters are float32 unless the caller stores them otherwise; `dtype` is the type of the computation. Norms are always
computed in float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ymplug_jax.core import quantize

Initializer = Callable[..., jax.Array]
# Layers whose kernel may be held in eight bits.
Dense = partial(nn.Dense, promote_dtype=quantize.promote)
DenseGeneral = partial(nn.DenseGeneral, promote_dtype=quantize.promote)

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
        kernel = quantize.matrix(self.param("kernel", self.kernel_init, self.kernel)).reshape(x.shape[-1], -1)  # [C, D]
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.bias).reshape(-1).astype(self.dtype)
        return y


class Attention(nn.Module):
    """The projections around `attention.attend`: kernels q [D, N, H], k and v [D, K, H], o [N, H, D]; biases start at zero.

    With `qk_norm_eps`, queries and keys are normalised over H, each with one scale for all heads.
    """

    width: int
    heads: int  # N
    kernel_init: Initializer
    out_init: Initializer
    kv_heads: int | None = None  # K, divides N; None: N
    head_dim: int | None = None  # H; None: D / N
    qkv_bias: bool = True
    key_bias: bool = True  # a key bias shifts all logits of a query alike, so some models leave it out
    out_bias: bool = True
    qk_norm_eps: float | None = None  # None: no norm
    flat: bool = False  # heads side by side in rows of D, as the kernel of `attend_frames` reads them
    dtype: str = "float32"

    def setup(self) -> None:
        """Projections q, k, v and o, with `qk_norm_eps` also the norms of queries and keys."""
        dtype, size = jnp.dtype(self.dtype), self.head_dim or self.width // self.heads

        def project(heads: int, bias: bool) -> nn.Module:
            shape = (heads, size)
            if self.flat:
                return _Flat((self.width, *shape), shape if bias else (), self.kernel_init, dtype)
            return DenseGeneral(shape, use_bias=bias, kernel_init=self.kernel_init, dtype=dtype)

        kv_heads = self.kv_heads or self.heads
        self.q = project(self.heads, self.qkv_bias)
        self.k = project(kv_heads, self.qkv_bias and self.key_bias)
        self.v = project(kv_heads, self.qkv_bias)
        self.o = (
            _Flat((self.heads, size, self.width), (self.width,), self.out_init, dtype)
            if self.flat
            else DenseGeneral(self.width, axis=(-2, -1), use_bias=self.out_bias, kernel_init=self.out_init, dtype=dtype)
        )
        if self.qk_norm_eps is not None:
            self.q_norm, self.k_norm = (rms_norm(None, self.qk_norm_eps, self.dtype) for _ in "qk")

    def project(self, x: jax.Array, context: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """f[..., D] (and f[..., S, D] to attend to, by default the same) -> q f[..., N, H], k and v f[..., K, H] (or f[..., D], see
        `flat`)."""
        context = x if context is None else context
        q, k, v = kept(self.q(x)), kept(self.k(context)), kept(self.v(context))
        return (q, k, v) if self.qk_norm_eps is None else (self.q_norm(q), self.k_norm(k), v)

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
        """f[..., D] -> f[..., D]."""
        dtype, width = jnp.dtype(self.dtype), x.shape[-1]
        up = Dense(self.hidden, kernel_init=self.up_init, bias_init=self.up_bias_init, dtype=dtype, name="up")
        x = kept(up(x))  # [..., M]
        x = gelu(x, self.tanh)
        down = Dense(width, kernel_init=self.down_init, bias_init=self.down_bias_init, dtype=dtype, name="down")
        return kept(down(x))  # [..., D]


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases: f[..., D] -> f[..., D]. SiLU is float32 (Shazeer, 2020, "GLU variants")."""

    hidden: int  # M
    kernel_init: Initializer
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., D] -> f[..., D]."""
        dtype, width = jnp.dtype(self.dtype), x.shape[-1]

        def dense(name: str, features: int) -> nn.Dense:
            return Dense(features, use_bias=False, kernel_init=self.kernel_init, dtype=dtype, name=name)

        gate, up = kept(dense("gate", self.hidden)(x)), kept(dense("up", self.hidden)(x))  # [..., M]
        x = nn.silu(gate.astype(jnp.float32)).astype(dtype) * up
        return kept(dense("down", width)(x))  # [..., D]


def look_up(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of a table of word embeddings, f[V, D]: int[..., L] -> f[..., L, D] in `dtype`."""
    return jnp.take(table, ids, axis=0, mode="clip").astype(jnp.dtype(dtype))


def tied_logits(table: jax.Array, hidden: jax.Array, dtype: str) -> jax.Array:
    """Logits by the table of word embeddings, f[V, D], as the output layer: f[..., D] -> f32[..., V]."""
    return jnp.einsum("...d,vd->...v", hidden, table.astype(jnp.dtype(dtype)), preferred_element_type=jnp.float32)


class OutputLayer(nn.Module):
    """An output layer of its own, kernel [D, V]: f[..., D] -> f32[..., V]."""

    vocab: int
    kernel_init: Initializer
    dtype: str

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """f[..., D] -> f32[..., V]."""
        kernel = self.param("kernel", self.kernel_init, (hidden.shape[-1], self.vocab)).astype(jnp.dtype(self.dtype))
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def rotation_of(positions: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary positions (Su et al., 2021): int[..., L] -> f32[..., L, H / 2] each, angle position / theta^(2i / H).

    Args:
      positions: of the tokens.
      size: H, even.
      theta: base of the wavelengths.
    """
    angles = positions[..., None].astype(jnp.float32) * theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (i, i + H / 2) of every head by the angles of `rotation_of`, in float32: f[..., L, N, H] -> the same."""
    cos, sin = (part[..., None, :] for part in rotation)  # [..., L, 1, H / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def unit(x: jax.Array) -> jax.Array:
    """L2-normalise the last axis, in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))  # the references bound the norm at 1e-12


def norm(name: str | None, eps: float, dtype: str) -> nn.LayerNorm:
    """LayerNorm in float32 with a two-pass (exact) variance, cast back to `dtype`."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.dtype(dtype), use_fast_variance=False, name=name)


def rms_norm(name: str | None, eps: float, dtype: str) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich, 2019), in float32, cast back to `dtype`."""
    return nn.RMSNorm(epsilon=eps, dtype=jnp.dtype(dtype), name=name)


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
