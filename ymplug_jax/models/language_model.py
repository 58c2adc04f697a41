"""What a decoder must offer, and what all decoders share: key/value caches, positions under padding, attention with a cache.

Tasks, decoding and converters use the `LanguageModel` protocol; `language_models.py` is the only file that names decoders.

Padding may stand on either side of a row, or between its parts. Every decoder counts positions the same way: the position of a
token is the number of tokens before it that are no padding (`positions`). What becomes of that number is the decoder's own
affair: a row of a table, an ALiBi bias or rotary angles. Hidden states at padding are finite and mean nothing: a query that sees
no key attends to all keys alike, and no other token reads what it gets.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ymplug_jax.models import attention


class Cache(NamedTuple):
    """Keys and values of what was read: f[..., layers, K, S, H], S fixed; in front B, or B and C branches.

    It holds the key/value heads alone. Heads stand before positions, the order that the products of attention read.
    """

    k: jax.Array
    v: jax.Array


class Past(NamedTuple):
    """What C branches of each row continue; it is read once and never copied."""

    cache: Cache  # f[B, layers, K, S, H]
    mask: jax.Array  # bool[B, S]: False at padding
    read: jax.Array  # int32 scalar: positions that every branch has read by itself since
    # int32[B, C, W]: `origin[b, c, w]` is the branch that wrote position w of branch c. Reordering beams updates it instead of
    # copying the cache. None: no reordering.
    origin: jax.Array | None = None

    @property
    def length(self) -> jax.Array:
        """int32[B]: positions that are no padding."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)


class Context(NamedTuple):
    """What all blocks of one pass share."""

    positions: jax.Array  # int32[B or 1, L] of the tokens that are fed; the same in all branches
    mask: jax.Array | None  # bool[B, L], False at padding; None: no padding, or branches of a past
    past: Past | None
    past_positions: jax.Array | None  # int32[B, S] of what the past holds


