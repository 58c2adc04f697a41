"""Cost reports of compiled steps: FLOPs counted by hand, traffic of small programs, and equality with training's program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from ymplug_jax.analysis import aot, chips, flops, hlo
from ymplug_jax.core import sharding
from ymplug_jax.training import setup


def test_flops_of_loops_and_recomputation() -> None:
    x, w = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
    one = 2 * 8 * 16 * 16

    def loss(x: jax.Array, remat: bool) -> jax.Array:
        body = lambda c, k: (jnp.tanh(c @ k), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)[0].sum()

    assert flops.count(lambda x: loss(x, False), x) == 5 * one
    assert flops.count(jax.grad(lambda x: loss(x, False)), x) == 2 * 5 * one  # no gradient of the weights
    assert flops.count(jax.grad(lambda x: loss(x, True)), x) == 3 * 5 * one


@pytest.mark.parametrize(("axis", "size"), [("data", 2), ("fsdp", 4)])
def test_collectives_by_axis_and_loop(axis: str, size: int) -> None:
    mesh = sharding.make_mesh(2, 4, 1)
    place = NamedSharding(mesh, PartitionSpec(axis))

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            total = jax.lax.with_sharding_constraint(jnp.sum(jnp.sin(c), axis=0), NamedSharding(mesh, PartitionSpec()))
            return jax.lax.with_sharding_constraint(c * total, place), None

        return jax.lax.scan(body, x, None, length=3)[0]

    text = step.lower(jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=place)).compile().as_text()
    found = hlo.traffic(text, mesh.shape)
    assert found.collectives == {"all-reduce": {axis: 3 * 4096.0}}


def test_groups_are_read_in_every_form() -> None:
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    for text, expected in (
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", (4, "fsdp")),
        ("replica_groups=[8,2]<=[16]", (2, "tensor")),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", (2, "data")),
        ("replica_groups=[1,16]<=[16]", (16, "data,fsdp,tensor")),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}", (8, "data,fsdp")),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=2], device_ids=([4,2,2]T(2,0,1)) {'a'}", (4, "data,tensor")),
        ("source_target_pairs={{0,8},{8,0}}", (2, "data")),
    ):
        assert hlo._group(text, mesh) == expected, text


def test_collectives_that_run_beside_others_count_once() -> None:
    """An all-gather repeated in a chain of fusions, and starts whose result type also lists the operand."""
    text = """HloModule hidden

