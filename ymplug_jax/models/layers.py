"""Projections, MLP, normalisation and stacks of layers shared by the towers.

Parameters are created in float32; `dtype` is the type of the computation. Norms always compute in float32.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ymplug_jax.core import quantize, sharding

Initializer = Callable[..., jax.Array]
# Layers whose frozen kernel may be stored in eight bits.
Dense = partial(nn.Dense, promote_dtype=quantize.promote)
DenseGeneral = partial(nn.DenseGeneral, promote_dtype=quantize.promote)

# Activations that the backward pass keeps instead of recomputing them: none, or the results of products with weights. They
# are saved after the bias is added, because saving them before makes XLA write both.
PRODUCT = "product"
REMAT = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT)}

_TOGETHER: ContextVar[int] = ContextVar("layers that one pass of a loop computes", default=1)

# Logical axes of a stack of transformer blocks, by path below the tower.
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


# Names of linear layers, their common input and their outputs -> the outputs with adapters.
Update: TypeAlias = Callable[[tuple[str, ...], jax.Array, tuple[jax.Array, ...]], tuple[jax.Array, ...]]


def unchanged(names: tuple[str, ...], x: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The `Update` of a decoder without adapters."""
    return outputs


def kept(x: jax.Array) -> jax.Array:
    """Mark the result of a product with weights, which the backward pass keeps under remat "dots"."""
    return checkpoint_name(x, PRODUCT)


def uniform(bound: float) -> Initializer:
    """An initialiser that draws from U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_linear(fan_in: int) -> Initializer:
    """PyTorch's default initialiser of a linear layer's weight and bias, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return uniform(fan_in**-0.5)


class _Flat(nn.Module):
    """`nn.DenseGeneral` over heads, with the same parameters, as a plain matrix product f[..., C] -> f[..., D].

    XLA for TPU lays out a result [..., N, H] with positions adjacent, and would transpose it for a kernel that reads rows of D.
    """

    kernel: tuple[int, ...]  # shape of the kernel, [D, N, H] or [N, H, D]
    bias: tuple[int, ...]  # shape of the bias; () leaves it out
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

    With `qk_norm_eps`, RMSNorm over H normalises queries and keys, each with one scale for all heads.
    """

    width: int  # Width D.
    heads: int  # Number of query heads N.
    kernel_init: Initializer  # Initialiser of the q, k and v kernels.
    out_init: Initializer  # Initialiser of the output kernel.
    kv_heads: int | None = None  # Number of key/value heads K, which must divide N; None means N.
    head_dim: int | None = None  # Size of a head H; None means D / N.
    qkv_bias: bool = True  # Adds biases to q, k and v.
    key_bias: bool = True  # Adds a bias to k; it shifts all logits of a query alike, so some models leave it out.
    out_bias: bool = True  # Adds a bias to the output projection.
    qk_norm_eps: float | None = None  # Epsilon of the norms of q and k; None leaves them out.
    flat: bool = False  # Keeps heads side by side in rows of D, as the kernel of `attend_frames` reads them.
    dtype: str = "float32"  # Type of the computation.

    def setup(self) -> None:
        """Create the projections q, k, v and o, and with `qk_norm_eps` the norms of queries and keys."""
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

    def project(
        self, x: jax.Array, context: jax.Array | None = None, update: Update = unchanged
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project to queries, keys and values.

        Args:
          x: f[..., L, D], the queries.
          context: f[..., S, D], the keys and values. None means `x`.
          update: adapters of "q", "k" and "v", without `context` only.

        Returns:
          q f[..., L, N, H], k and v f[..., S, K, H]; with `flat` f[..., D] each.
        """
        context = x if context is None else context
        q, k, v = update(("q", "k", "v"), x, (self.q(x), self.k(context), self.v(context)))
        q, k, v = kept(q), kept(k), kept(v)
        return (q, k, v) if self.qk_norm_eps is None else (self.q_norm(q), self.k_norm(k), v)

    def output(self, y: jax.Array, update: Update = unchanged) -> jax.Array:
        """Project the output of attention, f[..., N, H] (with `flat` f[..., D]) -> f[..., D]; `update` has adapters of "o"."""
        return kept(*update(("o",), y, (self.o(y),)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: jax.Array, tanh: bool = False) -> jax.Array:
    """GELU, x/2 (1 + erf(x / sqrt 2)) or its tanh approximation, computed in float32: f[...] -> f[...].

    `jax.nn.gelu` uses erfc, which is slower on CPU and TPU (BENCHMARKS.md). The backward pass keeps the derivative only.
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
        below = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5)  # cumulative distribution of the normal at x
        density = (2 * math.pi) ** -0.5 * jnp.exp(-0.5 * square)
    return (wide * below).astype(x.dtype), (below + wide * density).astype(x.dtype)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    hidden: int  # Width between the layers M.
    up_init: Initializer  # Initialiser of the first kernel.
    down_init: Initializer  # Initialiser of the second kernel.
    up_bias_init: Initializer = nn.initializers.zeros  # Initialiser of the first bias.
    down_bias_init: Initializer = nn.initializers.zeros  # Initialiser of the second bias.
    tanh: bool = False  # Uses the tanh approximation of GELU.
    dtype: str = "float32"  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array, update: Update = unchanged) -> jax.Array:
        """Apply the MLP, f[..., D] -> f[..., D]; `update` has adapters of "up" and "down"."""
        dtype, width = jnp.dtype(self.dtype), x.shape[-1]
        up = Dense(self.hidden, kernel_init=self.up_init, bias_init=self.up_bias_init, dtype=dtype, name="up")
        x = kept(*update(("up",), x, (up(x),)))  # [..., M]
        x = gelu(x, self.tanh)
        down = Dense(width, kernel_init=self.down_init, bias_init=self.down_bias_init, dtype=dtype, name="down")
        return kept(*update(("down",), x, (down(x),)))  # [..., D]


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, "GLU variants improve transformer", 2020); SiLU is float32."""

    hidden: int  # Width between the layers M.
    kernel_init: Initializer  # Initialiser of the kernels.
    dtype: str = "float32"  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array, update: Update = unchanged) -> jax.Array:
        """Apply the MLP, f[..., D] -> f[..., D]; `update` has adapters of "gate", "up" and "down"."""
        dtype, width = jnp.dtype(self.dtype), x.shape[-1]

        def dense(name: str, features: int) -> nn.Dense:
            return Dense(features, use_bias=False, kernel_init=self.kernel_init, dtype=dtype, name=name)

        gate, up = update(("gate", "up"), x, (dense("gate", self.hidden)(x), dense("up", self.hidden)(x)))  # [..., M]
        x = nn.silu(kept(gate).astype(jnp.float32)).astype(dtype) * kept(up)
        return kept(*update(("down",), x, (dense("down", width)(x),)))  # [..., D]


