"""Times the training step on synthetic batches. Needs only JAX, Flax, Optax and ml_collections.

The step and the transfer of batches are those of training: `Feed` puts host batches on the devices two steps ahead, and one step is
queued behind the running one.
"""

import contextlib
import dataclasses
import logging
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ymplug_jax.analysis import aot, chips
from ymplug_jax.analysis import estimate as estimate_lib
from ymplug_jax.core import place_copies, places, sharding
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import TrainState
from ymplug_jax.core.text_table import columns, human
from ymplug_jax.data.prefetch import Feed
from ymplug_jax.tasks.task import Batch
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.setup import Run

WARM_UP = 3  # largest number of warm-up steps
PROFILED = 3  # profiled steps
PRODUCT = 2048  # rows and columns of the matrices that measure the peak of a CPU


def bench(experiment: Experiment, steps: int, workdir: epath.Path | None = None) -> dict[str, Any]:
    """Time `steps` training steps after min(`steps`, 3) warm-up steps.

    Args:
      experiment: resolved settings. Their data and checkpoints are not opened.
      steps: number of timed steps, at least 2.
      workdir: folder for a profile of three more steps (`profile/`, for TensorBoard or xprof); None: no profile.

    Returns:
      task, device_kind, devices, mesh, batch_size, steps, loss and versions, and:

      - step_seconds: median, p10, p90, minimum; compile_seconds.
      - samples_per_second; text_tokens_per_second: with padding, None for a task without text.
      - model_flops: of a step, without recomputation; program_flops: with recomputation.
      - peak_flops: FLOPs per second of all devices; peak_flops_source: where the figure comes from.
      - mfu: model_flops relative to the peak; hardware_flops_utilisation: program_flops relative to the peak.
      - input_wait: share of the time in which the step waited for a batch.
      - step_memory_bytes: XLA's memory analysis for one device; peak_memory_bytes: measured.

    Raises:
      Mistake: `steps` is below 2, or `workdir` cannot be created.
    """
    if steps < 2:
        raise Mistake(f"--steps {steps}: too small; give 2 or more")
    data = dataclasses.replace(experiment.data, path="", tokenizer="", examples=experiment.train.batch_size * 1000)
    train = dataclasses.replace(experiment.train, init_from="")
    run = setup.prepare(dataclasses.replace(experiment, data=data, train=train))
    if workdir is not None and not places.is_remote(
        workdir
    ):  # before compilation takes minutes; a bucket has no folders
        try:
            Path(workdir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(
                f"--workdir {workdir}: cannot be created ({error.strerror or error}); choose another folder"
            ) from None
    run = step_lib.with_checked_kernels(run)
    begin = time.perf_counter()
    compiled = step_lib.compile_step(run)
    compile_seconds = time.perf_counter() - begin
    logging.info("compiled in %.1f s; initialising parameters", compile_seconds)
    seconds, waits, loss = _timed(run, compiled, steps, workdir)
    return _facts(run, compiled, seconds, waits) | {"compile_seconds": round(compile_seconds, 2), "loss": loss}


def _timed(
    run: Run, compiled: jax.stages.Compiled, steps: int, workdir: epath.Path | None
) -> tuple[list[float], list[float], float]:
    """(seconds of each timed step, seconds that each waited for its batch, last loss)."""
    size, place = run.experiment.train.batch_size, sharding.replicated(run.mesh)
    state, frozen, _ = setup.fresh_state(run)
    frozen = setup.hold(run, frozen)
    key = sharding.on_all_hosts(lambda: jax.random.key(0), place)
    rows = sharding.local_rows(size, run.mesh)
    feed: Feed[Batch] = Feed(_Synthetic(run, rows), lambda local: sharding.put_batch(local, rows, size, run.mesh))
    seconds: list[float] = []
    waits: list[float] = []
    before: Metrics = {}
    last, warm_up = time.perf_counter(), min(WARM_UP, steps)
    for number in range(warm_up + steps):
        asked = time.perf_counter()
        batch = next(feed)
        waited = time.perf_counter() - asked
        state, metrics = compiled(state, frozen, batch, key)
        jax.block_until_ready(before)
        before, now = metrics, time.perf_counter()
        if number >= warm_up:
            seconds.append(now - last)
            waits.append(waited)
        last = now
        if number >= warm_up and (number - warm_up + 1) % max(steps // 4, 1) == 0:
            logging.info("step %d of %d: %.4f s", number - warm_up + 1, steps, statistics.median(seconds))
    jax.block_until_ready(before)
    if workdir is not None:
        _profile(lambda state: compiled(state, frozen, next(feed), key), state, workdir)
    feed.close()
    return seconds, waits, before["loss"].value()


def _profile(step: Callable[[TrainState], tuple[TrainState, Metrics]], state: TrainState, workdir: epath.Path) -> None:
    """Profile `PROFILED` more steps into `workdir`/profile."""
    with contextlib.ExitStack() as stack:
        folder = Path(workdir / "profile")
        if places.is_remote(workdir):  # the profiler would make a local folder called gs:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ymplug_jax_")))
        with jax.profiler.trace(str(folder)):
            for _ in range(PROFILED):
                state, metrics = step(state)
            jax.block_until_ready(metrics)
        if places.is_remote(workdir):
            place_copies.upload_folder(folder, workdir / "profile")
    logging.info("profile of %d steps: %s", PROFILED, workdir / "profile")


def _facts(run: Run, compiled: jax.stages.Compiled, seconds: list[float], waits: list[float]) -> dict[str, Any]:
    devices, size = run.mesh.devices.flatten(), run.experiment.train.batch_size
    median = statistics.median(seconds)
    p10, p90 = np.quantile(seconds, [0.1, 0.9])
    model, program = aot.model_flops(run), aot.program_flops(run)
    peak, source = peak_flops(devices)
    text = run.task.spec.get("ids")
    memory = estimate_lib.estimate(run, compiled)["bytes_per_device"]
    stats = devices[0].memory_stats() if devices[0].process_index == jax.process_index() else None
    return {
        "task": run.experiment.task,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(run.mesh.shape),
        "batch_size": size,
        "steps": len(seconds),
        "step_seconds": {"median": median, "p10": float(p10), "p90": float(p90), "minimum": min(seconds)},
        "samples_per_second": size / median,
        "text_tokens_per_second": size * text.shape[-1] / median if text else None,
        "model_flops": model,
        "program_flops": program,
        "peak_flops": peak,
        "peak_flops_source": source,
        "mfu": model / median / peak,
        "hardware_flops_utilisation": program / median / peak,
        "input_wait": sum(waits) / sum(seconds),
        "step_memory_bytes": memory.get("step_peak"),
        "peak_memory_bytes": _peak_memory(stats),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


def _peak_memory(stats: dict[str, int] | None) -> int:
    """Peak memory of the device in bytes, or of this process if the device keeps no statistics."""
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Synthetic:
    """Endless batches of this host's rows. Frames are noise, all other values are ones."""

    skipped = 0  # corrupt records, which training reports

    def __init__(self, run: Run, rows: np.ndarray):
        rng = np.random.default_rng(0)

        def make(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            shape = (len(rows), *leaf.shape[1:])
            return rng.integers(0, 256, shape, np.uint8) if leaf.dtype == jnp.uint8 else np.ones(shape, leaf.dtype)

        self._batch = {name: make(leaf) for name, leaf in setup.abstract_batch(run).items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield self._batch

    def close(self) -> None:
        """Does nothing; `Feed` calls it."""


def peak_flops(devices: np.ndarray) -> tuple[float, str]:
    """(peak FLOPs per second of all devices together, source of the figure): from `chips.CHIPS`, or measured."""
    if chip := chips.of(devices[0].device_kind):
        return chip.flops * len(devices), "chips.py, bfloat16"
    x = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    best = math.inf
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - begin)
    return 2 * PRODUCT**3 / best, f"measured: float32 product of {PRODUCT} x {PRODUCT} matrices on all cores"


def render(facts: dict[str, Any]) -> str:
    """The result of `bench` as a table for the terminal."""
    times = facts["step_seconds"]
    rows = [
        ("devices", f"{facts['devices']} {facts['device_kind']}"),
        ("step", f"{times['median']:.4f} s, p10 to p90 {times['p10']:.4f} to {times['p90']:.4f} s"),
        ("samples", f"{facts['samples_per_second']:.1f} per second, {facts['batch_size']} per step"),
        (
            "MFU",
            f"{100 * facts['mfu']:.1f} % of {facts['peak_flops'] / 1e12:.2f} TFLOP/s ({facts['peak_flops_source']})",
        ),
        ("input wait", f"{100 * facts['input_wait']:.1f} % of the time"),
        ("peak memory", human(facts["peak_memory_bytes"])),
    ]
    return columns(rows)
