"""Ahead-of-time compilation of the training step for a TPU slice: memory, communication and predicted step time.

The step is the one that `--mode train` runs, lowered for the devices of the slice. libtpu (the extra `tpu`) compiles it without a
TPU. Memory comes from XLA's memory analysis, FLOPs from the traced program, communication from the compiled program, and time from
a roofline model.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ymplug_jax.analysis import chips, flops, hlo
from ymplug_jax.core import config
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.text_table import columns, human
from ymplug_jax.models import plain_attention
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.setup import Run

ADVICE = (
    "reduce memory, cheapest first: rematerialise more (config.model.llm.remat=full, config.model.vision.remat=full), a larger "
    "config.mesh.fsdp, config.train.frozen_dtype=int8, config.train.accumulate=2, a smaller config.train.batch_size"
)

COSTS = 16  # operations listed


def compile_for(experiment: Experiment, topology: str, slices: int = 1) -> dict[str, Any]:
    """Compile the training step for a TPU topology and report its cost.

    Args:
      experiment: resolved settings.
      topology: of one slice, e.g. "v5e:4x8".
      slices: number of slices.

    Returns:
      task, topology, slices, devices, device_kind, mesh and batch_size, and:

      - fits: whether the step fits in the memory of a device; advice: what to change if it does not.
      - hbm_bytes_per_device, hbm (its parts), hbm_capacity: bytes.
      - compile_seconds.
      - model_flops_per_device: FLOPs of a step without recomputation; program_flops_per_device: with recomputation.
      - collectives: kind -> mesh axes -> bytes of the results; memory_traffic_bytes: HBM traffic.
      - seconds: the terms of the roofline, see `chips.roofline`.
      - predicted_step_seconds, predicted_mfu, predicted_samples_per_second: by the roofline.
      - compiler_step_seconds, compiler_mfu: by libtpu's estimate for each instruction.
      - compiler_costs: the most expensive operations by that estimate, as `hlo.Cost` and seconds.

    Raises:
      ValueError: the topology is unknown, or the settings do not fit it.
    """
    run, chip, facts = _prepared(experiment, topology, slices)
    facts |= {
        "model_flops_per_device": model_flops(run) / run.mesh.size,
        "program_flops_per_device": program_flops(run) / run.mesh.size,
    }
    compiled, more = _compiled(lambda: step_lib.compile_step(run), chip)
    facts |= more
    if compiled is None:
        return facts
    moved = hlo.traffic(compiled.as_text() or "", run.mesh.shape)
    return facts | _prediction(facts, moved, chip, slices)


def compile_answers(experiment: Experiment, topology: str) -> dict[str, Any]:
    """Compile the predictions of an evaluation, such as generated answers, for a TPU topology and report their memory.

    Args:
      experiment: resolved settings; `config.train.batch_size` rows are answered at a time.
      topology: of one slice, e.g. "v5e:1x1".

    Returns:
      Those of `compile_for` up to compile_seconds, without FLOPs.

    Raises:
      Mistake: the task predicts nothing.
      ValueError: the topology is unknown, or the settings do not fit it.
    """
    from ymplug_jax.training import evaluate  # imported here: it imports Orbax

    run, chip, facts = _prepared(experiment, topology, 1)
    if run.task.predict is None:
        raise Mistake(f"--program predict: the task {experiment.task} predicts nothing; use --program train")
    batch = setup.abstract_batch(run, run.task.asked_spec)

    def compile_it() -> jax.stages.Compiled:
        with run.tracing():
            return evaluate.predictor(run).lower(run.state.trainable, run.held, batch).compile()

    return facts | _compiled(compile_it, chip)[1]


def _prepared(experiment: Experiment, topology: str, slices: int) -> tuple[Run, chips.Chip, dict[str, Any]]:
    """The run on the topology, its chip, and the facts that need no compilation."""
    run = setup.prepare(experiment, devices_of(topology, slices))
    kind = run.mesh.devices.flat[0].device_kind
    chip = chips.of(kind)
    if chip is None:
        raise ValueError(
            f"--topology {topology}: no figures for device {kind!r}; choose one of {', '.join(chips.CHIPS)}"
        )
    facts: dict[str, Any] = {
        "task": experiment.task,
        "topology": topology,
        "slices": slices,
        "devices": run.mesh.size,
        "device_kind": kind,
        "mesh": dict(run.mesh.shape),
        "batch_size": experiment.train.batch_size,
        "hbm_capacity": int(chip.hbm),
    }
    return run, chip, facts


def _compiled(
    compile_it: Callable[[], jax.stages.Compiled], chip: chips.Chip
) -> tuple[jax.stages.Compiled | None, dict[str, Any]]:
    """Compile a program; (None if it does not fit, facts about its memory)."""
    begin = time.perf_counter()
    try:
        compiled = compile_it()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, {"fits": False, "hbm_bytes_per_device": _wanted(str(error)), "advice": ADVICE}
    facts = {"compile_seconds": round(time.perf_counter() - begin, 1)} | _memory(compiled)
    facts["fits"] = facts["hbm_bytes_per_device"] <= chip.hbm
    return compiled, facts | ({} if facts["fits"] else {"advice": ADVICE})


def _wanted(message: str) -> int | None:
    """Bytes that the program would need, from the compiler's out-of-memory message; None if the message has no figure."""
    used = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return int(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2])))) if used else None


