"""Memory of the text loss and its gradient on one TPU chip, as reported by libtpu: `python -m benchmarks.logits_memory`.

Logits of all positions at once, against a few positions at a time with and without keeping them for the backward pass. Nothing
runs and no TPU is needed, only the extra `tpu`.
"""

import argparse
import json
import os
from collections.abc import Callable

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp

from ymplug_jax.analysis import aot
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.tasks.common import losses

Loss = Callable[[Callable[[jax.Array], jax.Array], jax.Array, jax.Array, jax.Array], jax.Array]
WAYS: dict[str, Loss] = {
    "all positions at once": lambda logits_of, hidden, ids, mask: losses.next_token(logits_of(hidden), ids, mask)[0],
    "a few at a time, kept": lambda *given: losses.next_token_of(*given, keep_logits=True)[0],
    "a few at a time, computed again": lambda *given: losses.next_token_of(*given)[0],
}


def temporaries(loss: Loss, batch: int, length: int, width: int, vocab: int, device: jax.Device) -> int:
    """Temporary bytes of the loss and its gradient with respect to the bfloat16 hidden states."""
    model = GPT3(vocab=vocab, width=width, max_positions=1, dtype="bfloat16")
    place = jax.sharding.SingleDeviceSharding(device)

    def abstract(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(hidden: jax.Array, table: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = {"token_embed": table, "pos_embed": jnp.zeros((1, width), table.dtype)}

        def logits_of(hidden: jax.Array) -> jax.Array:
            return model.apply({"params": params}, hidden, method="logits")

        return jax.value_and_grad(lambda hidden: loss(logits_of, hidden, ids, mask))(hidden)

    hidden = abstract((batch, length - 1, width), "bfloat16")
    row = abstract((batch, length), "int32")
    compiled = jax.jit(step).lower(hidden, abstract((vocab, width), "bfloat16"), row, row).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Compile every variant for every vocabulary and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=80, help="tokens per text, start token included")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocab", type=int, nargs="*", default=[51200, 250880])
    parser.add_argument("--topology", default="v5e:2x2")
    args = parser.parse_args()
    device = aot.devices_of(args.topology)[0]
    facts = []
    print("| vocabulary | logits | bytes of f32 logits | temporaries | of the f32 logits |\n|---|---|---|---|---|")
    for vocab in args.vocab:
        logits = 4 * args.batch * (args.length - 1) * vocab
        for name, loss in WAYS.items():
            size = temporaries(loss, args.batch, args.length, args.width, vocab, device)
            facts.append({"vocab": vocab, "way": name, "logits_bytes": logits, "temporary_bytes": size})
            share = f"{100 * size / logits:.1f} %"
            print(f"| {vocab} | {name} | {logits / 2**20:.0f} MiB | {size / 2**20:.1f} MiB | {share} |", flush=True)
    print(json.dumps({"device": device.device_kind, "batch": args.batch, "length": args.length, "rows": facts}))


if __name__ == "__main__":
    main()
