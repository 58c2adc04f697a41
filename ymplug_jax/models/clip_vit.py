"""CLIP's image tower with temporal adapters: the vision models of the chat model and of mPLUG-2.

Radford et al., "Learning transferable visual models from natural language supervision", 2021, for the tower. Frames are encoded
one by one; adapters mix the patches of neighbouring frames. There is no table of times, so that a model takes any number of
frames. `ClipViT` is described in docs/models/mplug_chat.md, `VideoClipViT` in docs/models/mplug2.md.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core.sharding import constrain
from ymplug_jax.models import attention, layers, temporal
from ymplug_jax.models.timesformer import Patch

EPS = 1e-6  # epsilon of every LayerNorm of the chat model's tower
VIDEO_EPS = 1e-5  # that of mPLUG-2's tower, as in CLIP
STD = 0.02

_COMMON_AXES = (
    ("cls", "embed"),
    ("pos_embed", "pos embed"),
    ("(norm_pre|norm)/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
)
# Axis words of the parameters of `ClipViT` and of `VideoClipViT`, by path below the tower.
AXES = (
    *_COMMON_AXES,
    ("patch/kernel", "patch patch patch embed"),
    *((f"blocks/temporal/{path}", words) for path, words in temporal.ADAPTER_AXES),
)
VIDEO_AXES = (
    *_COMMON_AXES,
    ("patch/kernel", "taps patch patch patch embed"),
    *((f"blocks/temporal_[12]/{path}", words) for path, words in temporal.ADAPTER_AXES),
)
TEMPORAL = "blocks/temporal/.*"  # what an image tower lacks
VIDEO_TEMPORAL = "blocks/temporal_[12]/.*"


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


def _attended(x: jax.Array, heads: int, eps: float, std: float, dtype: str) -> jax.Array:
    """Attention within each frame, as part of a block's compact method: f[M, T, N, D] -> f[M, T, N, D]."""
    m, t, n, d = x.shape
    normal = nn.initializers.normal(std)
    attn = layers.Attention(d, heads, normal, normal, flat=True, dtype=dtype, name="attn")
    y = layers.norm("attn_norm", eps, dtype)(x).reshape(m * t, n, d)
    q, k, v = (z.reshape(m * t, n, heads, -1) for z in attn.project(y))
    return attn.output(attention.attend(q, k, v, flat=True).reshape(m * t, n, d)).reshape(x.shape)


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
        if x.shape[1] > 1:
            adapted = temporal.ConvAdapter(x.shape[-1] // 2, self.dtype, name="temporal")(x[:, :, 1:])
            cls = x[:, :, :1] if self.double_cls else jnp.zeros_like(x[:, :, :1])
            x = x + jnp.concatenate([cls, adapted], axis=2)
        x = x + _attended(x, self.heads, EPS, self.std, self.dtype)
        return x + Mlp(self.mlp, self.std, self.dtype, name="mlp")(layers.norm("mlp_norm", EPS, self.dtype)(x)), None


def _check(media: jax.Array, size: int) -> None:
    if media.shape[2:] != (size, size, 3):
        raise ValueError(
            f"config.data.image_size: the frames have shape {media.shape}, but the vision tower expects [media, frames, {size}, {size}, 3]; "
            "change data.image_size or the model's image_size"
        )


class ClipViT(nn.Module):
    """Images or clips -> tokens. The fields are its settings. A still image is a clip of one frame and passes no adapter."""

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
        _check(media, size)
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


class VideoBlock(nn.Module):
    """Attention within each frame and MLP, with an adapter before each or before the first; f[B, T, 1 + P, D], cls first."""

    heads: int  # Number of attention heads.
    mlp: int  # Width of the MLP M.
    adapters: int  # Number of adapters, 1 or 2; 0 runs none.
    reduction: float  # D divided by the width inside an adapter.
    activation: bool  # Applies quick GELU inside the adapters.
    std: float  # Standard deviation of the initial kernels.
    dtype: str  # Type of the computation.

    def adapted(self, x: jax.Array, number: int) -> jax.Array:
        """Add the output of adapter `number` to the patches; cls passes: f[B, T, 1 + P, D] -> the same shape."""
        if number > self.adapters:
            return x
        width = int(x.shape[-1] // self.reduction)
        adapter = temporal.ConvAdapter(width, self.dtype, self.activation, name=f"temporal_{number}")
        return x + jnp.pad(adapter(x[:, :, 1:]), ((0, 0), (0, 0), (1, 0), (0, 0)))

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """f[B, T, 1 + P, D] -> (the same shape, None)."""
        x = self.adapted(constrain(x, "batch", None, None, None), 1)
        x = self.adapted(x + _attended(x, self.heads, VIDEO_EPS, self.std, self.dtype), 2)
        norm = layers.norm("mlp_norm", VIDEO_EPS, self.dtype)
        return x + Mlp(self.mlp, self.std, self.dtype, name="mlp")(norm(x)), None


class VideoClipViT(nn.Module):
    """Clips -> tokens; CLIP's tower with local temporal modules. The fields are its settings.

    The adapters also run on clips of one frame, unless `stills` is set.
    """

    image_size: int = 224  # Height and width of a frame S, in pixels.
    patch_size: int = 16  # Height and width of a patch, in pixels.
    depth: int = 12  # Number of layers.
    width: int = 768  # Width of the tokens D.
    heads: int = 12  # Number of attention heads.
    mlp: int = 3072  # Width of the MLP M.
    adapters: int = 2  # Adapters in a layer: 2, before attention and before the MLP, as released; 1, before attention.
    reduction: float = 2.0  # Width D divided by the width inside an adapter, rounded down.
    activation: bool = True  # Applies quick GELU inside the adapters; False makes them linear after their norm.
    stills: bool = (
        False  # Clips of one frame pass the adapters, as still images do in the paper; the released code runs them.
    )
    # Stride over the frames of patches that reach over three frames, which shortens the clip; 0 projects frames one by one.
    temporal_stride: int = 0
    std: float = STD  # Standard deviation of the initial kernels; CLIP's, which is meant for large widths.
    table_std: float = STD  # Standard deviation of the initial cls token and positions.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms, softmax and activations stay float32.

    @nn.compact
    def __call__(self, video: jax.Array, *, merged: bool = True) -> jax.Array:
        """Encode a normalised video.

        Args:
          video: f[B, T, S, S, 3]; any number of frames.
          merged: averages the cls tokens of the frames and joins their patches, frame by frame. False keeps the frames apart.

        Returns:
          f[B, 1 + T' * P, D] after the last norm, cls first; without `merged` f[B, T', 1 + P, D]. T' is `frames_out(T)`.

        Raises:
          ValueError: frames of another size than `image_size`, or settings of the adapters that cannot be built.
        """
        d, dtype = self.width, jnp.dtype(self.dtype)
        _check(video, self.image_size)
        if self.adapters not in (1, 2):
            raise ValueError(
                f"config.model.vision.adapters: a layer has 1 or 2 adapters, not {self.adapters}; use 1 or 2"
            )
        if not 1 <= self.reduction <= d:
            raise ValueError(
                f"config.model.vision.reduction: {self.reduction} leaves an adapter no width of {d}; choose 1 to {d}"
            )
        normal = nn.initializers.normal(self.table_std)
        patch = temporal.TubePatch(self.patch_size, self.temporal_stride, d, self.std, self.dtype, name="patch")
        x = patch(video)  # [B, T', P, D]
        cls = jnp.broadcast_to(self.param("cls", normal, (d,)).astype(dtype), (*x.shape[:2], 1, d))
        x = jnp.concatenate([cls, x], axis=2)  # [B, T', 1 + P, D]
        x = x + self.param("pos_embed", normal, x.shape[2:]).astype(dtype)
        x = layers.norm("norm_pre", VIDEO_EPS, self.dtype)(x)
        skipped = self.stills and video.shape[1] == 1 and not self.is_initializing()
        x, _ = layers.stack(VideoBlock, self.depth, remat=self.remat, in_axes=())(
            heads=self.heads,
            mlp=self.mlp,
            adapters=0 if skipped else self.adapters,
            reduction=self.reduction,
            activation=self.activation,
            std=self.std,
            dtype=self.dtype,
            name="blocks",
        )(x)
        if merged:
            x = jnp.concatenate([x[:, :, 0].mean(axis=1, keepdims=True), x[:, :, 1:].reshape(len(x), -1, d)], axis=1)
        return layers.norm("norm", VIDEO_EPS, self.dtype)(x)

    def frames_out(self, frames: int) -> int:
        """Number of frames T' that the tokens stand for, of `frames` given ones."""
        return (frames - 1) // self.temporal_stride + 1 if self.temporal_stride else frames


SIZES = {
    "l14": ClipViT(),
    "tiny": ClipViT(image_size=64, patch_size=16, depth=2, width=64, heads=4, mlp=256),
}
VIDEO_SIZES = {
    "b16": VideoClipViT(),
    "l14": VideoClipViT(patch_size=14, depth=24, width=1024, heads=16, mlp=4096),
    "tiny": VideoClipViT(image_size=64, patch_size=16, depth=2, width=64, heads=4, mlp=256),
}
