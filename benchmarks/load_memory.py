"""Peak memory of loading a decoder into int8: `python -m benchmarks.load_memory`.

A child process writes a checkpoint of random bfloat16 weights, layer by layer as the converter does, or as a run saves its frozen
parameters. Another child loads a tiny decoder, notes its resident memory, loads the checkpoint and notes its highest resident memory.
The int8 size is that of the loaded arrays: one byte for each value of the stacked matrices, two for each of their scales
and for all else (embeddings, norms, biases). A device is the CPU here, so the host's and the device's memory are one.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.convert import bloom
from ymplug_jax.convert.store import Store
from ymplug_jax.core import checkpoint, quantize, sharding, state, stored_params
from ymplug_jax.models import language_models
from ymplug_jax.models.bloom import Bloom

SIZES = {name: lm for name, lm in language_models.SIZES.items() if isinstance(lm, Bloom)}


def like(lm: Bloom, held: bool) -> state.Params:
    """Abstract parameters {llm: ...}: bfloat16 as stored, or as held in int8."""
    place = sharding.replicated(sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place), {"llm": bloom.like_of(lm)}
    )
    axes = tuple((f"llm/{path}", words) for path, words in language_models.axes_of(lm))
    return quantize.abstract(tree, axes) if held else tree


def write(lm: Bloom, folder: Path, form: str) -> None:
    """A checkpoint of random weights, as a conversion or as the frozen parameters of a run."""
    rng, leaves = np.random.default_rng(0), state.flatten(like(lm, held=False))
    one = {
        shape: rng.normal(0, 0.02, shape).astype(jnp.bfloat16) for shape in {leaf.shape[1:] for leaf in leaves.values()}
    }
    if form == "run":
        full = {path: np.broadcast_to(one[leaf.shape[1:]], leaf.shape) for path, leaf in leaves.items()}
        tree = state.unflatten({path: np.ascontiguousarray(value) for path, value in full.items()})
        checkpoint.Checkpoints(str(folder)).save_frozen(tree, like(lm, held=False))
        return
    store = Store(folder, {"model": "bloom"})
    for path, leaf in leaves.items():
        if "/blocks/" in path:
            for layer in range(leaf.shape[0]):
                store.write(path, layer, one[leaf.shape[1:]], leaf.shape)
        else:
            store.write(path, None, np.broadcast_to(one[leaf.shape[1:]], leaf.shape).copy(), leaf.shape)
        store.wrote(path)
    store.finish(sorted(leaves), {"model": "bloom"})


def resident(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS now, VmHWM at its highest."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def load(lm: Bloom, folder: Path) -> dict[str, float]:
    """Load the checkpoint in this process and measure it."""
    abstract = like(lm, held=True)
    with tempfile.TemporaryDirectory() as tiny:  # what the libraries need once is no part of the model
        small = SIZES["bloom-tiny"]
        write(small, Path(tiny), "conversion")
        stored_params.load_params(tiny, like(small, held=True))
    before, began = resident("VmRSS"), time.perf_counter()
    params = jax.block_until_ready(stored_params.load_params(str(folder), abstract))
    peak = resident("VmHWM") - before
    size = sum(part.nbytes for part in jax.tree.leaves(params))
    stored = 2 * state.count(abstract)
    return {
        "int8_bytes": size,
        "bfloat16_bytes": stored,
        "before_bytes": before,
        "peak_bytes": peak,
        "peak_over_int8": round(peak / size, 3),
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure(size: str, depth: int, form: str, folder: Path) -> dict[str, float]:
    """Write and load in two child processes."""
    for step in ("write", "load"):
        command = [sys.executable, "-m", "benchmarks.load_memory", "--size", size, "--depth", str(depth)]
        done = subprocess.run(
            [*command, "--form", form, "--folder", str(folder), "--step", step],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run one step, or both in children and print the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="bloomz-1b7")
    parser.add_argument("--depth", type=int, default=0, help="number of layers; 0: all of the size")
    parser.add_argument("--form", choices=("conversion", "run"), default="conversion")
    parser.add_argument("--folder", type=Path, help="of the checkpoint; default: a temporary one")
    parser.add_argument("--step", choices=("write", "load"), help="run only this step, in this process")
    args = parser.parse_args()
    lm = SIZES[args.size]
    lm = lm.clone(depth=args.depth) if args.depth else lm
    if args.step == "write":
        write(lm, args.folder, args.form)
    elif args.step == "load":
        print(json.dumps(load(lm, args.folder)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(args.size, lm.depth, args.form, args.folder or Path(folder) / "checkpoint")
        print(json.dumps({"size": args.size, "depth": lm.depth, "form": args.form, **row}))


if __name__ == "__main__":
    main()
