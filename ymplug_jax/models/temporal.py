"""Temporal modules that let an image tower see several frames; each mixes frames at one spatial position only."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import layers

ADAPTER_EPS = 1e-5  # of the norm inside the adapter; the tower around it uses 1e-6
TAPS = 3  # frames that the depthwise convolution sees: t - 1, t and t + 1

# Axis words of `ConvAdapter`, by path below it, in a stack of blocks.
ADAPTER_AXES = (
    ("norm/(scale|bias)", "layers embed"),
    ("down/kernel", "layers embed mlp"),
    ("down/bias", "layers mlp"),
    ("conv/kernel", "layers taps mlp"),
    ("conv/bias", "layers mlp"),
    ("up/kernel", "layers mlp embed"),
    ("up/bias", "layers embed"),
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU, computed in float32: f[...] -> f[...]."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


class DepthwiseConv(nn.Module):
    """Convolution over time with one filter per channel: f[B, T, P, C] -> f[B, T, P, C].

    Frames before the first and after the last one count as zeros. The kernel is f[3, C], taps in the order of time.
    """

    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[B, T, P, C] -> f[B, T, P, C]."""
        dtype, frames = jnp.dtype(self.dtype), x.shape[1]
        init = layers.torch_linear(TAPS)
        kernel = self.param("kernel", init, (TAPS, x.shape[-1])).astype(dtype)
        bias = self.param("bias", init, (x.shape[-1],)).astype(dtype)
        padded = jnp.pad(x, ((0, 0), (TAPS // 2, TAPS // 2), (0, 0), (0, 0)))
        return sum((padded[:, i : i + frames] * kernel[i] for i in range(TAPS)), start=bias)


class ConvAdapter(nn.Module):
    """Norm, bottleneck, depthwise convolution over time, quick GELU and projection: f[B, T, P, D] -> f[B, T, P, D].

    The last projection starts at zero, so a fresh adapter leaves the tower as it was.
    """

    width: int  # Width of the bottleneck C.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[B, T, P, D] -> f[B, T, P, D]."""
        d, dtype = x.shape[-1], jnp.dtype(self.dtype)
        init, zeros = layers.torch_linear(d), nn.initializers.zeros
        y = layers.norm("norm", ADAPTER_EPS, self.dtype)(x)
        y = layers.Dense(self.width, kernel_init=init, bias_init=init, dtype=dtype, name="down")(y)  # [B, T, P, C]
        y = quick_gelu(DepthwiseConv(self.dtype, name="conv")(layers.kept(y)))
        return layers.kept(layers.Dense(d, kernel_init=zeros, bias_init=zeros, dtype=dtype, name="up")(y))
