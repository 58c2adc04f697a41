"""The training state, and the cut of the parameters into a trainable and a frozen tree.

Frozen parameters are no mask but a second, disjoint tree: they get no gradient, no optimizer state, are not clipped and
not saved again. The idea is Equinox's partition / combine, on plain nested dicts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.core.exits import Mistake

Params = dict  # nested dicts of arrays


@struct.dataclass
class TrainState:
    """What a step reads and writes: donated every step, saved in every checkpoint."""

    step: jax.Array  # int32 scalar: steps taken, skipped ones included
    trainable: Params  # float32
    opt_state: optax.OptState


def flatten(params: Mapping) -> dict[str, jax.Array]:
    """Flat dict with paths such as "vision/blocks/attn/q/kernel"."""
    return flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, jax.Array]) -> Params:
    """Inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def matching(paths: Iterable[str], patterns: Sequence[str], where: str) -> set[str]:
    """Paths that at least one regex matches in full.

    Raises:
      Mistake: a pattern that matches no path (it froze or exempted less than its author meant), or no regex.
    """
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {path for path in paths if re.fullmatch(pattern, path)}
        except re.error as error:
            raise Mistake(f"{where}: {pattern!r} is no regular expression: {error}") from None
        if not hits:
            raise Mistake(
                f"{where}: the pattern {pattern!r} matches no parameter; the first ones are {', '.join(paths[:3])}"
            )
        found |= hits
    return found


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """(trainable, frozen): disjoint nested dicts; frozen are the paths that a pattern matches in full.

    Raises:
      ValueError: a pattern that matches nothing.
    """
    flat = flatten(params)
    frozen = matching(flat, patterns, "config.train.frozen")
    return unflatten({k: v for k, v in flat.items() if k not in frozen}), unflatten(
        {k: v for k, v in flat.items() if k in frozen}
    )


def merge(trainable: Params, frozen: Params) -> Params:
    """Inverse of `split`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def cast_frozen(params: Params, patterns: Sequence[str], dtype: str) -> Params:
    """Float leaves of the frozen part in `dtype`, the rest in float32. Works on arrays and on ShapeDtypeStructs."""
    flat = flatten(params)
    frozen = matching(flat, patterns, "config.train.frozen")

    def cast(path: str, leaf: jax.Array) -> jax.Array:
        target = jnp.dtype(dtype) if path in frozen else jnp.dtype("float32")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, target)
        return leaf.astype(target)

    return unflatten({path: cast(path, leaf) for path, leaf in flat.items()})


def count(params: Mapping) -> int:
    """Number of parameters in a (possibly abstract) tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())


def init_params(
    init: Callable[[jax.Array], Params],
    key: jax.Array,
    patterns: Sequence[str],
    dtype: str,
    shardings: Mapping,
    wanted: Iterable[str],
) -> Params:
    """Fresh values of the `wanted` paths only, made under jit straight into their sharding (nothing is ever whole on the host)."""
    wanted = sorted(wanted)
    places = flatten(shardings)
    if not wanted:
        return {}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(cast_frozen(init(key), patterns, dtype))
        return {path: flat[path] for path in wanted}

    return unflatten(jax.jit(make, out_shardings={path: places[path] for path in wanted})(key))
