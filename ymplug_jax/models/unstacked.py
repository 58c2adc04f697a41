"""A decoder's parameters with one array for each layer instead of a stack, for generation on CPU.

Described in docs/models/language_models.md, "Generation on CPU".
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def split(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a decoder on one CPU with an array for each layer: blocks/PATH [layers, ...] -> blocks/LAYER/PATH.

    XLA for CPU copies the slice of a stack before each product that reads it. A product of one row reads each weight once, so
    the copies take longer than the product. Accelerators read the slice in place and need no such form.
    Call it outside `jax.jit`. The arrays are views of the stacks where those are aligned, so do not donate either. Checkpoints and
    training keep the stacks. See docs/models/language_models.md, "Generation on CPU".
    """
    blocks = params["blocks"]
    depth = jax.tree.leaves(blocks)[0].shape[0]
    return {**params, "blocks": {str(i): jax.tree.map(lambda leaf, i=i: _view(leaf, i), blocks) for i in range(depth)}}


def _view(leaf: jax.Array, layer: int) -> jax.Array:
    place = leaf.sharding
    if isinstance(place, NamedSharding):  # of one device, on which every array is whole
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(np.asarray(leaf)[layer], place)


def is_split(blocks: Mapping[str, Any]) -> bool:
    """Whether these are the `blocks` that `split` makes."""
    return "0" in blocks
