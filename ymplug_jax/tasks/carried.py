"""State that a task carries from step to step beside its parameters: a momentum teacher, queues of features.

It is the third tree of the training state, neither trained nor frozen: it has no gradient and no optimizer state, is sharded like
parameters, saved with every step and restored bit for bit. The rule of a step is described in docs/add.md, "State beside the
parameters".
"""

import dataclasses
from collections.abc import Callable

import jax

from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.sharding import AxisRules
from ymplug_jax.core.state import Params

Batch = dict[str, jax.Array]
Rows = dict[str, jax.Array]  # arrays with leading axis B that the loss hands to the update


@dataclasses.dataclass(frozen=True)
class Carried:
    """The functions and the sharding of a task's third tree."""

    axes: AxisRules  # partition rules of its paths, like `Task.axes`
    init: Callable[[Params, jax.Array], Params]  # (initial parameters, key) -> tree of arrays with at most 32 bits
    # (params, tree, batch, key) -> (scalar loss, metrics, rows) in training, in place of `Task.loss`. The tree is that of the start
    # of the step, for every micro-batch, and is not differentiated.
    loss: Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Metrics, Rows]]
    # (params after the step, tree, rows of the whole batch in its order) -> new tree, once a step; a skipped step keeps the old one.
    update: Callable[[Params, Params, Rows], Params]
