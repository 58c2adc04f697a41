"""Qwen's dense decoders: Qwen2 and Qwen2.5 with biases on q, k and v, Qwen3 with norms on q and k.

Yang et al., "Qwen2 technical report", 2024; Qwen team, "Qwen2.5 technical report", 2024, and "Qwen3 technical report", 2025.
Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention and a gated MLP. Described in
docs/models/language_models.md, "Qwen".
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import language_model, layers, lora
from ymplug_jax.models.language_model import Cache, Context, Past

STD = 0.02

AXES = (
    ("token_embed", "vocab embed"),
    ("norm/scale", "embed"),
    ("head/kernel", "embed vocab"),
    ("blocks/(attn_norm|mlp_norm)/scale", "layers embed"),
    ("blocks/attn/q/kernel", "layers embed heads head_dim"),
    ("blocks/attn/q/bias", "layers heads head_dim"),
    ("blocks/attn/[kv]/kernel", "layers embed kv_heads head_dim"),
    ("blocks/attn/[kv]/bias", "layers kv_heads head_dim"),
    ("blocks/attn/[qk]_norm/scale", "layers head_dim"),
    ("blocks/attn/o/kernel", "layers heads head_dim embed"),
    ("blocks/mlp/(gate|up)/kernel", "layers embed mlp"),
    ("blocks/mlp/down/kernel", "layers mlp embed"),
    *lora.AXES,
)
# Layers that may have adapters.
LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


class Block(nn.Module):
    """Pre-norm attention and gated MLP; writes its keys and values into the cache if there is one."""

    heads: int  # Number of attention heads N.
    kv_heads: int  # Number of key/value heads K.
    head_dim: int  # Size of a head H.
    mlp: int  # Width of the MLP M.
    norm_eps: float  # Epsilon of the norms.
    qkv_bias: bool  # Adds biases to q, k and v.
    qk_norm: bool  # Normalises q and k.
    adapters: lora.Settings  # LoRA adapters.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        layer: jax.Array,
        context: Context,
        rotation: tuple[jax.Array, jax.Array],
        deterministic: bool,
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Run one block.

        Args:
          carry: states f[..., L, D], and the cache of all layers or None.
          layer: int32 index of the block.
          context: of the pass.
          rotation: cosine and sine of `layers.rotation_of`.
          deterministic: False applies the dropout of the adapters.

        Returns:
          The updated carry, and None for `nn.scan`.
        """
        x, cache = carry
        normal = nn.initializers.normal(STD)
        attn = layers.Attention(
            x.shape[-1], self.heads, normal, normal, kv_heads=self.kv_heads, head_dim=self.head_dim,
            qkv_bias=self.qkv_bias, out_bias=False, qk_norm_eps=self.norm_eps if self.qk_norm else None,
            dtype=self.dtype, name="attn",
        )  # fmt: skip
        update = lora.update_of(self.adapters, LINEARS, fused=False, deterministic=deterministic, dtype=self.dtype)
        q, k, v = attn.project(layers.rms_norm("attn_norm", self.norm_eps, self.dtype)(x), update=update)
        q, k = layers.rotate(q, rotation), layers.rotate(k, rotation)
        y, cache = language_model.attend(q, k, v, cache, layer, context)  # [..., L, N, H]
        x = x + attn.output(y, update)
        mlp = layers.GatedMlp(self.mlp, normal, dtype=self.dtype, name="mlp")
        return (x + mlp(layers.rms_norm("mlp_norm", self.norm_eps, self.dtype)(x), update), cache), None


