"""The collectives of one compiled step: gradients, gathered shards of weights, and only those activations that the loss needs.

Each step is compiled by XLA for eight CPU devices and by libtpu for eight TPU chips, because the two compilers choose collectives
independently.
"""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from tests import tiny
from ymplug_jax.analysis import aot, hlo
from ymplug_jax.analysis.hlo import Collective
from ymplug_jax.core import state
from ymplug_jax.core.config import Experiment
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.setup import Run

pytestmark = pytest.mark.slow  # the first test compiles all steps with libtpu

# Sizes that identify arrays by their shape: only the decoder has depth 3, only the shared embeddings have width 6.
MODEL = tiny.MODEL.clone(llm=tiny.MODEL.llm.clone(depth=3))
PAIRS = tiny.MODEL.clone(contrastive_width=6)
NAMES = ("data 2", "data 4", "data 8", "tensor 2", "fsdp 4", "contrastive", "retrieve", "match")
ROWS, TEXT, QUERIES = 8, 8, tiny.MODEL.abstractor.queries


def experiment(name: str) -> Experiment:
    """Return the experiment of a name such as "data 8", "fsdp 4" or "contrastive", with one row per data shard."""
    if name == "contrastive":
        return tiny.experiment(PAIRS)
    if name == "retrieve":
        return dataclasses.replace(tiny.experiment(PAIRS), task="retrieve")
    if name == "match":
        own = tiny.experiment(tiny.MODEL.clone(classes=2), train={"batch_size": 2 * ROWS})
        return dataclasses.replace(own, task="match", options={"group": 2})  # two rows per device
    axis, size = name.split()
    if axis == "data":
        return tiny.experiment(train={"batch_size": int(size)})
    return tiny.experiment(MODEL, mesh={axis: int(size)})


def ready(name: str, devices: list[jax.Device]) -> Run:
    return setup.prepare(experiment(name), devices[: int(name.split()[1])] if name.startswith("data") else devices)


def collectives(name: str, devices: list[jax.Device]) -> list[Collective]:
    run = ready(name, devices)
    return hlo.collectives(step_lib.compile_step(run).as_text(), run.mesh.shape)


@functools.cache
def by_libtpu() -> dict[str, list[Collective]]:
    """Compile all experiments for TPU in a separate process, where libtpu describes the devices."""
    script = f"""
import json
from concurrent.futures import ThreadPoolExecutor
import sys
sys.path.insert(0, "tests/training")
import test_collectives as own
from ymplug_jax.analysis import aot
devices = aot.devices_of("v5e:2x4", 1)
with ThreadPoolExecutor(2) as pool:
    print(json.dumps(list(pool.map(lambda name: own.collectives(name, devices), {NAMES}))))
"""
    more = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    more["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | more)
    assert done.returncode == 0, done.stderr[-2000:]
    lists = json.loads(done.stdout.splitlines()[-1])
    return {name: [Collective(*one) for one in ones] for name, ones in zip(NAMES, lists, strict=True)}


def found(name: str, maker: str) -> list[Collective]:
    return by_libtpu()[name] if maker == "tpu" else collectives(name, jax.devices())


def dims(shape: str) -> tuple[int, ...]:
    """Return the dimensions of an HLO shape without ones: "bf16[1,32,128]" -> (32, 128)."""
    return tuple(int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n not in ("", "1"))


def sent(ones: list[Collective]) -> float:
    return sum(one.size * one.times for one in ones)


def trained_bytes(run: Run) -> int:
    return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.state.trainable))


@pytest.mark.parametrize("maker", ["cpu", "tpu"])
def test_data_parallelism_sends_only_gradients(maker: str) -> None:
    ones, run = found("data 8", maker), ready("data 8", jax.devices())
    assert {(one.kind, one.axes) for one in ones} == {("all-reduce", "data")}
    gradients = trained_bytes(run)
    if maker == "cpu":  # XLA on CPU sums the gradients from patches and from cls separately, in the MLP that both use
        blocks = run.state.trainable["vision"]["blocks"]
        both = [leaf for name in ("mlp", "mlp_norm") for leaf in jax.tree.leaves(blocks[name])]
        gradients += 4 * sum(math.prod(leaf.shape) for leaf in both)
    # Upper margin: scalars of loss and metrics. Lower margin: equal gradients (biases of one residual stream) are summed once.
    assert 0.97 * gradients <= sent(ones) < gradients + 512