@runtime_checkable
class LanguageModel(Protocol):
    """A decoder: a linen module with these methods; its fields are its settings.

    `init` and `apply` are those of linen. Parameters have no further name in front ("token_embed", "blocks/...").
    """

    kind: ClassVar[str]  # its name in the settings of a run

    @property
    def vocab(self) -> int:
        """V."""

    @property
    def width(self) -> int:
        """D, of embeddings and hidden states."""

    @property
    def depth(self) -> int:
        """Number of layers."""

    @property
    def dtype(self) -> str:
        """Type of the computation."""

    @property
    def max_positions(self) -> int | None:
        """Most positions of a row; None: no limit. A longer row is a ValueError while tracing."""

    def embed(self, ids: jax.Array) -> jax.Array:
        """Embeddings to feed: int[..., L] -> f[..., L, D]. Vectors of a video or an image may stand anywhere between them."""

    def __call__(self, embeds: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          embeds: f[B, L, D].
          mask: int or bool[B, L], 1 where there is a token; padding may stand anywhere. None: everywhere. Rows padded on the
            right need no mask: attention is causal, so that only padding sees the padding.
          deterministic: False applies dropout, with the randomness "dropout"; without effect where the decoder has none.

        Returns:
          f[B, L, D].
        """

    def prefill(self, embeds: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, Past]:
        """Read a first stretch and keep its keys and values; arguments as for a call. -> hidden f[B, L, D] and the past."""

    def open_branches(self, rows: int, branches: int, length: int) -> Cache:
        """Empty cache f[rows, branches, layers, K, length, H] for what branches read by themselves."""

    def branch(self, embeds: jax.Array, past: Past, own: Cache) -> tuple[jax.Array, Cache]:
        """Read on, in C branches of one past: f[B, C, L, D] -> hidden f[B, C, L, D] and `own` with the new positions written.

        The caller keeps past.read + L within the width of `own`, and all of it within `max_positions`.
        """

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[..., D] -> f32[..., V]. Select the positions that are needed first: the vocabulary is wide."""

    def init(self, rngs: Any, *args: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any) -> Any:
        """See `flax.linen.Module.init`."""

    def apply(
        self, variables: Mapping[str, Any], *args: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any
    ) -> Any:
        """See `flax.linen.Module.apply`."""

    def clone(self, **updates: Any) -> Any:
        """The same decoder with other settings."""


class Cached(Protocol):
    """What `prefill`, `open_branches` and `branch` below need of a decoder, which takes them as its methods."""

    def empty(self, before: tuple[int, ...], length: int) -> Cache:
        """Cache f[*before, layers, K, length, H] of zeros."""

    def read(
        self, embeds: jax.Array, mask: jax.Array | None, cache: Cache | None, past: Past | None
    ) -> tuple[jax.Array, Cache]:
        """One pass: f[..., L, D] -> hidden states after the final norm f[..., L, D], and the cache where one is given."""


def prefill(self: Cached, embeds: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, Past]:
    """See `LanguageModel.prefill`."""
    hidden, cache = self.read(embeds, mask, self.empty(embeds.shape[:1], embeds.shape[1]), None)
    return hidden, past_of(cache, mask)


def open_branches(self: Cached, rows: int, branches: int, length: int) -> Cache:
    """See `LanguageModel.open_branches`."""
    return self.empty((rows, branches), length)


def branch(self: Cached, embeds: jax.Array, past: Past, own: Cache) -> tuple[jax.Array, Cache]:
    """See `LanguageModel.branch`."""
    return self.read(embeds, None, own, past)


def init(lm: LanguageModel, key: jax.Array) -> dict:
    """Fresh float32 parameters. Run it under `jax.jit` or `jax.eval_shape`: no forward pass remains."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return lm.init(key, ids, method=lambda lm, ids: lm.logits(lm(lm.embed(ids))))["params"]


def check_positions(needed: int, limit: int | None, what: str = "the tokens fed") -> None:
    """Whether a row fits; call it while tracing, before anything is compiled.

    Raises:
      ValueError: more positions are needed than the model has.
    """
    if limit is not None and needed > limit:
        raise ValueError(f"{what} need {needed} positions, the model has {limit} (max_positions); shorten the text")


def positions(mask: jax.Array) -> jax.Array:
    """Position of each token among those that are no padding: int or bool[B, S] -> int32[B, S], 0 at padding."""
    mask = mask.astype(jnp.int32)
    return (jnp.cumsum(mask, axis=1) - 1) * mask


def last_state(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """State at the last token of each row, padding on either side: f[B, L, D], int or bool[B, L] -> f[B, D]."""
    last = jnp.max(jnp.where(mask.astype(bool), jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def with_media(embeds: jax.Array, places: jax.Array, media: jax.Array) -> jax.Array:
    """Embeddings with the vectors of videos or images at their places.

    Args:
      embeds: f[B, L, D], of ids that hold any token at the places.
      places: bool[B, L], anywhere in the row; as many in each row as it has vectors.
      media: f[B, M, D], the vectors of a row one behind the other; rows with fewer are padded.

    Returns:
      f[B, L, D] in the type of `embeds`: the i-th place of a row has its i-th vector. A place beyond the M-th is NaN.
    """
    index = jnp.maximum(jnp.cumsum(places, axis=1) - 1, 0)  # [B, L]
    chosen = jnp.take_along_axis(media.astype(embeds.dtype), index[..., None], axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(places[..., None], chosen, embeds)


def context_of(length: int, mask: jax.Array | None, past: Past | None) -> Context:
    """Context of a pass over L tokens: the first ones of a row, bool[B, L], or those after a past."""
    if past is not None:
        here = past.length[:, None] + past.read + jnp.arange(length)
        return Context(here, None, past, positions(past.mask))
    if mask is None:
        return Context(jnp.arange(length)[None], None, None, None)
    return Context(positions(mask), mask.astype(bool), None, None)


def past_of(cache: Cache, mask: jax.Array | None) -> Past:
    """The past after a first stretch: cache f[B, layers, K, S, H], mask int or bool[B, S] or None."""
    seen = jnp.ones((cache.k.shape[0], cache.k.shape[-2]), bool) if mask is None else mask.astype(bool)
    return Past(cache, seen, jnp.int32(0))


def empty_cache(before: tuple[int, ...], depth: int, kv_heads: int, length: int, head_dim: int, dtype: str) -> Cache:
    """f[*before, layers, K, length, H], zeros."""
    empty = jnp.zeros((*before, depth, kv_heads, length, head_dim), jnp.dtype(dtype))
    return Cache(empty, empty)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache | None,
    layer: jax.Array,
    context: Context,
    *,
    slopes: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Causal attention of one block to what was read, after writing the new keys and values into the cache where one is given.

    Args:
      q: f[B, L, N, H], in branches f[B, C, L, N, H].
      k: f[..., L, K, H]; K divides N.
      v: f[..., L, K, H].
      cache: of this pass, all layers; None: nothing is kept.
      layer: int32 scalar, the block's place in the cache.
      context: of the pass.
      slopes: f32[N], ALiBi; None: positions do not enter here.
      dropout: rate on the probabilities; applied only if `key` is given, and never in branches.
      key: randomness of the dropout.

    Returns:
      f[..., L, N, H] and the cache.
    """
    past = context.past
    if cache is not None:
        cache = _write(cache, layer, jnp.int32(0) if past is None else past.read, k, v)
    if past is None or cache is None:
        at = None if slopes is None else jnp.broadcast_to(context.positions, k.shape[:2])
        y = attention.attend(
            q, k, v, causal=True, key_mask=context.mask, slopes=slopes, key_positions=at, dropout=dropout, key=key
        )
        return y, cache
    width = cache.k.shape[-2]
    y = attention.attend_branches(
        q,
        _layer(past.cache, layer),  # [B, S, K, H]
        _layer(cache, layer),  # [B, C, W, K, H]
        past.mask,
        jnp.arange(width) <= past.read + jnp.arange(q.shape[2])[:, None],  # [L, W]
        origin=past.origin,
        slopes=slopes,
        past_positions=context.past_positions,
        own_positions=context.positions[:, :1] - past.read + jnp.arange(width),  # [B, W]
    )
    return y, cache


def _layer(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer with positions before heads: f[..., S, K, H]."""
    axis = cache.k.ndim - 4
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, axis, keepdims=False).swapaxes(-3, -2) for x in cache)
    return k, v


def _write(cache: Cache, layer: jax.Array, at: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """Put k, v f[..., L, K, H] at positions `at` + 0..L-1 of a layer, in place where the compiler can."""
    before = (0,) * (k.ndim - 3)

    def one(kept: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.expand_dims(new.swapaxes(-3, -2), -4)  # [..., 1, K, L, H]
        return jax.lax.dynamic_update_slice(kept, new, (*before, layer, 0, at, 0))

    return Cache(one(cache.k, k), one(cache.v, v))
