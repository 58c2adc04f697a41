"""The third tree of the training state, for tasks that carry state beside their parameters: its form, sharding and start."""

import logging

import jax
import jax.numpy as jnp

from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import Params
from ymplug_jax.tasks.task import Task


def abstract(experiment: Experiment, task: Task, params: Params, mesh: jax.sharding.Mesh) -> Params:
    """Return the tree as ShapeDtypeStructs with shardings; empty for a task without one.

    Args:
      experiment: settings of the run.
      task: its task.
      params: all abstract parameters.
      mesh: mesh of the run.

    Raises:
      Mistake: the run holds frozen matrices in eight bits, from which no teacher can start.
    """
    if task.carried is None:
        return {}
    if experiment.train.frozen_dtype == "int8":
        raise Mistake(
            f"config.train.frozen_dtype: task {experiment.task!r} copies parameters into a momentum teacher, which int8 does not "
            "support; use bfloat16"
        )
    init, rules = task.carried.init, dict(experiment.mesh.rules)
    tree = jax.eval_shape(lambda params: init(params, jax.random.key(0)), params)
    for line in sharding.uncut(tree, task.carried.axes, rules, mesh) if jax.process_index() == 0 else ():
        logging.warning("%s", line)
    places = sharding.param_shardings(tree, task.carried.axes, rules, mesh)
    return jax.tree.map(lambda leaf, place: state_lib.stand_in(leaf.shape, leaf.dtype, place), tree, places)


def fresh(task: Task, params: Params, like: Params, seed: int) -> Params:
    """Return the tree at step 0, on the devices in the shardings of `like`.

    Args:
      task: the task of the run.
      params: all parameters at step 0.
      like: the tree of `abstract`.
      seed: seed of the run; the key differs from that of the parameters.
    """
    if task.carried is None:
        return {}
    init = task.carried.init

    def make(params: Params) -> Params:
        # The key is made inside, because an array of one host cannot join those of several. Copies, because the step donates both
        # the parameters and this tree, which must not share memory.
        return jax.tree.map(jnp.copy, init(params, jax.random.fold_in(jax.random.key(seed), 0)))

    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(make, out_shardings=places)(params)
