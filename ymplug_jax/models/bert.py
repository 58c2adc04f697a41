"""BERT cut in two, as ALPRO and mPLUG-2 use it: the first layers read the text, the last ones text and video together.

Devlin et al., "BERT: Pre-training of deep bidirectional transformers for language understanding", 2019: post-norm, exact GELU.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import attention, layers

STD = 0.02
HIDDEN = -10000.0  # added to the logits of keys that are not to be seen; finite, as released models were trained

# Axis words by path below the text encoder, the fusion encoder and the head of masked words.
TEXT_AXES = (
    ("token_embed", "vocab embed"),
    ("(pos_embed|type_embed)", "pos embed"),
    ("embed_norm/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
)
FUSION_AXES = layers.BLOCK_AXES
HEAD_AXES = (
    ("hidden/kernel", "embed embed"),
    ("(hidden/bias|norm/scale|norm/bias)", "embed"),
    ("bias", "vocab"),
)


class Block(nn.Module):
    """Attention and MLP, each followed by its norm: f[B, L, D] -> f[B, L, D]."""

    heads: int
    hidden: int
    ln_eps: float
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, deterministic: bool) -> tuple[jax.Array, None]:
        """f[B, L, D] and the attention's bias, f32 broadcastable to [B, N, L, S] -> (f[B, L, D], None), as `layers.stack` wants it."""
        d, normal, rate = x.shape[-1], nn.initializers.normal(STD), 0.0 if deterministic else self.dropout
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        attn = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="attn")
        key = self.make_rng("dropout") if rate > 0 else None
        y = attn.output(attention.attend(*attn.project(x), bias=bias, dropout=rate, key=key))
        x = layers.norm("attn_norm", self.ln_eps, self.dtype)(x + drop(y))
        y = layers.Mlp(self.hidden, normal, normal, dtype=self.dtype, name="mlp")(x)
        return layers.norm("mlp_norm", self.ln_eps, self.dtype)(x + drop(y)), None


class Fusion(nn.Module):
    """Layers over whatever is fed: nothing is added to it and nothing is normalised first. The fields are its settings."""

    depth: int = 6
    heads: int = 12
    hidden: int = 3072  # M
    ln_eps: float = 1e-12
    dropout: float = 0.1  # on attention, and before each sum
    remat: str = "none"  # "none", "full" or "dots"
    dtype: str = "float32"  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """f[B, S, D], mask int or bool[B, S] (1: seen) -> f[B, S, D]. Randomness for dropout: "dropout"."""
        bias = (1 - mask[:, None, None].astype(jnp.float32)) * HIDDEN  # [B, 1, 1, S]
        in_axes = (nn.broadcast, nn.broadcast)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(3,))
        blocks = blocks(
            heads=self.heads,
            hidden=self.hidden,
            ln_eps=self.ln_eps,
            dropout=self.dropout,
            dtype=self.dtype,
            name="blocks",
        )
        return blocks(x.astype(jnp.dtype(self.dtype)), bias, deterministic)[0]


class Text(nn.Module):
    """Word, position and type embeddings, then layers. The fields are its settings."""

    vocab: int = 21128  # V
    width: int = 768  # D
    depth: int = 6
    heads: int = 12
    hidden: int = 3072  # M
    max_positions: int = 512
    types: int = 2
    ln_eps: float = 1e-12
    dropout: float = 0.1  # on embeddings, on attention, and before each sum
    remat: str = "none"  # "none", "full" or "dots"
    dtype: str = "float32"  # of the computation

    def setup(self) -> None:
        """Tables, the norm behind them, and the stack of blocks."""
        normal, width = nn.initializers.normal(STD), self.width
        self.token_embed = self.param("token_embed", normal, (self.vocab, width))
        self.pos_embed = self.param("pos_embed", normal, (self.max_positions, width))
        self.type_embed = self.param("type_embed", normal, (self.types, width))
        self.embed_norm = layers.norm(None, self.ln_eps, self.dtype)
        self.drop = nn.Dropout(self.dropout)
        in_axes = (nn.broadcast, nn.broadcast)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(3,))
        self.blocks = blocks(
            heads=self.heads, hidden=self.hidden, ln_eps=self.ln_eps, dropout=self.dropout, dtype=self.dtype
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """Normalised sum of word, position and type 0: int[B, L] -> f[B, L, D].

        Raises:
          ValueError: more positions than the table has.
        """
        if ids.shape[1] > self.max_positions:
            raise ValueError(
                f"{ids.shape[1]} tokens were fed but max_positions is {self.max_positions}; shorten the text"
            )
        words = jnp.take(self.token_embed, ids, axis=0, mode="clip")  # [B, L, D]
        x = words + self.type_embed[0] + self.pos_embed[: ids.shape[1]]
        return self.embed_norm(x.astype(jnp.dtype(self.dtype)))

    def __call__(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """int[B, L], mask int or bool[B, L] (1: a token) -> f[B, L, D]. Randomness for dropout: "dropout"."""
        x = self.drop(self.embed(ids), deterministic=deterministic)
        bias = (1 - mask[:, None, None].astype(jnp.float32)) * HIDDEN  # [B, 1, 1, L]
        return self.blocks(x, bias, deterministic)[0]


class MaskedHead(nn.Module):
    """Logits of masked words over a table of word embeddings that belongs to the text encoder."""

    ln_eps: float = 1e-12
    dtype: str = "float32"  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """f[..., D], f[V, D] -> f32[..., V]."""
        dtype, normal = jnp.dtype(self.dtype), nn.initializers.normal(STD)
        x = layers.gelu(nn.Dense(x.shape[-1], kernel_init=normal, dtype=dtype, name="hidden")(x))
        x = layers.norm("norm", self.ln_eps, self.dtype)(x)
        logits = jnp.einsum("...d,vd->...v", x, table.astype(dtype), preferred_element_type=jnp.float32)
        return logits + self.param("bias", nn.initializers.zeros, (table.shape[0],)).astype(jnp.float32)
