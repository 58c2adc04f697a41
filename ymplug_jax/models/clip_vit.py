"""CLIP's image tower with temporal adapters: the vision model of the chat model (docs/models/mplug_chat.md).

Radford et al., "Learning transferable visual models from natural language supervision", 2021, for the tower. Frames are encoded
one by one; an adapter before each block mixes the patches of neighbouring frames. There is no table of times, so that a model
takes any number of frames. A still image is a clip of one frame and passes no adapter.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core.sharding import constrain
from ymplug_jax.models import attention, layers, temporal
from ymplug_jax.models.timesformer import Patch

EPS = 1e-6
STD = 0.02

# Axis words of this tower's parameters, by path below the tower.
AXES = (
    ("cls", "embed"),
    ("pos_embed", "pos embed"),
    ("patch/kernel", "patch patch patch embed"),
    ("(norm_pre|norm)/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
    *((f"blocks/temporal/{path}", words) for path, words in temporal.ADAPTER_AXES),
)
TEMPORAL = "blocks/temporal/.*"  # what an image tower lacks


class Mlp(nn.Module):
    """Two linear layers with quick GELU between them: f[..., D] -> f[..., D]."""

    hidden: int  # Width between the layers M.
    std: float  # Standard deviation of the initial kernels.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., D] -> f[..., D]."""
        normal, dtype = nn.initializers.normal(self.std), jnp.dtype(self.dtype)
        up = layers.kept(layers.Dense(self.hidden, kernel_init=normal, dtype=dtype, name="up")(x))  # [..., M]
        down = layers.Dense(x.shape[-1], kernel_init=normal, dtype=dtype, name="down")
        return layers.kept(down(temporal.quick_gelu(up)))


class Block(nn.Module):
    """Adapter (clips only), attention within each frame, MLP; the state is f[M, T, 1 + P, D], cls first."""

    heads: int  # Number of attention heads.
    mlp: int  # Width of the MLP M.
    double_cls: bool  # Adds the cls token to itself in clips.
    std: float  # Standard deviation of the initial kernels.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """f[M, T, 1 + P, D] -> (the same shape, None)."""
        x = constrain(x, "batch", None, None, None)
        m, t, n, d = x.shape
        if t > 1:
            adapted = temporal.ConvAdapter(d // 2, self.dtype, name="temporal")(x[:, :, 1:])
            cls = x[:, :, :1] if self.double_cls else jnp.zeros_like(x[:, :, :1])
            x = x + jnp.concatenate([cls, adapted], axis=2)
        normal = nn.initializers.normal(self.std)
        attn = layers.Attention(d, self.heads, normal, normal, flat=True, dtype=self.dtype, name="attn")
        y = layers.norm("attn_norm", EPS, self.dtype)(x).reshape(m * t, n, d)
        q, k, v = (z.reshape(m * t, n, self.heads, -1) for z in attn.project(y))
        x = x + attn.output(attention.attend(q, k, v, flat=True).reshape(m * t, n, d)).reshape(x.shape)
        return x + Mlp(self.mlp, self.std, self.dtype, name="mlp")(layers.norm("mlp_norm", EPS, self.dtype)(x)), None


class ClipViT(nn.Module):
    """Images or clips -> tokens. The fields are its settings."""

    image_size: int = 224  # Height and width of a frame S, in pixels.
    patch_size: int = 14  # Height and width of a patch, in pixels.
    depth: int = 24  # Number of layers.
    width: int = 1024  # Width of the tokens D; the adapters have half of it inside.
    heads: int = 16  # Number of attention heads.
    mlp: int = 4096  # Width of the MLP M.
    # Adds the cls token of a clip to itself before every block, as the released chat weights need.
    double_cls: bool = False
    std: float = STD  # Standard deviation of the initial kernels; CLIP's, which is meant for large widths.
    table_std: float = STD  # Standard deviation of the initial cls token and positions.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms, softmax and activations stay float32.

    @nn.compact
    def __call__(self, media: jax.Array) -> jax.Array:
        """Normalised frames f[M, T, S, S, 3] -> tokens f[M, T, 1 + P, D] after the last norm, cls first in each frame.

        T = 1 stands for still images. Initialise with T > 1: otherwise the adapters have no parameters.

        Raises:
          ValueError: frames of another size than `image_size`.
        """
        size, d, dtype = self.image_size, self.width, jnp.dtype(self.dtype)
        if media.shape[2:] != (size, size, 3):
            raise ValueError(
                f"config.data.image_size: the frames have shape {media.shape}, but the vision tower expects [media, frames, {size}, {size}, 3]; "
                "change data.image_size or the model's image_size"
            )
        normal = nn.initializers.normal(self.table_std)
        x = Patch(self.patch_size, d, bias=False, std=self.std, dtype=self.dtype, name="patch")(media)  # [M, T, P, D]
        cls = jnp.broadcast_to(self.param("cls", normal, (d,)).astype(dtype), (*x.shape[:2], 1, d))
        x = jnp.concatenate([cls, x], axis=2)  # [M, T, 1 + P, D]
        x = x + self.param("pos_embed", normal, x.shape[2:]).astype(dtype)
        x = layers.norm("norm_pre", EPS, self.dtype)(x)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=())
        x, _ = blocks(
            heads=self.heads, mlp=self.mlp, double_cls=self.double_cls, std=self.std, dtype=self.dtype, name="blocks"
        )(x)
        return layers.norm("norm", EPS, self.dtype)(x)


SIZES = {
    "l14": ClipViT(),
    "tiny": ClipViT(image_size=64, patch_size=16, depth=2, width=64, heads=4, mlp=256),
}