@pytest.mark.parametrize("maker", ["cpu", "tpu"])
def test_matching_takes_negatives_from_the_same_device(maker: str) -> None:
    ones = found("match", maker)
    assert {(one.kind, one.axes) for one in ones} == {("all-reduce", "data")}
    assert sent(ones) < 1.3 * trained_bytes(ready("match", jax.devices()))


def test_weak_scaling() -> None:
    """With a constant number of rows per device, FLOPs and bytes per device do not depend on the number of devices."""
    sizes = (2, 4, 8)
    work = [aot.model_flops(ready(f"data {size}", jax.devices())) / size for size in sizes]
    traffic = [sent(found(f"data {size}", "tpu")) for size in sizes]
    assert max(work) < 1.1 * min(work)
    assert max(traffic) < 1.1 * min(traffic) and min(traffic) > 0


def test_tensor_parallelism_sums_hidden_states_and_gathers_no_activation() -> None:
    """Per layer and direction there are two all-reduces, after the row-parallel products; logits stay sharded by vocabulary."""
    ones, rows = found("tensor 2", "tpu"), ROWS // 4
    assert {one.kind for one in ones if "tensor" not in one.axes} == {"all-reduce"}
    over = [one for one in ones if "tensor" in one.axes]
    best = 4 * rows * (TEXT - 1) * 2  # the argmax of each vocabulary shard, for each target
    assert all(one.size <= best for one in over if one.kind != "all-reduce")
    assert not any(dims(shape)[-1:] == (MODEL.llm.vocab,) for one in over for shape in one.shapes)
    state_ = (rows, QUERIES + TEXT, MODEL.llm.width)
    sums = [one.times for one in over for shape in one.shapes if one.in_loop and dims(shape) == state_]
    assert sum(sums) == 2 * 2 * MODEL.llm.depth


def test_fsdp_gathers_one_layer_at_a_time() -> None:
    ones, run = found("fsdp 4", "tpu"), ready("fsdp 4", jax.devices())
    frozen = {path: leaf.shape for path, leaf in state.flatten(run.frozen).items() if path.startswith("llm/blocks/")}
    gathers = [(one, sorted(dims(shape))) for one in ones if one.kind == "all-gather" for shape in one.shapes]
    assert not any(shape in [sorted(whole) for whole in frozen.values()] for _, shape in gathers)
    kernels = [shape for path, shape in frozen.items() if path.endswith("kernel")]
    layer = [sorted(shape[1:]) for shape in kernels]
    assert all(one.in_loop for one, shape in gathers if shape in layer)
    gathered = sum(one.times * math.prod(shape) for one, shape in gathers if shape in layer)
    assert gathered == 2 * sum(map(math.prod, kernels))  # forward and backward


def test_fsdp_gathers_weights_not_activations() -> None:
    """No activation is exchanged inside the towers: all gathers and sums have the shape of one layer's parameter."""
    run = ready("fsdp 4", jax.devices())
    params = state.flatten(state.merge(run.state.trainable, run.frozen))
    layer = [sorted(leaf.shape[1:]) for path, leaf in params.items() if "/blocks/" in path]
    width = tiny.MODEL.vision.width
    layer.append(sorted((4, width // 4, width)))  # attention over frames: a kernel [D, D], gathered as four shards
    inside = [one for one in found("fsdp 4", "tpu") if one.in_loop and "fsdp" in one.axes]
    assert inside and {one.kind for one in inside} == {"all-gather", "all-reduce"}
    strange = [(one.kind, shape) for one in inside for shape in one.shapes if sorted(dims(shape)) not in layer]
    assert not strange


@pytest.mark.parametrize(("name", "maker"), [("contrastive", "cpu"), ("contrastive", "tpu"), ("retrieve", "tpu")])
def test_contrastive_losses_exchange_only_embeddings(name: str, maker: str) -> None:
    """A loss over the global batch exchanges embeddings, scores, ids and masks, but no hidden states, which are larger."""
    ones, run = found(name, maker), ready(name, jax.devices())
    assert {one.axes for one in ones} == {"data"}
    embeddings = 4 * ROWS * QUERIES * PAIRS.contrastive_width  # f32[B, Q, E]
    assert (
        embeddings < 4 * ROWS * PAIRS.llm.width
    )  # last hidden states of the texts: the smallest array that must not be exchanged
    exchanged = [one for one in ones if one.kind != "all-reduce"]
    assert exchanged
    for one in exchanged:
        ring = one.kind == "collective-permute"  # a ring step sends the row of one device
        assert (ROWS * one.size if ring else one.size) <= embeddings, one
    summed = sent([one for one in ones if one.kind == "all-reduce"])
    assert summed < 1.3 * trained_bytes(run)
