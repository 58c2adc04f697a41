"""Memory traffic per token of caption decoding on one TPU chip, compiled by libtpu: `python -m benchmarks.decode_traffic`.

Greedy search of the 1.3B decoder in bfloat16 after 128 visual tokens. A token cannot cost less than one reading of the weights
and of the keys and values; what the compiled program moves is read from its text, loops counted as often as they run, the reading
of the prefix shared out over the tokens. Nothing runs and no TPU is needed, only the extra `tpu`.
"""

import argparse
import json
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp

from ymplug_jax.analysis import aot, chips, hlo
from ymplug_jax.models import decode
from ymplug_jax.models.gpt3 import GPT3

LM = GPT3(max_positions=512, dtype="bfloat16")
QUERIES = 128


def account(batch: int, tokens: int, device: jax.Device) -> dict[str, float]:
    """GiB per token that must be read and that are moved, their ratio, and milliseconds by memory bandwidth and by libtpu's estimate."""
    place = jax.sharding.SingleDeviceSharding(device)

    def abstract(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shapes = jax.eval_shape(lambda: LM.init(jax.random.key(0), jnp.zeros((1, 1, LM.width))))["params"]
    params = jax.tree.map(lambda leaf: abstract(leaf.shape, "bfloat16"), shapes)
    inputs = (
        abstract((batch, QUERIES, LM.width), "bfloat16"),
        abstract((batch, 1), "int32"),
        abstract((batch,), "int32"),
    )

    def caption(params: dict, *given: jax.Array) -> jax.Array:
        return decode.greedy(LM, params, *decode.prompt_of(LM, params, *given), new_tokens=tokens, eos=7).ids

    compiled = jax.jit(caption).lower(params, *inputs).compile()
    moved, chip = hlo.traffic(compiled.as_text(), {"data": 1}), chips.of(device.device_kind)
    weights = 2 * (sum(leaf.size for leaf in jax.tree.leaves(params)) - shapes["pos_embed"].size)
    needed = weights + 4 * batch * LM.depth * LM.width * (QUERIES + 1 + tokens / 2)
    each = (moved.product_bytes + moved.other_bytes) / tokens
    return {
        "batch": batch,
        "needed_gib": needed / 2**30,
        "moved_gib": each / 2**30,
        "share": needed / each,
        "memory_ms": 1e3 * each / chip.hbm_rate,
        "compiler_ms": 1e3 * moved.cycles / chip.clock / tokens,
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }


def main() -> None:
    """Compile for every batch and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--topology", default="v5e:2x2")
    args = parser.parse_args()
    device = aot.devices_of(args.topology)[0]
    rows = [account(batch, args.tokens, device) for batch in args.batches]
    print(
        "| batch | GiB a token, needed | moved | share | ms by memory | ms by libtpu | temporaries |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['batch']} | {row['needed_gib']:.2f} | {row['moved_gib']:.2f} | {100 * row['share']:.0f} % "
            f"| {row['memory_ms']:.1f} | {row['compiler_ms']:.1f} | {row['temporaries_gib']:.2f} GiB |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
