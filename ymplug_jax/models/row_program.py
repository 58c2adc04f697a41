"""What one program of `row_kernel` computes: a block of queries of one row, for a group of heads, forward or backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LOWEST = -1e30  # masked logit; finite, so that a fully masked row stays finite


class Block(NamedTuple):
    """The part of a row that one program computes."""

    groups: int  # number of key/value heads, each with its query heads
    queries: int  # number of queries; all of the row, or a multiple of LANES
    beside: bool = False  # its heads lie side by side in rows [L, groups * H]


class Row(NamedTuple):
    """Static settings of the kernels."""

    causal: bool
    scale: float
    width: int  # H
    turned: bool  # blocks are laid out [H, L] instead of [L, H]
    block: Block
    ratio: int  # number of query heads of each key/value head
    blocks: int  # number of blocks of queries
    positions: bool  # slopes are given
    keyed: bool  # per_key is given
    packed: bool  # segments are given
    even: bool  # all blocks are whole

    @property
    def masked(self) -> bool:
        """Whether per_key may mask keys."""
        return self.keyed and not self.packed

    @property
    def counts(self) -> list[int]:
        """Numbers of blocks of keys that a block of queries may read; few, as each is code of its own."""
        if not self.causal or self.masked or not self.even:
            return [self.blocks]  # a query that sees no key attends to all of them
        if self.blocks <= 4:
            return list(range(1, self.blocks + 1))
        return [*(2**i for i in range((self.blocks - 1).bit_length())), self.blocks]

    def at(self, n: jax.Array) -> tuple:
        """Index of a head in a block; all heads of a block are read together if they lie side by side."""
        return () if self.block.beside else (n,)

    def own(self, x: jax.Array, n: jax.Array, others: jax.Array | None = None) -> jax.Array:
        """Of heads side by side, f[L, groups * H], that of head n; the columns of the others are `others` or zeros."""
        if not self.block.beside:
            return x
        column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        mine = (column >= n * self.width) & (column < (n + 1) * self.width)
        return jnp.where(mine, x.astype(jnp.float32), 0.0 if others is None else others.astype(jnp.float32)).astype(
            x.dtype
        )

    def group(self, n: jax.Array) -> jax.Array:
        """Key/value head of a query head. Pallas lowers `//`, which rounds by the sign, for known TPUs only; hence `div`."""
        return n if self.ratio == 1 else jax.lax.div(n, jnp.int32(self.ratio))


def _heads(count: int, one: Callable[[jax.Array], None]) -> None:
    """Loop over the heads of a block; unrolled code takes minutes to compile."""

    def body(head: jax.Array, carry: None) -> None:
        one(head)
        return carry

    jax.lax.fori_loop(0, count, body, None)


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Matrix product over one axis of each operand, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(q: jax.Array, k: jax.Array, turned: bool) -> jax.Array:
    """Products over H of queries (or output gradients) with keys (or values), f32[L, S]."""
    axis = 0 if turned else 1
    return product(q, k, axis, axis)


def _mixed(weights: jax.Array, x: jax.Array, over: str, turned: bool) -> jax.Array:
    """Sum `x` of the keys for each query with weights f32[L, S]; over "queries", sum `x` of the queries for each key."""
    weights, axis = weights.astype(x.dtype), 1 if over == "keys" else 0
    return product(x, weights, 1, axis) if turned else product(weights, x, axis, 0)


class More(NamedTuple):
    """References to the inputs beside q, k, v and the gradient, if they are given."""

    per_key: Any  # f32[1, 2, S]
    slopes: Any  # f32[N]
    of_query: Any  # int32[1, L, 1], segments
    of_key: Any  # int32[1, 1, S]
    first: Any  # int32[B, blocks], see `first_blocks`


def _split(refs: tuple, row: Row) -> tuple[More, tuple]:
    """The inputs that are given, and the rest of the references."""
    left = iter(refs)
    given = [next(left) if there else None for there in (row.keyed, row.positions, *(row.packed,) * 3)]
    return More(*given), tuple(left)


class Place(NamedTuple):
    """Indices of a program in the grid. The interpreter knows them outside of branches only."""

    row: Any
    heads: Any  # group of heads
    block: Any  # block of queries


def _place() -> Place:
    return Place(*(pl.program_id(axis) for axis in range(3)))


class Keys(NamedTuple):
    """The keys that a block of queries reads; all of them if `size` is None."""

    start: Any
    size: int | None
    turned: bool

    def at(self, *before: Any) -> tuple:
        """Index of these keys in an array [.., S, H] or [.., H, S]."""
        if self.size is None:
            return before or (slice(None),)
        part = pl.ds(self.start, self.size)
        return (*before, slice(None), part) if self.turned else (*before, part, slice(None))

    def of_row(self, ref: Any, line: int) -> jax.Array:
        """One line of an array [1, lines, S], as [1, size]."""
        return ref[0, line : line + 1] if self.size is None else ref[0, line : line + 1, pl.ds(self.start, self.size)]


def first_blocks(segments: jax.Array, queries: int) -> jax.Array:
    """The first block of keys that a token of each block of queries sees: int[B, L] -> int32[B, blocks].

    A block of padding has its own index.
    """
    rows, length = segments.shape
    place, blocks = jnp.arange(length), length // queries
    highest = jnp.pad(jax.lax.cummax(segments, axis=1), ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(segments > highest, place, 0), axis=1)  # of each token's segment
    first = jnp.where(segments > 0, first, place)
    return jnp.min(first.reshape(rows, blocks, queries), axis=2).astype(jnp.int32) // queries


def _over_keys(row: Row, more: More, place: Place, run: Callable[[Keys], None]) -> None:
    """Call `run` with the keys that the queries of this program see."""
    counts, size = row.counts, row.block.queries
    if len(counts) == 1:
        run(Keys(0, None, row.turned))
        return
    end = place.block + 1
    needed = end - more.first[place.row, place.block] if row.packed else end

    def some(count: int) -> None:
        start = jnp.maximum(end - count, 0) * size
        run(Keys(pl.multiple_of(start, size), count * size, row.turned))

    chosen = sum((needed > count).astype(jnp.int32) for count in counts[:-1])
    jax.lax.switch(chosen, [partial(some, count) for count in counts])


def _weights_of(
    q: Any, k: Any, more: More, row: Row, place: Place, keys: Keys
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A function from a head of the block to its probabilities f32[L, S], and whether each query sees a key, bool[L, 1]."""
    start = place.block * row.block.queries
    first = place.heads * row.block.groups * row.ratio

    def causal(shape: tuple[int, ...]) -> jax.Array:
        query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return key + keys.start <= query + start

    added = None  # [L, S], the same for all heads
    if row.packed:
        own = more.of_query[0] == keys.of_row(more.of_key, 0)
        added = jnp.where(own & causal(own.shape), 0.0, LOWEST)

    def one(n: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _rows(row.own(q[0, *row.at(n)], n), k[keys.at(0, *row.at(row.group(n)))], row.turned) * row.scale
        if row.positions:
            logits = logits + more.slopes[first + n] * keys.of_row(more.per_key, 0)
        if row.masked:
            logits = logits + keys.of_row(more.per_key, 1)
        if added is not None:
            logits = logits + added
        elif row.causal:
            logits = jnp.where(causal(logits.shape), logits, LOWEST)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), largest > LOWEST / 2

    return one


