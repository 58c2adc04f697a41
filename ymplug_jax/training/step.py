"""The training step: as a pure function of a task and an optimizer, and compiled for a device mesh.

Imports nothing that reads data or checkpoints, so it needs only JAX, Flax and Optax. The optimizer and schedule of each model are
described in `docs/models/mplug_video.md` and `docs/models/alpro.md`, section Recipe.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params, TrainState
from ymplug_jax.models import kernel_check, kernels
from ymplug_jax.tasks.carried import Rows
from ymplug_jax.tasks.task import Batch, Task
from ymplug_jax.training import device_augment, setup
from ymplug_jax.training.setup import Run

Step = Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message names the step and the fix. Exit code `exits.MISTAKE`."""


def make_train_step(
    task: Task, tx: optax.GradientTransformation, rate: Callable[[jax.Array], jax.Array], accumulate: int = 1
) -> Step:
    """Return the pure training step `(state, frozen, batch, key) -> (state, metrics)`; the caller jits it.

    Only the trainable parameters have gradients. If the loss or the gradient norm is not finite, the step leaves parameters and
    optimizer state unchanged, increments the step count and sets the metric `skipped` to 1. What the task carries beside them is
    updated once a step, from the updated parameters and the rows of the whole batch, and unchanged by a skipped step.

    Args:
      task: provides the loss and the bounds of parameters.
      tx: Optax transformation; its updates are scaled by the learning rate and subtracted.
      rate: learning rate f32[] of step i32[].
      accumulate: number of micro-batches. Each is weighted by the weight of its loss, so a mean over tokens stays the mean over
        all tokens of the batch.
    """

    def step(state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)

        def loss_of(trainable: Params, micro: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Metrics, Rows]]:
            params = state_lib.merge(trainable, frozen)
            loss, metrics, rows = task.training_loss(params, state.carried, micro, key)
            return loss, (metrics, rows)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if accumulate == 1:
            (loss, (metrics, rows)), grads = gradient(state.trainable, batch, key)
        else:
            loss, metrics, rows, grads = _accumulated(gradient, state.trainable, batch, key, accumulate)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        for row in jax.tree.leaves(rows):
            finite &= jnp.isfinite(row).all()
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        lr = rate(state.step)
        trainable = jax.tree.map(lambda p, u: p - lr * u, state.trainable, updates)
        if task.bounds:
            flat = state_lib.flatten(trainable)
            limited = {path: jnp.clip(flat[path], *limits) for path, limits in task.bounds.items() if path in flat}
            trainable = state_lib.unflatten(flat | limited)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        carried = state.carried
        if task.carried is not None:
            carried = task.carried.update(state_lib.merge(trainable, frozen), carried, rows)
        state = TrainState(
            step=state.step + 1,
            trainable=jax.tree.map(keep, trainable, state.trainable),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            carried=jax.tree.map(keep, carried, state.carried),
        )
        one = jnp.float32(1)
        extra = {
            "grad_norm": Mean(norm, one),
            "lr": Mean(lr, one),
            "skipped": Mean(1 - finite.astype(jnp.float32), one),
        }
        return state, metrics | extra

    return step


def _accumulated(
    gradient: Callable[..., Any], trainable: Params, batch: Batch, key: jax.Array, parts: int
) -> tuple[jax.Array, Metrics, Rows, Params]:
    """Return (loss, metrics, rows, gradients); loss and gradients are averaged over micro-batches by the weight of their loss.

    Row i of the batch goes to micro-batch i % parts, so that every device keeps its own rows; the rows that the losses return are
    put back into the order of the batch.
    """
    micro = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )  # [A, B/A, ...]
    first = jax.tree.map(lambda x: x[0], micro)
    (loss, (metrics, _)), grads = jax.eval_shape(gradient, trainable, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ((loss, metrics), grads))

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, Rows]:
        (loss, (metrics, rows)), grads = gradient(trainable, part[0], jax.random.fold_in(key, part[1]))
        weight = metrics["loss"].weight
        new = ((weight * loss, metrics), jax.tree.map(lambda g: weight * g, grads))
        return jax.tree.map(jnp.add, total, new), rows

    ((loss, metrics), grads), rows = jax.lax.scan(add, zeros, (micro, jnp.arange(parts)))
    rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)  # [A, B/A, ...] -> [B, ...]
    weight = jnp.maximum(metrics["loss"].weight, 1e-9)
    return loss / weight, metrics, rows, jax.tree.map(lambda g: g / weight, grads)


def trace_step(run: Run) -> jax.stages.Traced:
    """Trace the training step for the run's mesh with abstract arguments; allocates nothing."""
    step = make_train_step(run.task, run.tx, run.rate, run.experiment.train.accumulate)
    finished = device_augment.finisher(run.experiment.data, run.mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, run.state)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding.replicated(run.mesh))
    jitted = jax.jit(
        lambda state, frozen, batch, key: step(state, frozen, finished(batch), key),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(run.mesh)),
    )
    with run.tracing():
        return jitted.trace(run.state, run.held, setup.training_batch(run), key)


def with_checked_kernels(run: Run, trace: Callable[[Run], object] | None = None) -> Run:
    """Return the run with those fused kernels turned off whose results on its devices differ from plain XLA.

    Logs one line per use of a kernel. All processes turn off the same kernels. Does nothing if no kernel is in use, as on CPU.

    Args:
      run: the prepared run.
      trace: traces the program whose kernels are compared; None: the training step.
    """
    with run.tracing():
        if not any(kernels.uses(name) for name in kernels.KERNELS):
            return run
    with kernels.recording() as uses:
        (trace or trace_step)(run)
    off = kernel_check.differing(uses)
    if uses and jax.process_count() > 1:
        names = sorted(kernels.KERNELS)
        told = multihost_utils.process_allgather(np.array([name in off for name in names]))
        off = frozenset(name for name, somewhere in zip(names, told.any(axis=0), strict=True) if somewhere)
    return dataclasses.replace(run, kernels_off=run.kernels_off | off)


def compile_step(run: Run) -> jax.stages.Compiled:
    """Compile the training step for the run's mesh ahead of time; allocates nothing."""
    return trace_step(run).lower().compile()
