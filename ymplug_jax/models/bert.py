"""BERT split into a text encoder (lower layers) and a fusion encoder over text and video (upper layers), as in ALPRO.

Devlin et al., "BERT: Pre-training of deep bidirectional transformers for language understanding", 2019: post-norm, exact
GELU. Described in docs/models/alpro.md, "Text encoder" and "Fusion encoder". Layers with
cross-attention are those of docs/models/mplug2.md, and `bert_decoder` is BERT as a decoder.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import attention, layers
from ymplug_jax.models.language_model import Memory

STD = 0.02
HIDDEN = -10000.0  # added to the logits of masked keys; released models were trained with this finite value

# Logical axes by path below the text encoder, the fusion encoder and the masked-word head.
TEXT_AXES = (
    ("token_embed", "vocab embed"),
    ("(pos_embed|type_embed)", "pos embed"),
    ("embed_norm/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
)
FUSION_AXES = layers.BLOCK_AXES
# Of layers with cross-attention.
CROSS_AXES = (
    *layers.BLOCK_AXES,
    ("blocks/cross/[qkv]/kernel", "layers embed heads head_dim"),
    ("blocks/cross/[qkv]/bias", "layers heads head_dim"),
    ("blocks/cross/o/kernel", "layers heads head_dim embed"),
    ("blocks/(cross/o/bias|cross_norm/(scale|bias))", "layers embed"),
)
HEAD_AXES = (
    ("hidden/kernel", "embed embed"),
    ("(hidden/bias|norm/scale|norm/bias)", "embed"),
    ("bias", "vocab"),
)


def added(mask: jax.Array) -> jax.Array:
    """What is added to the logits of keys, 0 at tokens and `HIDDEN` at padding: int or bool[B, S] -> f32[B, 1, 1, S]."""
    return (1 - mask[:, None, None].astype(jnp.float32)) * HIDDEN


class Block(nn.Module):
    """Attention, cross-attention if there is a memory, and MLP, each followed by a residual sum and a LayerNorm."""

    heads: int  # Number of attention heads.
    hidden: int  # Width of the MLP.
    ln_eps: float  # Epsilon of the norms.
    dropout: float  # Dropout rate in training.
    dtype: str  # Type of the computation.
    attn_dropout: float | None = None  # Dropout rate on attention in training; None: that of the rest.

    @nn.compact
    def __call__(
        self, x: jax.Array, bias: jax.Array | None, deterministic: bool, memory: Memory | None = None
    ) -> tuple[jax.Array, None]:
        """Run one layer.

        Args:
          x: f[B, L, D].
          bias: f32, broadcastable to [B, N, L, S]; added to the attention logits. None: every query sees all keys.
          deterministic: False applies dropout.
          memory: f[B, M, D] and its mask, read by cross-attention. None: the layer has or uses none.

        Returns:
          f[B, L, D], and None for `nn.scan`.
        """
        d, normal = x.shape[-1], nn.initializers.normal(STD)
        rate = 0.0 if deterministic else self.dropout if self.attn_dropout is None else self.attn_dropout
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        attn = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="attn")
        key = self.make_rng("dropout") if rate > 0 else None
        y = attn.output(attention.attend(*attn.project(x), bias=bias, dropout=rate, key=key))
        x = layers.norm("attn_norm", self.ln_eps, self.dtype)(x + drop(y))
        if memory is not None:
            cross = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="cross")
            key = self.make_rng("dropout") if rate > 0 else None
            q, k, v = cross.project(x, memory.states)
            y = cross.output(attention.attend(q, k, v, key_mask=memory.mask, dropout=rate, key=key))
            x = layers.norm("cross_norm", self.ln_eps, self.dtype)(x + drop(y))
        y = layers.Mlp(self.hidden, normal, normal, dtype=self.dtype, name="mlp")(x)
        return layers.norm("mlp_norm", self.ln_eps, self.dtype)(x + drop(y)), None


class Fusion(nn.Module):
    """Layers over concatenated text and video tokens, without further embeddings or norms; its fields are its settings."""

    depth: int = 6  # Number of layers.
    heads: int = 12  # Number of attention heads, which must divide the width of the text encoder.
    hidden: int = 3072  # Width of the MLP M.
    ln_eps: float = 1e-12  # Epsilon of the LayerNorms.
    dropout: float = 0.1  # Dropout rate on attention and before each residual sum in training.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms and softmax stay float32.

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Run all layers.

        Args:
          x: f[B, S, D].
          mask: int or bool[B, S], 1 at visible tokens.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          f[B, S, D].
        """
        bias = added(mask)  # [B, 1, 1, S]
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
    """Text encoder: word, position and type embeddings, then layers; its fields are its settings."""

    vocab: int = 21128  # Number of rows of the word embeddings V.
    width: int = 768  # Width of the states D.
    depth: int = 6  # Number of layers.
    heads: int = 12  # Number of attention heads, which must divide the width.
    hidden: int = 3072  # Width of the MLP M.
    max_positions: int = 512  # Number of rows of the position table, and the longest text.
    types: int = 2  # Number of rows of the type table, of which only row 0 is used.
    ln_eps: float = 1e-12  # Epsilon of the LayerNorms.
    dropout: float = 0.1  # Dropout rate on embeddings, on attention and before each residual sum in training.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms and softmax stay float32.

    def setup(self) -> None:
        """Create the embedding tables, their norm and the stack of blocks."""
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
        """Normalised sum of word, position and type embeddings: int[B, L] -> f[B, L, D].

        Raises:
          ValueError: the text is longer than the position table.
        """
        if ids.shape[1] > self.max_positions:
            raise ValueError(
                f"config.model.text.max_positions: {ids.shape[1]} tokens are more than {self.max_positions} positions; "
                "lower config.data.max_tokens"
            )
        words = jnp.take(self.token_embed, ids, axis=0, mode="clip")  # [B, L, D]
        x = words + self.type_embed[0] + self.pos_embed[: ids.shape[1]]
        return self.embed_norm(x.astype(jnp.dtype(self.dtype)))

    def __call__(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode a text.

        Args:
          ids: int[B, L].
          mask: int or bool[B, L], 1 at tokens.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          f[B, L, D].
        """
        x = self.drop(self.embed(ids), deterministic=deterministic)
        bias = added(mask)  # [B, 1, 1, L]
        return self.blocks(x, bias, deterministic)[0]


class MaskedHead(nn.Module):
    """Masked-word head, tied to the word embeddings of the text encoder."""

    ln_eps: float = 1e-12  # Epsilon of the LayerNorm.
    dtype: str = "float32"  # Type of the computation; logits are float32.

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Logits of the vocabulary: states f[..., D] and word embeddings f[V, D] -> f32[..., V]."""
        dtype, normal = jnp.dtype(self.dtype), nn.initializers.normal(STD)
        x = layers.gelu(nn.Dense(x.shape[-1], kernel_init=normal, dtype=dtype, name="hidden")(x))
        x = layers.norm("norm", self.ln_eps, self.dtype)(x)
        logits = jnp.einsum("...d,vd->...v", x, table.astype(dtype), preferred_element_type=jnp.float32)
        return logits + self.param("bias", nn.initializers.zeros, (table.shape[0],)).astype(jnp.float32)
