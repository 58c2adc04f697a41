"""What a run will be, before it is one: the table of its parameters and the estimate of steps, memory and disk."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ymplug_jax.core import state as state_lib
from ymplug_jax.training.setup import Run


def table(run: Run, origin: Mapping[str, str] | None = None) -> str:
    """One line a subtree and kind of leaf: trained or frozen, parameters, dtype, sharding, origin."""
    rows: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for kind, tree in (("trained", run.state.trainable), ("frozen", run.held)):
        for path, leaf in state_lib.flatten(tree).items():
            axes = sorted({axis for axis in leaf.sharding.spec if axis})
            place = " x ".join(f"{axis}={run.mesh.shape[axis]}" for axis in axes) or "replicated"
            key = (path.split("/")[0], kind, str(leaf.dtype), place, (origin or {}).get(path, ""))
            rows[key][0] += 1
            rows[key][1] += int(np.prod(leaf.shape))
    head = ("subtree", "", "dtype", "sharding", "origin", "tensors", "parameters")
    body = [(*key, f"{tensors}", f"{size:,}") for key, (tensors, size) in sorted(rows.items())]
    trained, frozen = state_lib.count(run.state.trainable), state_lib.count(run.frozen)
    text = columns([head, *body], right=2)
    share = 100 * trained / (trained + frozen)
    return f"{text}\ntrained {trained:,} ({share:.1f} %), frozen {frozen:,}, together {trained + frozen:,}"


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


def render_estimate(facts: Mapping[str, Any]) -> str:
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


def human(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def columns(rows: list[tuple], right: int = 0) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    count = len(widths)

    def cell(text: str, i: int) -> str:
        return f"{text:>{widths[i]}}" if i >= count - right else f"{text:<{widths[i]}}"

    return "\n".join("  ".join(cell(str(value), i) for i, value in enumerate(row)).rstrip() for row in rows)