def _memory(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """XLA's memory analysis for one device."""
    memory: Any = compiled.memory_analysis()  # untyped in JAX
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return {"hbm_bytes_per_device": sum(parts.values()), "hbm": parts}


def _prediction(facts: Mapping[str, Any], moved: hlo.Traffic, chip: chips.Chip, slices: int) -> dict[str, Any]:
    """Communication and time of one step, by the roofline and by the compiler's estimate."""
    mesh = facts["mesh"]
    links = network = 0.0
    for name, axes in moved.collectives.items():
        for axis, size in axes.items():
            names = [part for part in axis.split(",") if part in mesh]
            group = math.prod(mesh[part] for part in names)
            over, between = chips.leaving(name, size, max(group, 1), slices if "data" in names else 1)
            links, network = links + over, network + between
    seconds = chips.roofline(
        chip,
        flops=facts["program_flops_per_device"],
        product_bytes=moved.product_bytes,
        other_bytes=moved.other_bytes,
        links=links,
        network=network,
    )
    expected = moved.cycles / chip.clock + moved.kernel_bytes / chip.hbm_rate + seconds["links"] + seconds["network"]
    return {
        "collectives": {
            name: {axis: int(size) for axis, size in axes.items()} for name, axes in moved.collectives.items()
        },
        "memory_traffic_bytes": int(moved.product_bytes + moved.other_bytes),
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "predicted_step_seconds": seconds["step"],
        "predicted_mfu": facts["model_flops_per_device"] / chip.flops / seconds["step"],
        "predicted_samples_per_second": facts["batch_size"] / seconds["step"],
        "compiler_step_seconds": expected,
        "compiler_mfu": facts["model_flops_per_device"] / chip.flops / expected,
        "compiler_costs": [cost._asdict() | {"seconds": cost.cycles / chip.clock} for cost in moved.costs[:COSTS]],
    }


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """Abstract devices of a TPU topology. Programs can be compiled for them, but not run.

    Args:
      topology: of one slice, e.g. "v5e:4x8".
      slices: number of slices.

    Raises:
      ValueError: the topology is unknown, or libtpu is not installed.
    """
    from jax.experimental import topologies

    more: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if topology.startswith("v4:"):
        more["chip_config_name"] = "megacore"  # one device per chip
    if set(topology.partition(":")[2].split("x")) == {"1"}:
        more["chips_per_host_bounds"] = (1, 1, 1)  # a single chip; by default hosts have four
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology}: {reason}; give e.g. v5e:4x8 or v5p:4x4x4, and install the extra: pip install 'ymplug_jax[tpu]'"
        ) from None


def program_flops(run: Run) -> int:
    """FLOPs of the matrix products of one step on all devices, with the recomputation of rematerialised layers."""
    step = step_lib.make_train_step(run.task, run.tx, run.rate, run.experiment.train.accumulate)
    key = jax.random.key(0)
    with run.tracing():
        return flops.count(step, run.state, run.held, setup.abstract_batch(run), key)


def model_flops(run: Run) -> int:
    """FLOPs of the matrix products that one step requires on all devices: without recomputation and gradients of frozen weights."""
    plain = _without_remat(config.settings_of(run.experiment))
    task = setup.task_lib.get(config.from_config_dict(plain))

    def gradient(trainable: state_lib.Params, rest: tuple[Any, Any], batch: Any, key: jax.Array) -> Any:
        frozen, carried = rest
        return jax.grad(lambda t: task.training_loss(state_lib.merge(t, frozen), carried, batch, key)[0])(trainable)

    nowhere = jax.sharding.AbstractMesh((1,), ("data",))  # on one device no kernel repeats work
    inputs = (run.state.trainable, (run.frozen, run.state.carried), setup.abstract_batch(run))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    key = jax.random.key(0)  # JAX 0.11 computes nothing under an abstract mesh
    with jax.sharding.use_abstract_mesh(nowhere), plain_attention.undivided():
        return flops.count(gradient, *shapes, key)


def _without_remat(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        kept = {"remat": "none", "keep_logits": True}
        return {key: kept[key] if key in kept else _without_remat(value) for key, value in settings.items()}
    return settings


def render(facts: Mapping[str, Any]) -> str:
    """The report of `compile_for` as a table for the terminal."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    rows = [("devices", f"{facts['devices']} {facts['device_kind']}, {mesh}")]
    if facts["hbm_bytes_per_device"] is not None:
        parts = ", ".join(f"{name} {human(size)}" for name, size in facts.get("hbm", {}).items())
        total, capacity = (
            human(facts["hbm_bytes_per_device"]),
            human(facts["hbm_capacity"]),
        )
        rows.append(("memory per device", f"{total} of {capacity}" + (f": {parts}" if parts else "")))
    if "seconds" in facts:
        for kind, axes in facts["collectives"].items():
            rows.append((kind, ", ".join(f"{axis}: {human(size)}" for axis, size in axes.items())))
        spent = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in facts["seconds"].items())
        rows.append(("predicted time", spent))
        rows.append(
            (
                "predicted MFU",
                f"{100 * facts['predicted_mfu']:.1f} %, {facts['predicted_samples_per_second']:.0f} samples/s; "
                f"{facts['model_flops_per_device'] / 1e12:.1f} TFLOP per device, "
                f"{facts['program_flops_per_device'] / 1e12:.1f} with recomputation",
            )
        )
        rows.append(
            (
                "compiler's estimate",
                f"{1e3 * facts['compiler_step_seconds']:.1f} ms, MFU {100 * facts['compiler_mfu']:.1f} %",
            )
        )
        share = sum(cost["seconds"] for cost in facts["compiler_costs"]) / facts["compiler_step_seconds"]
        rows.append((f"of which {100 * share:.0f} %", "time, instructions, operation"))
        rows += [
            ("", f"{1e3 * cost['seconds']:7.2f} ms {cost['times']:5.0f} x  {cost['operation']}")
            for cost in facts["compiler_costs"]
        ]
    if not facts["fits"]:
        rows.append(("DOES NOT FIT", facts["advice"]))
    return columns(rows)
