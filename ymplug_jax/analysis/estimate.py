"""Estimates the steps, device memory and disk space of a run before it starts."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ymplug_jax.core import state as state_lib
from ymplug_jax.core.text_table import columns, human
from ymplug_jax.training.setup import Run


def estimate(run: Run, compiled: jax.stages.Compiled | None = None) -> dict[str, Any]:
    """Steps, parameter counts and bytes of a run.

    Args:
      run: a prepared run.
      compiled: its compiled step; None: leave out the memory of temporaries.

    Returns:
      task, devices, mesh, trainable_params, frozen_params, examples, batch_size, steps_per_epoch, steps, samples, and:

      - bytes_per_device: trainable, frozen, opt_state and gradients; with `compiled` also step_temporaries (activations and
        gradients) and step_peak, from XLA's memory analysis for this platform.
      - checkpoint_bytes: each_step, and frozen_once.
      - carried, for tasks that carry state beside their parameters: the number of values of each part, such as a momentum
        teacher and queues; bytes_per_device has a key of this name as well.
    """
    settings = run.experiment.train
    trainable, frozen, opt = (_bytes(tree) for tree in (run.state.trainable, run.held, run.state.opt_state))
    facts: dict[str, Any] = {
        "task": run.experiment.task,
        "devices": run.mesh.size,
        "mesh": dict(run.mesh.shape),
        "trainable_params": state_lib.count(run.state.trainable),
        "frozen_params": state_lib.count(run.frozen),
        "examples": run.examples,
        "batch_size": settings.batch_size,
        "steps_per_epoch": run.steps_per_epoch,
        "steps": run.total_steps,
        "samples": run.total_steps * settings.batch_size,
        "bytes_per_device": {
            "trainable": trainable[1],
            "frozen": frozen[1],
            "opt_state": opt[1],
            "gradients": trainable[1],
        },
        "checkpoint_bytes": {"each_step": trainable[0] + opt[0], "frozen_once": _bytes(run.frozen)[0]},
    }
    if run.state.carried:
        carried = _bytes(run.state.carried)
        facts["carried"] = {name: state_lib.count({name: tree}) for name, tree in run.state.carried.items()}
        facts["bytes_per_device"]["carried"] = carried[1]
        facts["checkpoint_bytes"]["each_step"] += carried[0]
    if compiled is not None and (memory := compiled.memory_analysis()) is not None:
        peak = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        facts["bytes_per_device"] |= {"step_temporaries": memory.temp_size_in_bytes, "step_peak": peak}
    return facts


def _bytes(tree: Any) -> tuple[int, int]:
    """(total bytes, bytes on one device) of a tree of abstract arrays with shardings."""
    total = device = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        total += int(np.prod(leaf.shape)) * size
        device += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * size
    return total, device


def render(facts: Mapping[str, Any]) -> str:
    """The estimate as a table for the terminal."""
    memory, disk = facts["bytes_per_device"], facts["checkpoint_bytes"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    lines = [
        ("devices", f"{facts['devices']} ({mesh})"),
        (
            "training split",
            f"{facts['examples']:,} examples, {facts['steps_per_epoch']:,} steps per epoch with batch size {facts['batch_size']}",
        ),
        ("run", f"{facts['steps']:,} steps, {facts['samples']:,} samples"),
        *(
            [("beside the parameters", ", ".join(f"{name} {size:,}" for name, size in facts["carried"].items()))]
            if "carried" in facts
            else []
        ),
        ("memory per device", ", ".join(f"{name.replace('_', ' ')} {human(size)}" for name, size in memory.items())),
        (
            "checkpoint",
            f"{human(disk['each_step'])} each, plus {human(disk['frozen_once'])} once for the frozen parameters",
        ),
    ]
    return columns(lines)


def describe(run: Run, compiled: jax.stages.Compiled) -> str:
    """The estimate of a run with a compiled step, as a table for the terminal."""
    return render(estimate(run, compiled))
