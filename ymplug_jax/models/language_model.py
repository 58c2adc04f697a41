"""The protocol of a decoder, and what decoders share: key/value cache, positions under padding, attention with a cache.

Tasks, decoding and converters use the `LanguageModel` protocol; only `language_models.py` names decoders.

Padding may stand on either side of a row or between its parts. The position of a token is the number of tokens before it
that are not padding (`positions`). A decoder turns it into a row of a table, an ALiBi bias or rotary angles. Hidden states
at padding are finite but meaningless: a query that sees no key attends to all keys alike, and no token reads its state.

Described in docs/models/language_models.md, "The language model protocol".
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.models import attention


class Cache(NamedTuple):
    """Keys and values, f[..., layers, K, S, H] with a fixed S; the leading axes are B, or B and C branches.

    It holds key/value heads only. Heads precede positions, which is the layout that attention's matrix products read.
    """

    k: jax.Array
    v: jax.Array


class Memory(NamedTuple):
    """What the cross-attention of a decoder reads."""

    states: jax.Array  # f[B, M, D]
    mask: jax.Array | None = None  # bool[B, M], False at padding; None without padding


class MemoryCache(NamedTuple):
    """Keys and values of a `Memory`, f[layers, B, M, K, H], and its mask."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None


class Past(NamedTuple):
    """The prefix that C branches of each row continue. It is read once and never copied."""

    cache: Cache  # f[B, layers, K, S, H]
    mask: jax.Array  # bool[B, S], False at padding
    read: jax.Array  # int32 scalar, number of positions that each branch has read since
    # int32[B, C, W]: `origin[b, c, w]` is the branch that wrote position w of branch c. Reordering beams updates it instead of
    # copying the cache. None: no reordering.
    origin: jax.Array | None = None
    memory: MemoryCache | None = None  # what all branches of a row read by cross-attention, if the decoder has it

    @property
    def length(self) -> jax.Array:
        """Number of positions that are not padding, int32[B]."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)


class Context(NamedTuple):
    """Inputs that all blocks of one pass share."""

    positions: jax.Array  # int32[B or 1, L], of the tokens that are fed; equal in all branches
    mask: jax.Array | None  # bool[B, L], False at padding; None without padding and in branches
    past: Past | None
    past_positions: jax.Array | None  # int32[B, S], of the keys of the past
    segments: jax.Array | None = None  # int32[B, L] of packed rows, 0 at padding; then `mask` is None


@runtime_checkable
class LanguageModel(Protocol):
    """A decoder: a linen module with these methods, whose fields are its settings.

    `init` and `apply` are those of linen. Parameter paths have no common prefix ("token_embed", "blocks/...").
    """

    kind: ClassVar[str]  # name of the decoder in the settings of a run

    @property
    def vocab(self) -> int:
        """Number of rows of the word embeddings, V."""

    @property
    def width(self) -> int:
        """Width of embeddings and hidden states, D."""

    @property
    def depth(self) -> int:
        """Number of layers."""

    @property
    def dtype(self) -> str:
        """Type of the computation, such as "bfloat16"."""

    @property
    def max_positions(self) -> int | None:
        """Longest row, or None without a limit. A longer row raises ValueError while tracing; see `longest`."""

    def embed(self, ids: jax.Array) -> jax.Array:
        """Embeddings of ids, int[..., L] -> f[..., L, D]. Callers may put vectors of videos or images between them."""

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          embeds: f[B, L, D].
          mask: int or bool[B, L], 1 at tokens and 0 at padding, which may stand anywhere. None means no padding. Rows padded
            on the right need no mask: attention is causal, so only padding sees the padding.
          segments: int[B, L], several texts packed into one row: 1, 2, .. at the tokens of each text, rising along the row, and 0
            at padding. Each text is read as if it were alone: positions restart, and a token sees the earlier tokens of its own
            text only. With a mask as well, padding of either is padding.
          deterministic: False applies dropout, which needs the random stream "dropout", if the decoder has any.

        Returns:
          f[B, L, D].
        """

    def prefill(self, embeds: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, Past]:
        """Read a prompt and keep its keys and values; arguments as for `__call__`.

        Returns:
          Hidden states f[B, L, D], and the past.
        """

    def open_branches(self, rows: int, branches: int, length: int) -> Cache:
        """Empty cache f[rows, branches, layers, K, length, H] for the positions that branches read."""

    def branch(self, embeds: jax.Array, past: Past, own: Cache) -> tuple[jax.Array, Cache]:
        """Continue a past in C branches.

        The caller keeps past.read + L within the width of `own`, and all positions within `max_positions`.

        Args:
          embeds: f[B, C, L, D].
          past: of `prefill`.
          own: cache of `open_branches`.

        Returns:
          Hidden states f[B, C, L, D], and `own` with the new positions written.
        """

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the vocabulary, f[..., D] -> f32[..., V]. Select the needed positions first, because V is large."""

    def init(self, rngs: Any, *args: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any) -> Any:
        """See `flax.linen.Module.init`."""

    def apply(
        self, variables: Mapping[str, Any], *args: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any
    ) -> Any:
        """See `flax.linen.Module.apply`."""

    def clone(self, **updates: Any) -> Any:
        """The same decoder with other settings."""


class Cached(Protocol):
    """The methods that a decoder implements to use `prefill`, `open_branches` and `branch` below as its own."""

    def empty(self, before: tuple[int, ...], length: int) -> Cache:
        """A cache of zeros, f[*before, layers, K, length, H]."""

    def read(
        self, embeds: jax.Array, mask: jax.Array | None, cache: Cache | None, past: Past | None
    ) -> tuple[jax.Array, Cache]:
        """Run one pass: f[..., L, D] -> hidden states after the final norm f[..., L, D], and the cache if one is given."""


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
    """Initial float32 parameters. Call it under `jax.jit` or `jax.eval_shape`, which remove the forward pass."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return lm.init(key, ids, method=lambda lm, ids: lm.logits(lm(lm.embed(ids))))["params"]


