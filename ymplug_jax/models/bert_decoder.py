"""BERT as a decoder: causal attention and cross-attention to a memory, with a key/value cache for both.

Devlin et al., 2019, for the layers. Described in docs/models/mplug2.md, "Decoder".
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import attention, bert, language_model, layers
from ymplug_jax.models.language_model import Cache, Context, Memory, MemoryCache, Past

AXES = (*bert.TEXT_AXES[:3], *bert.CROSS_AXES, *((f"head/{path}", words) for path, words in bert.HEAD_AXES))


class DecoderBlock(nn.Module):
    """Causal attention, cross-attention to a memory, and MLP; writes its keys and values into the cache if there is one."""

    heads: int  # Number of attention heads.
    hidden: int  # Width of the MLP.
    ln_eps: float  # Epsilon of the norms.
    dropout: float  # Dropout rate in training.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        layer: tuple[jax.Array, tuple[jax.Array, jax.Array] | None],
        context: Context,
        states: jax.Array | None,
        mask: jax.Array | None,
        deterministic: bool,
    ) -> tuple[tuple[jax.Array, Cache | None], tuple[jax.Array, jax.Array] | None]:
        """Run one layer.

        Args:
          carry: states f[..., L, D], and the cache of all layers or None.
          layer: int32 index of the layer, and its keys and values of the memory f[B, M, N, H] or None: made from `states`.
          context: of the pass.
          states: f[B, M, D], the memory that cross-attention reads; None in branches.
          mask: bool[B, M], False at padding of the memory, or None.
          deterministic: False applies dropout.

        Returns:
          The updated carry; and the keys and values of the memory if there is a cache, else None.
        """
        (x, cache), (index, read) = carry, layer
        d, normal, rate = x.shape[-1], nn.initializers.normal(bert.STD), 0.0 if deterministic else self.dropout
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        attn = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="attn")
        key = self.make_rng("dropout") if rate > 0 else None
        y, cache = language_model.attend(*attn.project(x), cache, index, context, dropout=rate, key=key)
        x = layers.norm("attn_norm", self.ln_eps, self.dtype)(x + drop(attn.output(y)))

        cross = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="cross")
        if read is None:
            q, k, v = cross.project(x, states)
            read = (k, v)
        else:
            q = layers.kept(cross.q(x))
        key = self.make_rng("dropout") if rate > 0 else None
        rows = q.reshape(q.shape[0], -1, *q.shape[-2:])  # the branches of a row read one memory
        y = attention.attend(rows, *read, key_mask=mask, dropout=rate, key=key).reshape(q.shape)
        x = layers.norm("cross_norm", self.ln_eps, self.dtype)(x + drop(cross.output(y)))

        y = layers.Mlp(self.hidden, normal, normal, dtype=self.dtype, name="mlp")(x)
        x = layers.norm("mlp_norm", self.ln_eps, self.dtype)(x + drop(y))
        return (x, cache), None if cache is None else read


class Decoder(nn.Module):
    """BERT with causal attention and cross-attention to a memory, as a `language_model.LanguageModel`; its fields are its settings.

    The output layer is the masked-word head, tied to the decoder's own word embeddings. Positions count from 0.
    """

    kind: ClassVar[str] = "bert"  # Name of the decoder.
    vocab: int = 21128  # Number of rows of the word embeddings V.
    width: int = 768  # Width of the states and of the memory D.
    depth: int = 12  # Number of layers.
    heads: int = 12  # Number of attention heads, which must divide the width.
    hidden: int = 3072  # Width of the MLP M.
    max_positions: int = 512  # Number of rows of the position table, and the longest text.
    types: int = 2  # Number of rows of the type table, of which only row 0 is used.
    ln_eps: float = 1e-12  # Epsilon of the LayerNorms.
    dropout: float = 0.1  # Dropout rate on embeddings, on attention and before each residual sum in training.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms, softmax and logits stay float32.

    open_branches = language_model.open_branches
    branch = language_model.branch

    def setup(self) -> None:
        """Create the embedding tables, their norm, the stack of layers and the head."""
        normal, width = nn.initializers.normal(bert.STD), self.width
        self.token_embed = self.param("token_embed", normal, (self.vocab, width))
        self.pos_embed = self.param("pos_embed", normal, (self.max_positions, width))
        self.type_embed = self.param("type_embed", normal, (self.types, width))
        self.embed_norm = layers.norm(None, self.ln_eps, self.dtype)
        self.drop = nn.Dropout(self.dropout)
        in_axes = (0, *(nn.broadcast,) * 4)
        blocks = layers.stack(DecoderBlock, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(6,))
        self.blocks = blocks(
            heads=self.heads, hidden=self.hidden, ln_eps=self.ln_eps, dropout=self.dropout, dtype=self.dtype
        )
        self.head = bert.MaskedHead(self.ln_eps, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Sum of word and type embeddings, int[..., L] -> f32[..., L, D]. Positions are added when the text is read."""
        return jnp.take(self.token_embed, ids, axis=0, mode="clip") + self.type_embed[0]

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array | None = None,
        *,
        memory: Memory | None = None,
        segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states f[B, L, D], see `LanguageModel`; `memory` f[B, M, D] is what cross-attention reads."""
        return self._pass(embeds, mask, None, None, deterministic, segments, memory)[0]

    def prefill(
        self, embeds: jax.Array, mask: jax.Array | None = None, memory: Memory | None = None
    ) -> tuple[jax.Array, Past]:
        """See `LanguageModel.prefill`; the past keeps the keys and values of the memory too."""
        cache = self.empty(embeds.shape[:1], embeds.shape[1])
        hidden, (filled, kept) = self._pass(embeds, mask, cache, None, True, None, memory)
        past = language_model.past_of(filled, mask)
        return hidden, past._replace(memory=MemoryCache(*kept, None if memory is None else memory.mask))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `LanguageModel.logits`."""
        return self.head(hidden, self.token_embed)

    def empty(self, before: tuple[int, ...], length: int) -> Cache:
        """See `language_model.Cached.empty`."""
        head_dim = self.width // self.heads
        return language_model.empty_cache(before, self.depth, self.heads, length, head_dim, self.dtype)

    def read(
        self, embeds: jax.Array, mask: jax.Array | None, cache: Cache | None, past: Past | None
    ) -> tuple[jax.Array, Cache]:
        """See `language_model.Cached.read`; the past holds the memory."""
        hidden, (filled, _) = self._pass(embeds, mask, cache, past, True, None, None)
        return hidden, filled

    def _pass(
        self,
        embeds: jax.Array,
        mask: jax.Array | None,
        cache: Cache | None,
        past: Past | None,
        deterministic: bool,
        segments: jax.Array | None,
        memory: Memory | None,
    ) -> tuple[jax.Array, tuple[Cache, tuple[jax.Array, jax.Array]]]:
        """Hidden states; the cache, and the keys and values of the memory where there is a cache.

        Raises:
          ValueError: neither `memory` nor the past of `prefill` is given, or the text is too long.
        """
        kept = None if past is None else past.memory
        if (memory is None) == (kept is None):
            raise ValueError(
                "Decoder: cross-attention has nothing to read; give memory, or the past of a prefill with it"
            )
        length, dtype = embeds.shape[-2], jnp.dtype(self.dtype)
        language_model.check_positions(language_model.longest(length, segments), self.max_positions, memory=True)
        past = None if past is None else past._replace(memory=None)
        context = language_model.context_of(length, mask, past, segments)
        positions = context.positions  # [B or 1, L]
        if mask is not None and segments is None:  # padding on the right counts on, as in the reference
            positions = jnp.where(mask.astype(bool), positions, jnp.arange(length))
        rows = jnp.take(self.pos_embed, positions, axis=0, mode="clip")
        rows = rows if past is None else rows[:, None]  # [B, 1, L, D], the same in all branches
        x = self.embed_norm((embeds + rows).astype(dtype))
        x = self.drop(x, deterministic=deterministic)
        keys = None if kept is None else (kept.k, kept.v)
        states = None if memory is None else memory.states
        seen = memory.mask if memory is not None else None if kept is None else kept.mask
        layer = (jnp.arange(self.depth), keys)
        (x, filled), made = self.blocks((x, cache), layer, context, states, seen, deterministic)
        return x, (filled, made)


SIZES = {
    "base": Decoder(),
    "large": Decoder(width=1024, heads=16, hidden=4096),
    "tiny": Decoder(vocab=512, width=64, depth=2, heads=4, hidden=128, max_positions=64),
}
