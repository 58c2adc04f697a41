"""Training state, and the partition of the parameters into a trainable and a frozen tree.

Frozen parameters form a second, disjoint tree instead of a mask: they have no gradients and no optimizer state, do not count
towards the clipped norm, and are saved once per run. This is the partition / combine of Equinox on plain nested dicts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.core.exits import Mistake

Params = dict[str, Any]  # nested dicts of arrays, or of ShapeDtypeStructs or shardings in their place


@struct.dataclass
class TrainState:
    """Input and output of the train step: donated at every step, saved in every checkpoint."""

    step: jax.Array  # int32 scalar: steps taken, including skipped updates
    trainable: Params  # float32
    opt_state: optax.OptState
    # What a task carries from step to step, neither trained nor frozen; empty for most tasks, see `tasks.carried`.
    carried: Params = struct.field(default_factory=dict)


def stand_in(shape: Sequence[int], dtype: Any, place: jax.sharding.Sharding | None = None) -> jax.Array:
    """Return a ShapeDtypeStruct, typed as an array so that abstract and concrete trees share their annotations."""
    return cast(jax.Array, jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict to paths such as "vision/blocks/attn/q/kernel"."""
    return flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Invert `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def matching(paths: Iterable[str], patterns: Sequence[str], where: str) -> set[str]:
    """Return the paths that at least one regex matches in full.

    Args:
      paths: parameter paths.
      patterns: regular expressions.
      where: setting of the patterns, for messages.

    Raises:
      Mistake: a pattern is not a regular expression, or matches no path and so has no effect.
    """
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {path for path in paths if re.fullmatch(pattern, path)}
        except re.error as error:
            raise Mistake(f"{where}: {pattern!r} is not a regular expression ({error}); correct it") from None
        if not hits:
            raise Mistake(
                f"{where}: the pattern {pattern!r} matches no parameter; correct it to match paths such as {', '.join(paths[:3])}"
            )
        found |= hits
    return found


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Partition parameters into (trainable, frozen) nested dicts; paths that a pattern matches in full are frozen.

    Raises:
      Mistake: a pattern matches nothing.
    """
    flat = flatten(params)
    frozen = matching(flat, patterns, "config.train.frozen")
    return unflatten({k: v for k, v in flat.items() if k not in frozen}), unflatten(
        {k: v for k, v in flat.items() if k in frozen}
    )


def merge(trainable: Params, frozen: Params) -> Params:
    """Invert `split`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def cast_frozen(params: Params, patterns: Sequence[str], dtype: str) -> Params:
    """Cast frozen leaves to `dtype` and all others to float32. Accepts arrays and ShapeDtypeStructs."""
    flat = flatten(params)
    frozen = matching(flat, patterns, "config.train.frozen")

    def cast(path: str, leaf: jax.Array) -> jax.Array:
        target = jnp.dtype(dtype) if path in frozen else jnp.dtype("float32")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return stand_in(leaf.shape, target)
        return leaf.astype(target)

    return unflatten({path: cast(path, leaf) for path, leaf in flat.items()})


def count(params: Mapping[str, Any]) -> int:
    """Return the number of parameters in a (possibly abstract) tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())


def init_params(
    init: Callable[[jax.Array], Params],
    key: jax.Array,
    patterns: Sequence[str],
    dtype: str,
    shardings: Mapping[str, Any],
    wanted: Iterable[str],
) -> Params:
    """Initialise only the `wanted` paths, under jit and directly in their sharding, so no host holds a full array."""
    wanted = sorted(wanted)
    places = flatten(shardings)
    if not wanted:
        return {}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(cast_frozen(init(key), patterns, dtype))
        return {path: flat[path] for path in wanted}

    return unflatten(jax.jit(make, out_shardings={path: places[path] for path in wanted})(key))
