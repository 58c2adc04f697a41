"""TimeSformer, the video encoder of mPLUG-video and ALPRO: divided space-time attention.

Bertasius et al., "Is space-time attention all you need for video understanding?", 2021, in the form of Youku-mPLUG: each
video has one cls token, which skips temporal attention and is averaged over the frames after spatial attention. Described
in docs/models/mplug_video.md, "Video encoder".
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core.sharding import constrain
from ymplug_jax.models import attention, layers

EPS = 1e-6  # epsilon of every LayerNorm in the video encoder

# Logical axes of the parameters, by path below the video encoder.
AXES = (
    ("cls", "embed"),
    ("(pos_embed|temporal_embed)", "pos embed"),
    ("patch/kernel", "patch patch patch embed"),
    ("patch/bias", "embed"),
    ("(norm_pre|norm)/(scale|bias)", "embed"),
    ("blocks/(temporal_norm|attn_norm|mlp_norm)/(scale|bias)", "layers embed"),
    ("blocks/(temporal_attn|attn)/[qkv]/kernel", "layers embed heads head_dim"),
    ("blocks/(temporal_attn|attn)/[qv]/bias", "layers heads head_dim"),
    ("blocks/(temporal_attn|attn)/o/kernel", "layers heads head_dim embed"),
    ("blocks/(temporal_attn|attn)/o/bias", "layers embed"),
    ("blocks/temporal_fc/kernel", "layers embed embed"),
    ("blocks/temporal_fc/bias", "layers embed"),
    ("blocks/mlp/up/kernel", "layers embed mlp"),
    ("blocks/mlp/up/bias", "layers mlp"),
    ("blocks/mlp/down/kernel", "layers mlp embed"),
    ("blocks/mlp/down/bias", "layers embed"),
)


class Patch(nn.Module):
    """Linear projection of non-overlapping patches, kernel [p, p, 3, D]."""

    patch_size: int  # Side of a patch in pixels.
    width: int  # Width of the output D.
    bias: bool  # Adds a bias.
    std: float  # Standard deviation of the initial kernel.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, video: jax.Array) -> jax.Array:
        """Project f[B, T, S, S, 3] -> f[B, T, P, D], patches row by row."""
        size, dtype = self.patch_size, jnp.dtype(self.dtype)
        b, t, height, width, _ = video.shape
        kernel = self.param("kernel", nn.initializers.normal(self.std), (size, size, 3, self.width))
        x = video.astype(dtype).reshape(b, t, height // size, size, width // size, size, 3)
        # A matrix product, because its gradient is faster than that of a convolution.
        x = jnp.einsum("btypxqc,pqcd->btyxd", x, kernel.astype(dtype))
        x = x.reshape(b, t, -1, self.width)  # [B, T, P, D]
        return x + self.param("bias", nn.initializers.zeros, (self.width,)).astype(dtype) if self.bias else x


class Block(nn.Module):
    """Temporal attention, spatial attention and MLP over patch tokens f[B, T, P, D] and one cls token f[B, D]."""

    width: int  # Width D.
    heads: int  # Number of attention heads.
    mlp_ratio: float  # Width of the MLP as a multiple of D.
    std: float  # Standard deviation of the initial kernels.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], layer_and_rate: tuple[jax.Array, jax.Array | None]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Run one block.

        Args:
          carry: patch tokens f[B, T, P, D] and cls f[B, D].
          layer_and_rate: int32 index of the block, and its rate of stochastic depth or None.

        Returns:
          The updated carry, and None for `nn.scan`.
        """
        (x, cls), (layer, rate) = _by_rows(*carry), layer_and_rate
        b, t, p, d = x.shape
        normal = nn.initializers.normal(self.std)

        def shrunk(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
            # Outputs on the residual path start smaller in deeper blocks.
            return normal(key, shape, dtype) / jnp.sqrt(2.0 * (layer + 1))

        def staying(y: jax.Array, rows: tuple[int, ...]) -> jax.Array:
            """Apply stochastic depth: drop each entry of the shape `rows` independently and rescale the others."""
            if rate is None:
                return y
            stays = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, rows)
            return jnp.where(stays, y / (1 - rate), 0).astype(y.dtype)

        def attn(name: str, out_init: layers.Initializer, flat: bool) -> layers.Attention:
            return layers.Attention(
                d, self.heads, normal, out_init, key_bias=False, flat=flat, dtype=self.dtype, name=name
            )

        temporal = attn("temporal_attn", normal, flat=True)
        q, k, v = temporal.project(layers.norm("temporal_norm", EPS, self.dtype)(x))  # [B, T, P, D] each
        y = temporal.output(attention.attend_frames(q, k, v, self.heads))
        zeros = nn.initializers.zeros
        fc = layers.Dense(d, kernel_init=zeros, bias_init=zeros, dtype=jnp.dtype(self.dtype), name="temporal_fc")
        x = x + layers.kept(fc(staying(y, (b, 1, p, 1))))

        frame = jnp.concatenate([jnp.broadcast_to(cls[:, None, None], (b, t, 1, d)), x], axis=2)  # [B, T, 1 + P, D]
        spatial = attn("attn", shrunk, flat=False)
        frame = layers.norm("attn_norm", EPS, self.dtype)(frame).reshape(b * t, 1 + p, d)  # [B * T, 1 + P, D]
        y = attention.attend(*spatial.project(frame))  # [B * T, 1 + P, N, H]
        y = staying(spatial.output(y).reshape(b, t, 1 + p, d), (b, t, 1, 1))
        x, cls = x + y[:, :, 1:], cls + y[:, :, 0].mean(axis=1)

        mlp_norm = layers.norm("mlp_norm", EPS, self.dtype)
        mlp = layers.Mlp(int(self.mlp_ratio * d), normal, shrunk, dtype=self.dtype, name="mlp")
        if rate is None:
            return _by_rows(x + mlp(mlp_norm(x)), cls + mlp(mlp_norm(cls))), None
        both = jnp.concatenate([cls[:, None], x.reshape(b, t * p, d)], axis=1)  # [B, 1 + T * P, D], dropped together
        both = both + staying(mlp(mlp_norm(both)), (b, 1, 1))
        return _by_rows(both[:, 1:].reshape(b, t, p, d), both[:, 0]), None


