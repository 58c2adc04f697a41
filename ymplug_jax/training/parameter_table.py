"""Render the parameters of a run as a table: trained or frozen, dtype, sharding and origin."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from ymplug_jax.core import state as state_lib
from ymplug_jax.core.text_table import columns
from ymplug_jax.training.setup import Run


def table(run: Run, origin: Mapping[str, str] | None = None) -> str:
    """Return a table with one line per subtree and kind of leaf.

    Args:
      run: run with abstract parameters.
      origin: where each parameter path was loaded from; None leaves the column empty.
    """
    rows: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for kind, tree in (("trained", run.state.trainable), ("frozen", run.held), ("carried", run.state.carried)):
        for path, leaf in state_lib.flatten(tree).items():
            axes = sorted({axis for axis in leaf.sharding.spec if axis})
            place = " x ".join(f"{axis}={run.mesh.shape[axis]}" for axis in axes) or "replicated"
            source = "" if kind == "carried" else (origin or {}).get(path, "")
            key = (path.split("/")[0], kind, str(leaf.dtype), place, source)
            rows[key][0] += 1
            rows[key][1] += int(np.prod(leaf.shape))
    head = ("subtree", "", "dtype", "sharding", "origin", "tensors", "parameters")
    body = [(*key, f"{tensors}", f"{size:,}") for key, (tensors, size) in sorted(rows.items())]
    trained, frozen = state_lib.count(run.state.trainable), state_lib.count(run.frozen)
    text = columns([head, *body], right=2)
    share = 100 * trained / (trained + frozen)
    return f"{text}\ntrained {trained:,} ({share:.3g} %), frozen {frozen:,}, together {trained + frozen:,}"
