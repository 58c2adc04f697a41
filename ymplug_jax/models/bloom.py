"""BLOOM and BLOOMZ: decoders with ALiBi instead of a position table, optionally with LoRA adapters.

Le Scao et al., "BLOOM: a 176B-parameter open-access multilingual language model", 2022; Press et al., "Train short, test
long", 2022, for ALiBi. Word embeddings pass through a LayerNorm, visual vectors do not. Described in
docs/models/language_models.md, "BLOOM".
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ymplug_jax.models import language_model, layers, lora, unstacked
from ymplug_jax.models.language_model import Cache, Context, Past

STD = 0.02

AXES = (
    ("token_embed", "vocab embed"),
    ("(embed_norm|norm)/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
    *lora.FUSED_AXES,
)

LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")  # Layers that may have adapters.


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes, f32[N]: 2^(-8k/n), k = 1..n, with n the largest power of two up to N; then every other slope of 2n."""
    n = 2 ** int(np.log2(heads))
    first = 2.0 ** (-8 * np.arange(1, n + 1) / n)
    rest = 2.0 ** (-4 * (2 * np.arange(heads - n) + 1) / n)
    return np.concatenate([first, rest]).astype(np.float32)


class Block(nn.Module):
    """Pre-norm attention and MLP; writes its keys and values into the cache if there is one."""

    heads: int  # Number of attention heads.
    ln_eps: float  # Epsilon of the norms.
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
          deterministic: False applies the dropout of the adapters.

        Returns:
          The updated carry, and None for `nn.scan`.
        """
        x, cache = carry
        d, normal = x.shape[-1], nn.initializers.normal(STD)
        attn = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="attn")
        h = layers.norm("attn_norm", self.ln_eps, self.dtype)(x)
        update = lora.update_of(self.adapters, LINEARS, fused=True, deterministic=deterministic, dtype=self.dtype)
        q, k, v = attn.project(h, update=update)  # [..., L, N, H]
        alibi = jnp.asarray(slopes(self.heads))
        y, cache = language_model.attend(q, k, v, cache, layer, context, slopes=alibi)  # [..., L, N, H]
        x = x + attn.output(y, update)
        mlp = layers.Mlp(4 * d, normal, normal, tanh=True, dtype=self.dtype, name="mlp")
        return (x + mlp(layers.norm("mlp_norm", self.ln_eps, self.dtype)(x), update), cache), None


class Bloom(nn.Module):
    """BLOOM as a `language_model.LanguageModel`; its fields are its settings."""

    kind: ClassVar[str] = "bloom"  # Name of the decoder in the settings of a run.
    vocab: int = 250880  # Number of rows of the word embeddings V.
    width: int = 4096  # Width of embeddings and hidden states D; the MLP is four times as wide.
    depth: int = 30  # Number of layers.
    heads: int = 32  # Number of attention heads, which must divide the width.
    ln_eps: float = 1e-5  # Epsilon of the LayerNorms.
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
        self.token_embed = self.param("token_embed", nn.initializers.normal(STD), (self.vocab, self.width))
        self.embed_norm = layers.norm(None, self.ln_eps, self.dtype)
        blocks = layers.stack(
            Block, self.depth, remat=self.remat, in_axes=(0, nn.broadcast, nn.broadcast), static_argnums=(4,)
        )
        self.blocks = blocks(**self.block_settings)
        self.norm = layers.norm(None, self.ln_eps, self.dtype)

    @property
    def block_settings(self) -> dict[str, Any]:
        """Fields of each `Block`."""
        adapters = lora.Settings(self.lora_rank, self.lora_scale, self.lora_dropout, self.lora_targets)
        return {"heads": self.heads, "ln_eps": self.ln_eps, "adapters": adapters, "dtype": self.dtype}

    @property
    def max_positions(self) -> None:
        """None: ALiBi has no limit of positions."""

    def embed(self, ids: jax.Array) -> jax.Array:
        """See `LanguageModel.embed`. Word embeddings are normalised here, so visual vectors are not."""
        return self.embed_norm(layers.look_up(self.token_embed, ids, self.dtype))

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
        context = language_model.context_of(embeds.shape[-2], mask, past, segments)
        carry: tuple[Any, Any] = embeds.astype(jnp.dtype(self.dtype)), cache
        params = self.variables.get("params", {}).get("blocks", {})
        if unstacked.is_split(params):
            block = Block(**self.block_settings, parent=None)
            for layer in range(self.depth):
                own = {"params": params[str(layer)]}
                carry, _ = block.apply(own, carry, jnp.int32(layer), context, deterministic)
            x, filled = carry
        else:
            (x, filled), _ = self.blocks(carry, jnp.arange(self.depth), context, deterministic)
        return self.norm(x), filled


SIZES = {
    "bloomz-1b7": Bloom(width=2048, depth=24, heads=16),
    "bloomz-7b1": Bloom(),
    "bloom-tiny": Bloom(vocab=512, width=96, depth=3, heads=4),
}