def _by_rows(x: jax.Array, cls: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shard activations over the batch only, so that with fsdp the weights are gathered and the activations stay."""
    return constrain(x, "batch", None, None, None), constrain(cls, "batch", None)


class TimeSformer(nn.Module):
    """Video encoder; its fields are its settings."""

    image_size: int = 224  # Side of the square frames S, in pixels.
    patch_size: int = 16  # Side of a patch, in pixels.
    depth: int = 12  # Number of blocks.
    width: int = 768  # Width of the tokens D.
    heads: int = 8  # Number of attention heads; released models run ViT-B/16 with 8, CLIP trained it with 12.
    mlp_ratio: float = 4.0  # Width of the MLP as a multiple of D.
    frames: int = 4  # Number of frames T.
    clip: bool = True  # CLIP's form: a LayerNorm before the blocks and no bias in the patch projection.
    drop_path: float = 0.0  # Rate of stochastic depth in the last block; it grows linearly from 0 in the first.
    std: float = 0.015  # Standard deviation of the initial weights; the reference's value, meant for a width of 768.
    # The reference starts positions like every weight and times at 0, which suits a tower with image weights only.
    table_std: float = 0.0  # Standard deviation of the initial position and time tables; 0 keeps the reference's start.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; parameters and norms stay float32.

    @nn.compact
    def __call__(self, video: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode a video.

        Args:
          video: f[B, T, S, S, 3], normalised.
          deterministic: False applies stochastic depth, which needs the random stream "dropout".

        Returns:
          f[B, 1 + T * P, D]: cls, then the patches frame by frame.

        Raises:
          ValueError: the number of frames or their size is not that of the fields.
        """
        size, t, d = self.image_size, self.frames, self.width
        if video.shape[1:] != (t, size, size, 3):
            raise ValueError(
                f"config.data.frames, config.data.image_size: the video has shape {video.shape}, but the vision tower expects "
                f"[batch, {t}, {size}, {size}, 3]; set them to config.model.vision.frames and image_size"
            )
        dtype, normal = jnp.dtype(self.dtype), nn.initializers.normal(self.std)
        positions, times = normal, nn.initializers.zeros
        if self.table_std:
            positions = times = nn.initializers.normal(self.table_std)
        patches = (size // self.patch_size) ** 2
        x = Patch(self.patch_size, d, bias=not self.clip, std=self.std, dtype=self.dtype, name="patch")(
            video
        )  # [B, T, P, D]
        cls = self.param("cls", normal, (d,)).astype(dtype)
        pos = self.param("pos_embed", positions, (1 + patches, d)).astype(dtype)
        temporal = self.param("temporal_embed", times, (t, d)).astype(dtype)
        x = x + pos[1:] + temporal[:, None]
        cls = jnp.broadcast_to(cls + pos[0], (x.shape[0], d))  # [B, D]
        if self.clip:
            norm_pre = layers.norm("norm_pre", EPS, self.dtype)
            x, cls = norm_pre(x), norm_pre(cls)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=0)
        blocks = blocks(
            width=d, heads=self.heads, mlp_ratio=self.mlp_ratio, std=self.std, dtype=self.dtype, name="blocks"
        )
        rates = None if deterministic or not self.drop_path else jnp.linspace(0, self.drop_path, self.depth)
        (x, cls), _ = blocks(_by_rows(x, cls), (jnp.arange(self.depth), rates))
        tokens = jnp.concatenate([cls[:, None], x.reshape(x.shape[0], -1, d)], axis=1)  # [B, 1 + T * P, D]
        return layers.norm("norm", EPS, self.dtype)(tokens)