%gathering.1 (p.1: f32[2,8]) -> f32[8,8] {
  %p.1 = f32[2,8]{1,0} parameter(0)
  ROOT %ag.1 = f32[8,8]{1,0} all-gather(%p.1), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

%gathering.2 (p.2: f32[2,8]) -> f32[8,8] {
  %p.2 = f32[2,8]{1,0} parameter(0)
  ROOT %ag.2 = f32[8,8]{1,0} all-gather(%p.2), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %start = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
  %done = f32[2,8]{1,0} collective-permute-done(%start)
  %sum = ((f32[2,8]{1,0}, f32[4]{0}), (f32[8,8]{1,0}, f32[16]{0})) all-gather-start(%x, %x), replica_groups=[2,4]<=[8], dimensions={0}
  %f.1 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%gathering.1
  ROOT %f.2 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%gathering.2
}
"""
    found = hlo.traffic(text, {"data": 2, "fsdp": 4, "tensor": 1})
    assert found.collectives == {"collective-permute": {"data": 64.0}, "all-gather": {"fsdp": 256.0 + 256.0 + 64.0}}


def test_cycles_by_operation_and_pass() -> None:
    def line(name: str, kind: str, path: str, cycles: int) -> str:
        config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
        return f'  %{name} = f32[8]{{0}} {kind}(%x, %x), metadata={{op_name="jit(step)/{path}"}}, {config}'

    lines = [
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %x = f32[8]{0} parameter(0)",
        line("a", "add", "jvp(Model.encode)/vision/while/body/closed_call/blocks/norm/add", 5),
        line("b", "dot", "transpose(jvp(Model.encode))/vision/while/body/checkpoint/blocks/mlp/up/dot_general", 40),
        line("c", "dot", "transpose(jvp(Model.encode))/vision/while/body/closed_call/blocks/mlp/up/dot_general", 2),
        line("d", "add", "transpose(jvp(Model))/while/body/checkpoint/rematted_computation/blocks/norm/add", 7),
        "}",
    ]
    found = hlo.traffic("HloModule m\n\n" + "\n".join(lines), {"data": 1})
    assert found.cycles == 54
    assert found.costs == (
        hlo.Cost("backward vision/blocks/mlp/up/dot_general", True, 2, 42),
        hlo.Cost("backward again blocks/norm/add", False, 1, 7),
        hlo.Cost("forward vision/blocks/norm/add", False, 1, 5),
    )


def test_bytes_leaving_a_chip() -> None:
    assert chips.leaving("all-reduce", 8.0, 4) == (12.0, 0.0)
    assert chips.leaving("all-gather", 8.0, 4) == (6.0, 0.0)
    assert chips.leaving("reduce-scatter", 2.0, 4) == (6.0, 0.0)
    links, network = chips.leaving("all-reduce", 8.0, 8, slices=2)
    assert (links, network) == (
        12.0,
        2.0,
    )  # reduced within each slice of four first, then a quarter of the bytes crosses


def test_model_flops_of_pretraining_are_those_of_the_formula() -> None:
    """A frozen decoder takes two passes (forward, gradient of its input), the trained vision encoder three."""
    ready = setup.prepare(tiny.experiment(), jax.devices()[:1])
    assert aot.model_flops(ready) <= aot.program_flops(ready)
    model, data = ready.experiment.model, ready.experiment.data
    batch, length = ready.experiment.train.batch_size, data.max_tokens
    row, llm, tower = model.abstractor.queries + length, model.llm, model.vision
    dense = 12 * llm.width**2 * llm.depth * batch * row
    attention = 2 * llm.depth * batch * row * row * llm.width
    head = batch * (length - 1) * llm.width * llm.vocab
    decoder = 2 * 2 * (dense + head) + 3 * 2 * attention  # attention has no frozen operand
    vision = aot.model_flops(ready) - decoder
    patches = data.frames * (data.image_size // tower.patch_size) ** 2
    wanted = 3 * 2 * batch * patches * tower.depth * tower.width**2 * (4 + 4 + 1 + 8)
    assert 1.0 < vision / wanted < 2.0  # attention, the class token, abstractor and connector are extra


def _compile(*more: str) -> subprocess.CompletedProcess:
    config = Path(__file__).parents[2] / "configs" / "tiny" / "pretrain.py"
    command = [sys.executable, "-m", "ymplug_jax.main", "--config", str(config), "--mode", "compile"]
    settings = ["--config.data.examples=64", "--config.train.frozen_dtype=bfloat16"]
    return subprocess.run([*command, *settings, *more], capture_output=True, text=True)


def test_compile_mode_on_a_slice() -> None:
    done = _compile("--topology", "v5e:2x4", "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 8 and facts["fits"] and facts["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert facts["hbm_bytes_per_device"] == sum(facts["hbm"].values())
    assert any("data" in axes for kind in facts["collectives"].values() for axes in kind)
    assert any("fsdp" in axes for axes in facts["collectives"]["all-gather"])  # libtpu moves them into fusions
    assert 0 < facts["predicted_mfu"] < 1
    assert "predicted MFU" in done.stderr
    costs = facts["compiler_costs"]
    assert costs == sorted(costs, key=lambda cost: -cost["cycles"]) and costs[0]["operation"] in done.stderr
    assert 0 < sum(cost["seconds"] for cost in costs) < facts["compiler_step_seconds"]
    two = json.loads(_compile("--topology", "v5e:2x2", "--slices", "2").stdout.splitlines()[-1])
    assert two["devices"] == 8 and two["seconds"]["network"] > 0
    assert _compile("--topology", "v9:1x1").returncode == 2


def test_compile_mode_reports_a_step_that_does_not_fit() -> None:
    done = _compile("--topology", "v5e:2x2", "--config.train.batch_size=262144", "--config.data.examples=999999")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 3 and not facts["fits"] and "remat" in facts["advice"]


def test_predictions_compiled_for_a_single_chip() -> None:
    """Answers of the chat model. The vocabulary is BLOOM's, whose end token needs no tokenizer."""
    chat = [
        "--config",
        str(Path(__file__).parents[2] / "configs" / "tiny" / "chat_instruct.py"),
        "--topology",
        "v5e:1x1",
    ]
    small = ["--config.model.llm.vocab=250880", "--config.model.llm.depth=1", "--config.model.vision.depth=1"]
    done = _compile("--program", "predict", *chat, *small, "--config.options.new_tokens=2")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 1 and facts["fits"] and facts["hbm_bytes_per_device"] == sum(facts["hbm"].values())
    assert facts["hbm"]["arguments"] > 2 * 250880 * 64  # the embedding table in half precision
    done = _compile("--program", "predict", "--slices", "2")
    assert done.returncode == 2 and "--slices: --program predict answers on one slice" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_program_as_training(dtype: str) -> None:
    """The program lowered for a slice equals, line by line, the one that training lowers for as many local devices.

    In bfloat16 both use the TPU kernels; the local run is patched to choose them.
    """
    script = f"""
import os, re
os.environ |= {{"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}}
import jax
from tests import tiny
from ymplug_jax.analysis import aot
from ymplug_jax.core import sharding
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib
real = sharding.computes_on
texts = []
for devices in (jax.devices(), aot.devices_of("v5e:2x4", 1)):
    there = devices[0].platform == "tpu"
    sharding.computes_on = real if there else lambda maker: maker == "tpu"
    model = tiny.MODEL.clone(vision=tiny.MODEL.vision.clone(dtype="{dtype}"), llm=tiny.MODEL.llm.clone(dtype="{dtype}"))
    traced = step_lib.trace_step(setup.prepare(tiny.experiment(model), devices))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    texts.append(re.sub(r"body.{{3}}: .{{3}}[A-Za-z0-9+/=]{{100,}}", "kernel", text))  # its bytes contain source locations
assert texts[0] == texts[1] and len(texts[0]) > 10000
assert ("tpu_custom_call" in texts[0]) == ("{dtype}" == "bfloat16")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr[-2000:]
