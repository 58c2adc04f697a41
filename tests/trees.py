"""Whole checkpoints in memory, of files and of folders: what the tests of conversion and parity compare with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.convert import rules as rules_lib
from ymplug_jax.core import checkpoint_files, verified_read


def to_tree(rules: Sequence[rules_lib.Rule], tensors: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict:
    """Checkpoint in memory -> nested parameter dict shaped like `like`; types are the checkpoint's.

    Raises:
      ValueError: tensors that are missing, unexpected or of another shape; all are listed.
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
    """Path -> metadata (shape, dtype) of every parameter of a run's newest checkpoint or a converted one."""
    found = checkpoint_files.places(workdir)
    assert found, workdir
    return {path: leaf for place in found for path, leaf in verified_read.stored_in(place).items()}
