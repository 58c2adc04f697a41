"""Exact GELU of this project compared with `jax.nn.gelu`: `python -m benchmarks.gelu` (the extra `tpu` for its second half).

On this machine by the clock, in turn; for TPUs what libtpu expects of a vision MLP's forward and backward pass, with all but the
products computed again. Nothing runs on a TPU.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp

from ymplug_jax.analysis import aot, chips, hlo
from ymplug_jax.models import layers

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, Activation] = {
    "jax.nn.gelu": functools.partial(jax.nn.gelu, approximate=False),
    "layers.gelu": layers.gelu,
}


def on_cpu(elements: int, rounds: int) -> list[dict]:
    """Milliseconds of the activation and of its gradient in float32, medians over rounds."""
    x = jax.random.normal(jax.random.key(0), (elements,))
    programs = {}
    for name, gelu in ACTIVATIONS.items():
        programs[name, "forward"] = jax.jit(gelu)
        programs[name, "with gradient"] = jax.jit(jax.value_and_grad(lambda x, gelu=gelu: gelu(x).sum()))
    for program in programs.values():
        jax.block_until_ready(program(x))
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in range(rounds):
        for key, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(x))
            spent[key].append(1e3 * (time.perf_counter() - begin))
    return [{"what": what, "gelu": name, "ms": statistics.median(ms)} for (name, what), ms in spent.items()]


def on_tpu(topology: str, tokens: int, width: int) -> list[dict]:
    """Milliseconds that libtpu estimates for one bfloat16 MLP, forward and backward, on one chip."""
    device = aot.devices_of(topology)[0]
    place, chip = jax.sharding.SingleDeviceSharding(device), chips.of(device.device_kind)
    shapes = (tokens, width), (width, 4 * width), (4 * width, width)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    rows = []
    for name, gelu in ACTIVATIONS.items():

        def mlp(x: jax.Array, up: jax.Array, down: jax.Array, gelu: Activation = gelu) -> jax.Array:
            inner = jax.checkpoint(lambda x: gelu(x @ up) @ down, policy=layers.REMAT["dots"])
            return inner(x).astype(jnp.float32).sum()

        text = jax.jit(jax.grad(mlp, argnums=(0, 1, 2))).lower(*inputs).compile().as_text()
        cycles = hlo.traffic(text, {"data": 1}).cycles
        rows.append({"what": f"MLP, {topology.partition(':')[0]}", "gelu": name, "ms": 1e3 * cycles / chip.clock})
    return rows


def main() -> None:
    """Measure and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v6e:2x2"])
    args = parser.parse_args()
    rows = on_cpu(args.elements, args.rounds)
    for topology in args.topologies:
        rows += on_tpu(topology, args.tokens, args.width)
    print("| | " + " | ".join(f"{name}, ms" for name in ACTIVATIONS) + " | ratio |\n|---|---|---|---|")
    for what in dict.fromkeys(row["what"] for row in rows):
        theirs, ours = (next(r["ms"] for r in rows if (r["what"], r["gelu"]) == (what, name)) for name in ACTIVATIONS)
        print(f"| {what} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
