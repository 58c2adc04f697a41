"""BLOOM, the language model of the chat model: a decoder with ALiBi instead of a position table.

Le Scao et al., "BLOOM: a 176B-parameter open-access multilingual language model", 2022; Press et al., "Train short, test
long", 2022, for the bias. The output layer is the word embedding. Word embeddings are normalised, what is fed in their place
(visual tokens) is not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ymplug_jax.models import attention, layers

STD = 0.02

AXES = (
    ("token_embed", "vocab embed"),
    ("(embed_norm|norm)/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
    ("blocks/lora/a", "layers embed rank"),
    ("blocks/lora/[qkv]", "layers rank heads head_dim"),
)


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head, f32[N]: 2^(-8k/n) for the n heads of the largest power of two, then every other one of 2n."""
    n = 2 ** int(np.log2(heads))
    first = 2.0 ** (-8 * np.arange(1, n + 1) / n)
    rest = 2.0 ** (-4 * (2 * np.arange(heads - n) + 1) / n)
    return np.concatenate([first, rest]).astype(np.float32)


def alibi(mask: jax.Array, heads: int) -> jax.Array:
    """Bias by the key's position among the seen ones: int or bool[B, S] -> f32[B, N, 1, S]; softmax makes it relative."""
    mask = mask.astype(jnp.float32)
    position = (jnp.cumsum(mask, axis=1) - 1) * mask  # [B, S]
    return slopes(heads)[:, None, None] * position[:, None, None]


class Lora(nn.Module):
    """Low-rank change of the q, k and v projections, which share their first factor (Hu et al., 2021): starts at zero."""

    rank: int  # R
    scale: float
    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """f[..., D] -> what to add to q, k, v: f[..., N, H] each."""
        d, dtype = x.shape[-1], jnp.dtype(self.dtype)
        a = self.param("a", layers.torch_linear(d), (d, self.rank)).astype(dtype)
        low = (x @ a) * self.scale  # [..., R]

        def out(name: str) -> jax.Array:
            b = self.param(name, nn.initializers.zeros, (self.rank, self.heads, d // self.heads)).astype(dtype)
            return jnp.einsum("...r,rnh->...nh", low, b)

        return out("q"), out("k"), out("v")


class Block(nn.Module):
    """Pre-norm attention and MLP: f[B, L, D] -> f[B, L, D]."""

    heads: int
    ln_eps: float
    lora_rank: int
    lora_scale: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        d, normal = x.shape[-1], nn.initializers.normal(STD)
        attn = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="attn")
        h = layers.norm("attn_norm", self.ln_eps, self.dtype)(x)
        qkv = attn.project(h)  # [B, L, N, H]
        if self.lora_rank:
            lora = Lora(self.lora_rank, self.lora_scale, self.heads, self.dtype, name="lora")
            qkv = [whole + change for whole, change in zip(qkv, lora(h), strict=True)]
        x = x + attn.output(attention.attend(*qkv, causal=True, mask=mask, bias=bias))
        mlp = layers.Mlp(4 * d, normal, normal, tanh=True, dtype=self.dtype, name="mlp")
        return x + mlp(layers.norm("mlp_norm", self.ln_eps, self.dtype)(x)), None


class Bloom(nn.Module):
    """The language model. The fields are its settings."""

    vocab: int = 250880  # V
    width: int = 4096  # D; the MLP is four times as wide
    depth: int = 30
    heads: int = 32
    ln_eps: float = 1e-5
    lora_rank: int = 0  # R; 0: no adapters
    lora_scale: float = 1.0  # alpha / R
    remat: str = "none"  # "none", "full" or "dots"
    dtype: str = "float32"  # of the computation

    def setup(self) -> None:
        self.token_embed = self.param("token_embed", nn.initializers.normal(STD), (self.vocab, self.width))
        self.embed_norm = layers.norm(None, self.ln_eps, self.dtype)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=(nn.broadcast, nn.broadcast))
        self.blocks = blocks(
            heads=self.heads,
            ln_eps=self.ln_eps,
            lora_rank=self.lora_rank,
            lora_scale=self.lora_scale,
            dtype=self.dtype,
        )
        self.norm = layers.norm(None, self.ln_eps, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Normalised word embeddings: int[..., L] -> f[..., L, D]."""
        return self.embed_norm(jnp.take(self.token_embed, ids, axis=0, mode="clip").astype(jnp.dtype(self.dtype)))

    def __call__(self, embeds: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          embeds: f[B, L, D], normalised word embeddings and whatever stands between them.
          mask: int or bool[B, L], 1 where there is something; padding may stand on either side. None: everywhere.

        Returns:
          f[B, L, D].
        """
        mask = jnp.ones(embeds.shape[:2], bool) if mask is None else mask.astype(bool)
        x = embeds.astype(jnp.dtype(self.dtype))
        x, _ = self.blocks(x, mask[:, None, None], alibi(mask, self.heads))
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[..., D] -> f32[..., V]. Take the positions that are needed first: the vocabulary is wide."""
        table = self.token_embed.astype(jnp.dtype(self.dtype))
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def init(model: Bloom, key: jax.Array) -> dict:
    """Fresh float32 parameters. Run it under `jax.jit` or `jax.eval_shape`: no forward pass remains."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, ids, method=lambda bloom, ids: bloom(bloom.embed(ids)))["params"]
