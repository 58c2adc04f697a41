"""Memory of the layer of mPLUG-2 that runs self-attention over all tokens of a video: `python -m benchmarks.video_memory`.

The gradient of the universal layers in training, whose last one is that layer, with respect to parameters and tokens, compiled with
an array of all logits and as the model runs it. Nothing runs. No TPU is needed, only the extra `tpu`; `--on cpu` needs nothing.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ymplug_jax.analysis import aot
from ymplug_jax.core import config, sharding
from ymplug_jax.models import kernels, mplug2, plain_attention
from ymplug_jax.models.universal import Universal

WAYS = ("all logits at once", "as the model does")


def mesh_of(name: str) -> jax.sharding.Mesh:
    """A mesh of one device: the processor for "cpu", else an abstract device of a TPU topology."""
    if name == "cpu":
        return sharding.make_mesh(devices=jax.devices("cpu")[:1])
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return sharding.make_mesh(devices=aot.devices_of(name)[:1])


def temporaries(layers: Universal, batch: int, tokens: int, way: str, mesh: jax.sharding.Mesh) -> int | None:
    """Temporary bytes of the video's pass through the universal layers and back, with dropout; None if the device's memory is too small.

    Args:
      layers: the layers, without parameters.
      batch: number of videos B.
      tokens: number of tokens of a video M.
      way: one of `WAYS`.
      mesh: the device.
    """
    place = sharding.replicated(mesh)

    def abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    video = abstract(jax.ShapeDtypeStruct((batch, tokens, layers.width), jnp.dtype(layers.dtype)))
    params = jax.eval_shape(lambda video: layers.init(jax.random.key(0), video, method="read_video"), video)
    params = jax.tree.map(abstract, params)

    def summed(params: dict, video: jax.Array, key: jax.Array) -> jax.Array:
        how = {"deterministic": False, "rngs": {"dropout": key}}
        return jnp.sum(layers.apply(params, video, method="read_video", **how).astype(jnp.float32))

    key = abstract(jax.eval_shape(lambda: jax.random.key(0)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding.computing(mesh, config.Mesh().rules))
        if way == WAYS[0]:
            stack.enter_context(plain_attention.undivided())
            stack.enter_context(kernels.without(kernels.KERNELS))
        lowered = jax.jit(jax.grad(summed, argnums=(0, 1))).lower(params, video, key)
        try:
            return lowered.compile().memory_analysis().temp_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None


def main(words: Sequence[str] | None = None) -> None:
    """Compile both ways for every device and batch and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="text side of the model, a key of mplug2.TEXTS")
    parser.add_argument("--tokens", type=int, default=4097, help="tokens of a video; 4097 are 16 frames of ViT-L/14")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--on", nargs="*", default=["cpu", "v5e:2x2"], help='"cpu" or TPU topologies')
    args = parser.parse_args(words)
    layers = mplug2.TEXTS[args.size][1].clone(dtype="bfloat16", remat="full")
    rows = []
    print(f"| device | batch | {WAYS[0]} | {WAYS[1]} | share |\n|---|---|---|---|---|")
    for name in args.on:
        mesh = mesh_of(name)
        for batch in args.batch:
            sizes = [temporaries(layers, batch, args.tokens, way, mesh) for way in WAYS]
            rows.append({"device": name, "batch": batch} | dict(zip(WAYS, sizes, strict=True)))
            texts = ["does not fit" if size is None else f"{size / 2**30:.2f} GiB" for size in sizes]
            whole, blocks = sizes
            share = "" if not whole or blocks is None else f"{100 * blocks / whole:.0f} %"
            print(f"| {name} | {batch} | {texts[0]} | {texts[1]} | {share} |", flush=True)
    print(json.dumps({"size": args.size, "tokens": args.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
