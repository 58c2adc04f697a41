"""GPT-3 in Megatron's pre-norm form with a tied output layer, as mPLUG-video uses it (1.3B, 2.7B).

Positions are rows of a learned table and count visual vectors too. Described in docs/models/language_models.md, "GPT-3".
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
    ("pos_embed", "pos embed"),
    ("norm/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
    *lora.FUSED_AXES,
)
LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")  # Layers that may have adapters.


class Block(nn.Module):
    """Pre-norm attention and MLP; writes its keys and values into the cache if there is one."""

    heads: int  # Number of attention heads.
    depth: int  # Number of layers, which scales the initial output kernels.
    ln_eps: float  # Epsilon of the norms.
    dropout: float  # Dropout rate in training.
    adapters: lora.Settings  # LoRA adapters.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: jax.Array, context: Context, deterministic: bool
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Run one block.

        Args:
          carry: states f[..., L, D], and the cache of all layers or None.
          layer: int32 index of the block.
          context: of the pass.
          deterministic: False applies dropout.

        Returns:
          The updated carry, and None for `nn.scan`.
        """
        x, cache = carry
        d, rate = x.shape[-1], 0.0 if deterministic else self.dropout
        normal, shrunk = nn.initializers.normal(STD), nn.initializers.normal(STD * (2 * self.depth) ** -0.5)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        attn = layers.Attention(d, self.heads, normal, shrunk, dtype=self.dtype, name="attn")
        update = lora.update_of(self.adapters, LINEARS, fused=True, deterministic=deterministic, dtype=self.dtype)
        q, k, v = attn.project(layers.norm("attn_norm", self.ln_eps, self.dtype)(x), update=update)  # [..., L, N, H]
        key = self.make_rng("dropout") if rate > 0 else None
        y, cache = language_model.attend(q, k, v, cache, layer, context, dropout=rate, key=key)  # [..., L, N, H]
        x = x + drop(attn.output(y, update))

        mlp = layers.Mlp(4 * d, normal, shrunk, tanh=True, dtype=self.dtype, name="mlp")
        return (x + drop(mlp(layers.norm("mlp_norm", self.ln_eps, self.dtype)(x), update)), cache), None


class GPT3(nn.Module):
    """GPT-3 as a `language_model.LanguageModel`; its fields are its settings."""

    kind: ClassVar[str] = "gpt3"  # Name of the decoder in the settings of a run.
    vocab: int = 51200  # Number of rows of the word embeddings V.
    width: int = 2048  # Width of embeddings and hidden states D; the MLP is four times as wide.
    depth: int = 24  # Number of layers.
    heads: int = 32  # Number of attention heads, which must divide the width.
    max_positions: int = 2048  # Number of rows of the position table, and the longest row including visual vectors.
    ln_eps: float = 1e-5  # Epsilon of the LayerNorms.
    dropout: float = 0.0  # Rate on embeddings, attention and residuals in training; the published recipe has 0.1.
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
        """Create the embeddings, the stack of blocks and the final norm."""
        normal = nn.initializers.normal(STD)
        self.token_embed = self.param("token_embed", normal, (self.vocab, self.width))
        self.pos_embed = self.param("pos_embed", normal, (self.max_positions, self.width))
        in_axes = (0, nn.broadcast, nn.broadcast)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(4,))
        self.blocks = blocks(
            heads=self.heads, depth=self.depth, ln_eps=self.ln_eps, dropout=self.dropout, dtype=self.dtype,
            adapters=lora.Settings(self.lora_rank, self.lora_scale, self.lora_dropout, self.lora_targets),
        )  # fmt: skip
        self.norm = layers.norm(None, self.ln_eps, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def embed(self, ids: jax.Array) -> jax.Array:
        """See `LanguageModel.embed`. Positions are added later, because visual vectors get them too."""
        return layers.look_up(self.token_embed, ids, self.dtype)

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """See `LanguageModel`."""
        return self.read(embeds, mask, None, None, deterministic, segments)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `LanguageModel.logits`."""
        return layers.tied_logits(self.token_embed, hidden, self.dtype)

    def empty(self, before: tuple[int, ...], length: int) -> Cache:
        """See `language_model.Cached.empty`."""
        head_dim = self.width // self.heads
        return language_model.empty_cache(before, self.depth, self.heads, length, head_dim, self.dtype)

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
        length, dtype = embeds.shape[-2], jnp.dtype(self.dtype)
        language_model.check_positions(language_model.longest(length, segments), self.max_positions)
        context = language_model.context_of(length, mask, past, segments)
        if past is None and mask is None and segments is None:
            rows = self.pos_embed[:length]  # [L, D]
        else:
            rows = jnp.take(self.pos_embed, context.positions, axis=0, mode="clip")  # [B, L, D]
            rows = rows if past is None else rows[:, None]  # [B, 1, L, D], the same in all branches
        x = self.drop(embeds.astype(dtype) + rows.astype(dtype), deterministic=deterministic)
        (x, filled), _ = self.blocks((x, cache), jnp.arange(self.depth), context, deterministic)
        return self.norm(x), filled


SIZES = {
    "1.3b": GPT3(width=2048, depth=24, heads=32),
    "2.7b": GPT3(width=2560, depth=32, heads=32),
    "tiny": GPT3(vocab=512, width=96, depth=3, heads=4, max_positions=128),
}
