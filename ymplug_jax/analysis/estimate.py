"""What a run will take, before it is one: steps, memory of a device, disk."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ymplug_jax.core import state as state_lib
from ymplug_jax.core.text_table import columns, human
from ymplug_jax.training.setup import Run


def estimate(run: Run, compiled: jax.stages.Compiled | None = None) -> dict[str, Any]:
    """Counts of the run. Bytes are exact for what is stored; with `compiled` the temporaries of the step (activations,
    gradients) come from XLA's own analysis for this platform."""
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
    """(in all, on the fullest device) of a tree of placed abstract leaves."""
    total = device = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        total += int(np.prod(leaf.shape)) * size
        device += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * size
    return total, device


def render(facts: Mapping[str, Any]) -> str:
    """The estimate as lines for a person."""
    memory, disk = facts["bytes_per_device"], facts["checkpoint_bytes"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    lines = [
        ("devices", f"{facts['devices']} ({mesh})"),
        (
            "training split",
            f"{facts['examples']:,} examples, {facts['steps_per_epoch']:,} steps an epoch at batch {facts['batch_size']}",
        ),
        ("run", f"{facts['steps']:,} steps, {facts['samples']:,} samples"),
        ("memory a device", ", ".join(f"{name.replace('_', ' ')} {human(size)}" for name, size in memory.items())),
        ("checkpoint", f"{human(disk['each_step'])} each, and {human(disk['frozen_once'])} once for the frozen part"),
    ]
    return columns(lines)


def describe(run: Run, compiled: jax.stages.Compiled) -> str:
    """The estimate of a run whose step is compiled, as lines."""
    return render(estimate(run, compiled))
