"""Load whole checkpoints into memory, from files and from run folders; used by the tests of conversion and parity."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.convert import rules as rules_lib
from ymplug_jax.core import checkpoint_files, verified_read


def to_tree(rules: Sequence[rules_lib.Rule], tensors: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict:
    """Convert the tensors of a checkpoint to a nested parameter dict with the structure of `like` and the checkpoint's dtypes.

    Raises:
      ValueError: tensors are missing, unexpected or of another shape; the message lists all of them.
    """
    entries = rules_lib.expand(rules, like)
    mismatch = rules_lib.compare(entries, {name: tensor.shape for name, tensor in tensors.items()})
    if any(mismatch):
        parts = (f"{kind}: {', '.join(names)}" for kind, names in mismatch._asdict().items() if names)
        raise ValueError(f"the checkpoint does not fit the model. {'; '.join(parts)}")
    shapes = {path: leaf.shape for path, leaf in flatten_dict(like, sep="/").items()}
    leaves: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        for path, layer, value in rules_lib.pieces(entry, tensors[name]):
            if layer is None:
                leaves[path] = np.ascontiguousarray(value).reshape(value.shape)
                continue
            if path not in leaves:
                leaves[path] = np.empty(shapes[path], value.dtype)
            leaves[path][layer] = value
    return unflatten_dict(leaves, sep="/")


def stored_params(workdir: str) -> dict[str, Any]:
    """Return {path: metadata (shape, dtype)} of every parameter of a run's newest checkpoint or of a conversion."""
    found = checkpoint_files.places(workdir)
    assert found, workdir
    return {path: leaf for place in found for path, leaf in verified_read.stored_in(place).items()}