def _write(ref: Any, index: tuple, x: jax.Array, n: jax.Array, row: Row) -> None:
    """Write a head's part of a block."""
    ref[index] = (row.own(x, n, ref[index]) if row.block.beside else x).astype(ref.dtype)


def forward(q: Any, k: Any, v: Any, *refs: Any, row: Row) -> None:
    """Write the results of a block of queries."""
    more, (out,), place = *_split(refs, row), _place()

    def run(keys: Keys) -> None:
        weights_of = _weights_of(q, k, more, row, place, keys)

        def one(n: jax.Array) -> None:
            value = v[keys.at(0, *row.at(row.group(n)))]
            _write(out, (0, *row.at(n)), _mixed(weights_of(n)[0], value, "keys", row.turned), n, row)

        _heads(row.block.groups * row.ratio, one)

    _over_keys(row, more, place, run)


def backward(q: Any, k: Any, v: Any, grad: Any, *refs: Any, row: Row) -> None:
    """Write the gradients of a block of queries and, after the last block of a row, those of its keys and values."""
    more, (dq, dk, dv, *sums), place = *_split(refs, row), _place()
    if sums:

        @pl.when(place.block == 0)
        def _() -> None:
            for x in sums:
                x[...] = jnp.zeros_like(x)

    def run(keys: Keys) -> None:
        weights_of = _weights_of(q, k, more, row, place, keys)

        def one(n: jax.Array) -> None:
            m = row.group(n)
            query, g = row.own(q[0, *row.at(n)], n), row.own(grad[0, *row.at(n)], n)
            weights, seen = weights_of(n)
            dweights = _rows(g, v[keys.at(0, *row.at(m))], row.turned)
            dlogits = weights * (dweights - jnp.sum(dweights * weights, axis=-1, keepdims=True)) * row.scale
            if row.masked:
                # A fully masked query attends to all keys alike, but masked logits have no gradient.
                dlogits = jnp.where(seen, dlogits, 0.0)
            _write(dq, (0, *row.at(n)), _mixed(dlogits, k[keys.at(0, *row.at(m))], "keys", row.turned), n, row)
            made = [_mixed(x, y, "queries", row.turned) for x, y in ((dlogits, query), (weights, g))]
            for total, result, part in zip(sums or (dk, dv), (dk, dv), made, strict=True):
                if sums:  # columns of other heads are zero
                    total[keys.at(*row.at(m))] += part
                else:
                    _write(result, (0, *row.at(m)), part, n, row)

        _heads(row.block.groups * row.ratio, one)

    _over_keys(row, more, place, run)
    if sums:

        @pl.when(place.block == row.blocks - 1)
        def _() -> None:
            for made, total in zip((dk, dv), sums, strict=True):
                made[0] = total[...].astype(made.dtype)