def check_positions(needed: int, limit: int | None, what: str = "the tokens", *, memory: bool = False) -> None:
    """Check while tracing, before anything is compiled, that a row fits; `memory`: of a decoder with cross-attention.

    Raises:
      ValueError: the row needs more positions than the model has.
    """
    if limit is None or needed <= limit:
        return
    if memory:
        raise ValueError(
            f"config.model.decoder.max_positions: {what} need {needed} positions, the model has {limit}; shorten the text"
        )
    raise ValueError(
        f"config.model.llm.max_positions: {what} need {needed} positions, the model has {limit}; shorten the text"
    )


def longest(length: int, segments: jax.Array | None) -> int:
    """Number of positions that packed rows of L tokens need: the longest text if `segments` is known, else L."""
    if segments is None or isinstance(segments, jax.core.Tracer):
        return length
    counts = [np.unique(row[row > 0], return_counts=True)[1] for row in np.asarray(segments)]
    return max((int(count.max()) for count in counts if count.size), default=0)


def positions(mask: jax.Array) -> jax.Array:
    """Number of tokens before each token that are not padding: int or bool[B, S] -> int32[B, S], 0 at padding."""
    mask = mask.astype(jnp.int32)
    return (jnp.cumsum(mask, axis=1) - 1) * mask


def last_state(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """State of the last token of each row, with padding on either side: f[B, L, D], int or bool[B, L] -> f[B, D]."""
    last = jnp.max(jnp.where(mask.astype(bool), jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def with_media(embeds: jax.Array, places: jax.Array, media: jax.Array) -> jax.Array:
    """Embeddings with vectors of videos or images inserted.

    Args:
      embeds: f[B, L, D]. The ids at `places` do not matter.
      places: bool[B, L], where vectors go; each row has as many as it has vectors.
      media: f[B, M, D], the vectors of each row in order, padded at the end.

    Returns:
      f[B, L, D] in the type of `embeds`: the i-th place of a row holds its i-th vector. Places beyond the M-th are NaN, so
      that a wrong count is noticed.
    """
    index = jnp.maximum(jnp.cumsum(places, axis=1) - 1, 0)  # [B, L]
    chosen = jnp.take_along_axis(media.astype(embeds.dtype), index[..., None], axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(places[..., None], chosen, embeds)


def context_of(length: int, mask: jax.Array | None, past: Past | None, segments: jax.Array | None = None) -> Context:
    """Context of a pass over L tokens: of a prompt or packed rows (see `LanguageModel`), or of branches of a past."""
    if past is not None:
        here = past.length[:, None] + past.read + jnp.arange(length)
        return Context(here, None, past, positions(past.mask))
    if segments is not None:
        segments = segments.astype(jnp.int32)
        segments = jnp.maximum(segments if mask is None else jnp.where(mask.astype(bool), segments, 0), 0)
        at = jnp.where(segments > 0, positions(segments > 0) - attention.starts(segments), 0)
        return Context(at, None, None, None, segments)
    if mask is None:
        return Context(jnp.arange(length)[None], None, None, None)
    return Context(positions(mask), mask.astype(bool), None, None)


def past_of(cache: Cache, mask: jax.Array | None) -> Past:
    """The past of a prompt: cache f[B, layers, K, S, H], mask int or bool[B, S] or None."""
    seen = jnp.ones((cache.k.shape[0], cache.k.shape[-2]), bool) if mask is None else mask.astype(bool)
    return Past(cache, seen, jnp.int32(0))


def empty_cache(before: tuple[int, ...], depth: int, kv_heads: int, length: int, head_dim: int, dtype: str) -> Cache:
    """A cache of zeros, f[*before, layers, K, length, H]."""
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
    """Causal attention of one block; first writes the new keys and values into the cache, if there is one.

    Args:
      q: f[B, L, N, H], in branches f[B, C, L, N, H].
      k: f[..., L, K, H], where K divides N.
      v: f[..., L, K, H].
      cache: of all layers. None keeps no keys and values.
      layer: int32 scalar, index of the block.
      context: of the pass.
      slopes: f32[N], the slopes of ALiBi. None adds no bias.
      dropout: rate on the probabilities; applied only if `key` is given, and never in branches.
      key: random key of the dropout.

    Returns:
      f[..., L, N, H] and the cache.
    """
    past = context.past
    if cache is not None:
        cache = _write(cache, layer, jnp.int32(0) if past is None else past.read, k, v)
    if past is None or cache is None:
        at = None if slopes is None else jnp.broadcast_to(context.positions, k.shape[:2])
        y = attention.attend(
            q, k, v, causal=True, key_mask=context.mask, segments=context.segments, slopes=slopes, key_positions=at,
            dropout=dropout, key=key,
        )  # fmt: skip
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
    """Keys and values of one layer, positions before heads: f[..., S, K, H] each."""
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, x.ndim - 4, keepdims=False).swapaxes(-3, -2) for x in cache)
    return k, v


def _write(cache: Cache, layer: jax.Array, at: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """Write k and v, f[..., L, K, H], at positions `at` to `at` + L - 1 of a layer; XLA updates in place if it can."""
    before = (0,) * (k.ndim - 3)

    def one(kept: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.expand_dims(new.swapaxes(-3, -2), -4)  # [..., 1, K, L, H]
        return jax.lax.dynamic_update_slice(kept, new, (*before, layer, 0, at, 0))

    return Cache(one(cache.k, k), one(cache.v, v))
