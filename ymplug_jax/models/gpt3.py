"""GPT-3 decoder in Megatron's pre-norm form, with tied embeddings, as mPLUG-video uses it (1.3B, 2.7B).

Positions count over everything that is fed, a visual prefix included; attention is causal over all of it. There is no
padding mask: texts are padded on the right, so padding can only be seen by padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import attention, layers

STD = 0.02

AXES = (
    ("token_embed", "vocab embed"),
    ("pos_embed", "pos embed"),
    ("norm/(scale|bias)", "embed"),
    *layers.BLOCK_AXES,
)


class Cache(NamedTuple):
    """Keys and values of what was read so far: f[..., layers, N, S, H], S fixed; in front B, or B and K branches.

    Heads stand before positions, as the products of attention take them: nothing is turned round for every token.
    """

    k: jax.Array
    v: jax.Array


class Past(NamedTuple):
    """What K branches of each row go on from; it is read once and never copied."""

    cache: Cache  # f[B, layers, N, S, H]
    length: jax.Array  # int32[B]: positions of it that are seen
    read: jax.Array  # int32 scalar: positions that every branch has read by itself since
    # int32[B, K, W]: which branch of the row read position w of branch k; None: each all of its own. So a branch that goes on
    # from another (beam search) costs a row of numbers, not a copy of its keys and values.
    origin: jax.Array | None = None


class Block(nn.Module):
    """Pre-norm attention and MLP: f[..., L, D] -> f[..., L, D], filling the cache where one is given."""

    heads: int
    depth: int
    ln_eps: float
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: jax.Array, past: Past | None, deterministic: bool
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        x, cache = carry
        d, rate = x.shape[-1], 0.0 if deterministic else self.dropout
        normal, shrunk = nn.initializers.normal(STD), nn.initializers.normal(STD * (2 * self.depth) ** -0.5)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        attn = layers.Attention(d, self.heads, normal, shrunk, dtype=self.dtype, name="attn")
        q, k, v = attn.project(layers.norm("attn_norm", self.ln_eps, self.dtype)(x))  # [..., L, N, H]
        if cache is not None:
            cache = _write(cache, layer, 0 if past is None else past.read, k, v)
        if past is None:
            key = self.make_rng("dropout") if rate > 0 else None
            y = attention.attend(q, k, v, causal=True, dropout=rate, key=key)  # [B, L, N, H]
        else:
            seen = jnp.arange(past.cache.k.shape[3]) < past.length[:, None]  # [B, S]
            causal = jnp.arange(cache.k.shape[4]) <= past.read + jnp.arange(x.shape[2])[:, None]  # [L, W]
            shared = tuple(x[:, layer].swapaxes(-3, -2) for x in past.cache)  # [B, S, N, H]
            own = tuple(x[:, :, layer].swapaxes(-3, -2) for x in cache)  # [B, K, W, N, H]
            if past.origin is None:
                y = attention.attend_branches(q, shared, own, seen, causal)
            else:
                y = _mixed_attention(q, shared, own, seen, causal, past.origin)
        x = x + drop(attn.output(y))

        mlp = layers.Mlp(4 * d, normal, shrunk, tanh=True, dtype=self.dtype, name="mlp")
        return (x + drop(mlp(layers.norm("mlp_norm", self.ln_eps, self.dtype)(x))), cache), None


def _mixed_attention(
    q: jax.Array,
    past: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    past_mask: jax.Array,
    own_mask: jax.Array,
    origin: jax.Array,
) -> jax.Array:
    """`attention.attend_branches` where branches hold positions of each other: all K of a row attend to all K * W positions as one
    branch would, each seeing those that are its own by `origin`, int32[B, K, W]."""
    b, k, length, n, h = q.shape
    width = origin.shape[-1]
    holds = origin[:, :, None, None] == jnp.arange(k)[:, None]  # [B, K, 1, K, W]
    mask = (holds & own_mask[:, None]).reshape(b, 1, 1, k * length, k * width)
    pooled = tuple(x.reshape(b, 1, k * width, n, h) for x in own)
    y = attention.attend_branches(q.reshape(b, 1, k * length, n, h), past, pooled, past_mask, mask)
    return y.reshape(q.shape)


def _write(cache: Cache, layer: jax.Array, at: jax.Array | int, k: jax.Array, v: jax.Array) -> Cache:
    """Put k, v f[..., L, N, H] at positions `at` + 0..L-1 of a layer, in place where the compiler can."""
    before = (0,) * (k.ndim - 3)

    def one(kept: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.expand_dims(new.swapaxes(-3, -2), -4)  # [..., 1, N, L, H]
        return jax.lax.dynamic_update_slice(kept, new, (*before, layer, 0, at, 0))

    return Cache(one(cache.k, k), one(cache.v, v))


class GPT3(nn.Module):
    """The language model. The fields are its settings."""

    vocab: int = 51200  # V
    width: int = 2048  # D; the MLP is four times as wide
    depth: int = 24
    heads: int = 32
    max_positions: int = 2048
    ln_eps: float = 1e-5
    dropout: float = (
        0.0  # on embeddings, attention and residuals; the published recipe trains through a frozen LM with 0.1
    )
    remat: str = "none"  # "none", "full" or "dots"
    dtype: str = "float32"  # of the computation

    def setup(self) -> None:
        normal = nn.initializers.normal(STD)
        self.token_embed = self.param("token_embed", normal, (self.vocab, self.width))
        self.pos_embed = self.param("pos_embed", normal, (self.max_positions, self.width))
        in_axes = (0, nn.broadcast, nn.broadcast)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(4,))
        self.blocks = blocks(
            heads=self.heads, depth=self.depth, ln_eps=self.ln_eps, dropout=self.dropout, dtype=self.dtype
        )
        self.norm = layers.norm(None, self.ln_eps, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Word embeddings without positions: int[..., L] -> f[..., L, D]."""
        return jnp.take(self.token_embed, ids, axis=0, mode="clip").astype(jnp.dtype(self.dtype))

    def __call__(self, embeds: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Hidden states after the final norm; positions from 0: f[B, S, D] -> f[B, S, D]. Randomness for dropout: "dropout".

        Raises:
          ValueError: more positions than the table has.
        """
        return self._run(embeds, None, None, deterministic)[0]

    def prefill(self, embeds: jax.Array) -> tuple[jax.Array, Cache]:
        """Read a first stretch and keep its keys and values: f[B, L, D] -> hidden f[B, L, D], cache f[B, layers, N, L, H]."""
        return self._run(embeds, self._empty(embeds.shape[:1], embeds.shape[1]), None, True)

    def open_branches(self, rows: int, branches: int, length: int) -> Cache:
        """Empty cache f[rows, branches, layers, N, length, H] for what branches read by themselves."""
        return self._empty((rows, branches), length)

    def branch(self, embeds: jax.Array, past: Past, own: Cache) -> tuple[jax.Array, Cache]:
        """Read on, several ways from one past: f[B, K, L, D] -> hidden f[B, K, L, D], `own` with the new positions filled in.

        What the past holds beyond `past.length` is not seen, so rows of different lengths can share a padded prefill. The
        caller keeps past.read + L within the width of `own` and all of it within the position table.
        """
        return self._run(embeds, own, past, True)

    def _empty(self, before: tuple[int, ...], length: int) -> Cache:
        shape = (*before, self.depth, self.heads, length, self.width // self.heads)
        empty = jnp.zeros(shape, jnp.dtype(self.dtype))
        return Cache(empty, empty)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[..., D] -> f32[..., V]. Take the positions that are needed first: the vocabulary is wide."""
        table = self.token_embed.astype(jnp.dtype(self.dtype))
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def _run(
        self, embeds: jax.Array, cache: Cache | None, past: Past | None, deterministic: bool
    ) -> tuple[jax.Array, Cache | None]:
        length, dtype = embeds.shape[-2], jnp.dtype(self.dtype)
        if length > self.max_positions:
            raise ValueError(
                f"{length} positions were fed but max_positions is {self.max_positions}; shorten the text or raise it"
            )
        if past is None:
            positions = self.pos_embed[:length]  # [L, D]
        else:
            here = (past.length + past.read)[:, None, None] + jnp.arange(length)  # [B, 1, L]
            positions = jnp.take(self.pos_embed, here, axis=0, mode="clip")  # [B, 1, L, D]
        x = self.drop(embeds.astype(dtype) + positions.astype(dtype), deterministic=deterministic)
        (x, cache), _ = self.blocks((x, cache), jnp.arange(self.depth), past, deterministic)
        return self.norm(x), cache
