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
    activation: bool = (
        True  # Applies quick GELU after the convolution; without it the adapter is linear after its norm.
    )

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[B, T, P, D] -> f[B, T, P, D]."""
        d, dtype = x.shape[-1], jnp.dtype(self.dtype)
        init, zeros = layers.torch_linear(d), nn.initializers.zeros
        y = layers.norm("norm", ADAPTER_EPS, self.dtype)(x)
        y = layers.Dense(self.width, kernel_init=init, bias_init=init, dtype=dtype, name="down")(y)  # [B, T, P, C]
        y = DepthwiseConv(self.dtype, name="conv")(layers.kept(y))
        y = quick_gelu(y) if self.activation else y
        return layers.kept(layers.Dense(d, kernel_init=zeros, bias_init=zeros, dtype=dtype, name="up")(y))


class TubePatch(nn.Module):
    """Linear projection of patches of one frame, or of three neighbouring ones; kernel [1 or 3, p, p, 3, D], without a bias.

    Frames before the first and after the last one count as zeros.
    """

    patch_size: int  # Side of a patch in pixels.
    stride: int  # Distance between the middle frames of two outputs; 0 projects frames one by one.
    width: int  # Width of the output D.
    std: float  # Standard deviation of the initial kernel.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, video: jax.Array) -> jax.Array:
        """Project f[B, T, S, S, 3] -> f[B, T', P, D], patches row by row; T' is T, or (T - 1) // stride + 1."""
        size, dtype = self.patch_size, jnp.dtype(self.dtype)
        b, t, height, width, _ = video.shape
        count = TAPS if self.stride else 1
        shape = (count, size, size, 3, self.width)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape).astype(dtype)
        padded = jnp.pad(video.astype(dtype), ((0, 0), (count // 2, count // 2), (0, 0), (0, 0), (0, 0)))
        taps = jnp.stack([padded[:, i : i + t : self.stride or 1] for i in range(count)], axis=2)  # [B, T', taps, ...]
        x = taps.reshape(b, -1, count, height // size, size, width // size, size, 3)
        return jnp.einsum("btnypxqc,npqcd->btyxd", x, kernel).reshape(b, x.shape[1], -1, self.width)


def inflate(kernel: jax.Array, taps: int, *, spread: bool = False) -> jax.Array:
    """Make a kernel of `TubePatch` for one frame one for several: f[1, p, p, 3, D] -> f[taps, p, p, 3, D].

    Args:
      kernel: of one frame.
      taps: number of frames that a patch reaches over.
      spread: gives every frame an equal part of the kernel. Otherwise the middle frame gets all of it and the others get zeros,
        so that the tower starts as it saw images.

    Raises:
      ValueError: the kernel already reaches over several frames.
    """
    if len(kernel) != 1:
        raise ValueError(
            f"patch/kernel: a kernel over {len(kernel)} frames cannot become one over {taps}; set config.model.vision.temporal_stride "
            "as the checkpoint's model has it"
        )
    if spread:
        return jnp.broadcast_to(kernel / taps, (taps, *kernel.shape[1:]))
    return jnp.zeros((taps, *kernel.shape[1:]), kernel.dtype).at[taps // 2].set(kernel[0])


def resize_patch(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`inflate` for a checkpoint whose patches see one frame: f[1, p, p, 3, D] -> f[taps, p, p, 3, D], the wanted shape.

    Raises:
      ValueError: the patches differ in more than their frames.
    """
    if kernel.shape[1:] != tuple(shape[1:]):
        raise ValueError(
            f"patch/kernel: the checkpoint's is {kernel.shape}, the model's {tuple(shape)}; set config.model.vision.patch_size and "
            "config.model.vision.width as the checkpoint's model has them"
        )
    return inflate(kernel, shape[0])