class Qwen(nn.Module):
    """Qwen as a `language_model.LanguageModel`; its fields are its settings."""

    kind: ClassVar[str] = "qwen"  # Name of the decoder in the settings of a run.
    vocab: int = 151936  # Number of rows of the word embeddings V.
    width: int = 1536  # Width of embeddings and hidden states D.
    depth: int = 28  # Number of layers.
    heads: int = 12  # Number of attention heads N.
    kv_heads: int = 2  # Number of key/value heads K, which must divide the attention heads.
    head_dim: int = 128  # Size of a head H, an even number; heads times head_dim may differ from the width.
    mlp: int = 8960  # Width of the gated MLP M.
    rope_theta: float = 1e6  # Base of the rotary wavelengths.
    norm_eps: float = 1e-6  # Epsilon of the RMSNorms.
    qkv_bias: bool = True  # Adds biases to q, k and v, as in Qwen2 and Qwen2.5.
    qk_norm: bool = False  # Normalises q and k of every head, as in Qwen3.
    tied: bool = True  # Uses the word embeddings as the output layer; False gives it a matrix of its own.
    max_positions: int | None = 131072  # Longest row that the model was trained for; None removes the limit.
    lora_rank: int = 0  # Rank R of trained LoRA adapters; 0 leaves them out.
    lora_scale: float = 1.0  # Factor of the adapters' output, alpha / R.
    lora_dropout: float = 0.0  # Dropout rate on the adapters' input in training.
    lora_targets: tuple[str, ...] = ("attn/[qkv]",)  # Path regexes of the linear layers of a block that get adapters.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms, softmax and output logits stay float32.

    prefill = language_model.prefill
    open_branches = language_model.open_branches
    branch = language_model.branch

    def setup(self) -> None:
        """Create the embeddings, the stack of blocks, the final norm and, if it is not tied, the output layer."""
        normal = nn.initializers.normal(STD)
        self.token_embed = self.param("token_embed", normal, (self.vocab, self.width))
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(5,))
        self.blocks = blocks(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, mlp=self.mlp, norm_eps=self.norm_eps,
            qkv_bias=self.qkv_bias, qk_norm=self.qk_norm, dtype=self.dtype,
            adapters=lora.Settings(self.lora_rank, self.lora_scale, self.lora_dropout, self.lora_targets),
        )  # fmt: skip
        self.norm = layers.rms_norm(None, self.norm_eps, self.dtype)
        if not self.tied:
            self.head = layers.OutputLayer(self.vocab, normal, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """See `LanguageModel.embed`."""
        return layers.look_up(self.token_embed, ids, self.dtype)

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """See `LanguageModel`; the only dropout is that of the adapters."""
        return self.read(embeds, mask, None, None, deterministic, segments)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `LanguageModel.logits`."""
        return layers.tied_logits(self.token_embed, hidden, self.dtype) if self.tied else self.head(hidden)

    def empty(self, before: tuple[int, ...], length: int) -> Cache:
        """See `language_model.Cached.empty`."""
        return language_model.empty_cache(before, self.depth, self.kv_heads, length, self.head_dim, self.dtype)

    def read(
        self,
        embeds: jax.Array,
        mask: jax.Array | None,
        cache: Cache | None,
        past: Past | None,
        deterministic: bool = True,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """See `language_model.Cached.read`."""
        length = embeds.shape[-2]
        language_model.check_positions(language_model.longest(length, segments), self.max_positions)
        context = language_model.context_of(length, mask, past, segments)
        rotation = layers.rotation_of(context.positions, self.head_dim, self.rope_theta)  # [B or 1, L, H / 2] each
        if past is not None:
            rotation = rotation[0][:, None], rotation[1][:, None]  # the same in all branches
        carry = embeds.astype(jnp.dtype(self.dtype)), cache
        (x, filled), _ = self.blocks(carry, jnp.arange(self.depth), context, rotation, deterministic)
        return self.norm(x), filled


_QWEN3 = Qwen(max_positions=40960, qkv_bias=False, qk_norm=True)
SIZES = {
    "qwen2.5-1.5b": Qwen(),
    "qwen2.5-7b": Qwen(vocab=152064, width=3584, heads=28, kv_heads=4, mlp=18944, tied=False),
    "qwen3-1.7b": _QWEN3.clone(width=2048, heads=16, kv_heads=8, mlp=6144),
    "qwen3-8b": _QWEN3.clone(width=4096, depth=36, heads=32, kv_heads=8, mlp=12288, tied=False),
    "qwen-tiny": _QWEN3.clone(
        vocab=512, width=96, depth=3, heads=4, kv_heads=2, head_dim=32, mlp=256, max_positions=128
    ),
}