def look_up(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of the word embeddings f[V, D] in `dtype`: int[..., L] -> f[..., L, D]."""
    return jnp.take(table, ids, axis=0, mode="clip").astype(jnp.dtype(dtype))


def tied_logits(table: jax.Array, hidden: jax.Array, dtype: str) -> jax.Array:
    """Logits with the word embeddings f[V, D] as output layer: f[..., D] -> f32[..., V]."""
    return jnp.einsum("...d,vd->...v", hidden, table.astype(jnp.dtype(dtype)), preferred_element_type=jnp.float32)


class OutputLayer(nn.Module):
    """Untied output layer, kernel [D, V]."""

    vocab: int  # Number of tokens V.
    kernel_init: Initializer  # Initialiser of the kernel.
    dtype: str  # Type of the computation; logits are float32.

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Logits of the vocabulary, f[..., D] -> f32[..., V]."""
        kernel = self.param("kernel", self.kernel_init, (hidden.shape[-1], self.vocab)).astype(jnp.dtype(self.dtype))
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def rotation_of(positions: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles position / theta^(2i / H) (Su et al., "RoFormer", 2021).

    Args:
      positions: int[..., L], of the tokens.
      size: H, even.
      theta: base of the wavelengths.

    Returns:
      f32[..., L, H / 2] each.
    """
    angles = positions[..., None].astype(jnp.float32) * theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the pairs (i, i + H / 2) of every head by the angles of `rotation_of`, in float32: f[..., L, N, H] -> same shape."""
    cos, sin = (part[..., None, :] for part in rotation)  # [..., L, 1, H / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def unit(x: jax.Array) -> jax.Array:
    """L2-normalise the last axis, in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))  # a norm of at least 1e-12, as in the references


def norm(name: str | None, eps: float, dtype: str) -> nn.LayerNorm:
    """LayerNorm in float32 with a two-pass (exact) variance, cast back to `dtype`."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.dtype(dtype), use_fast_variance=False, name=name)


def rms_norm(name: str | None, eps: float, dtype: str) -> nn.RMSNorm:
    """RMSNorm x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019) in float32, cast back to `dtype`."""
    return nn.RMSNorm(epsilon=eps, dtype=jnp.dtype(dtype), name=name)


@contextlib.contextmanager
def unrolled(layers: int) -> Iterator[None]:
    """Let one pass of every `stack` traced inside compute this many layers; 0: all on an NVIDIA GPU, elsewhere one.

    A GPU's matrix products are calls of a library, for which a loop copies the weights of a layer out of the stack.
    """
    token = _TOGETHER.set(layers)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def stack(
    block: type[nn.Module], depth: int, *, remat: str, in_axes: Any, static_argnums: Sequence[int] = ()
) -> Callable[..., nn.Module]:
    """Scan `block` over `depth` layers; its parameters get a leading layers axis.

    Args:
      block: module class with `__call__(carry, *args) -> (carry, None)`.
      depth: number of layers.
      remat: "none" keeps all activations, "full" the carry only, "dots" the carry and the results of matrix products.
      in_axes: scan axis (0 or `nn.broadcast`) of each of `args`.
      static_argnums: indices of Python values among the arguments, where self is 0.

    Raises:
      ValueError: `remat` is unknown.
    """
    together = min(_TOGETHER.get() or (depth if sharding.computes_on("nvidia") else 1), depth)
    if remat != "none":
        if remat not in REMAT:
            raise ValueError(f"config.model: unknown remat policy {remat!r}; choose one of none, {', '.join(REMAT)}")
        # Without a loop, XLA would merge the recomputation with the first computation.
        apart, static = together > 1, tuple(static_argnums)
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=apart, static_argnums=static)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=together,
    )
