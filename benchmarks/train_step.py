"""The training step with a frozen decoder compared with training the decoder too: `python -m benchmarks.train_step`.

The model is small but has the real one's proportions (most parameters in the decoder). Synthetic batches, so only the
step counts. Memory is XLA's own count for the compiled step.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib


def experiment() -> Experiment:
    """About 36 million parameters, 32 million of them in the decoder."""
    model = MPLUGVideo(
        vision=TimeSformer(image_size=64, patch_size=16, depth=4, width=192, heads=4, frames=4),
        abstractor=Abstractor(queries=32, heads=4),
        llm=GPT3(vocab=8192, width=512, depth=8, heads=8, max_positions=128),
    )
    return Experiment(
        task="pretrain",
        model=model,
        data=Data(frames=4, image_size=64, max_tokens=32, examples=8000),
        optim=Optim(warmup="0 steps"),
        train=Train(batch_size=8, duration="1000 steps", frozen_dtype="float32"),
    )


class Side:
    """One compiled variant and its state."""

    def __init__(self, name: str, frozen: tuple[str, ...] | None):
        base = experiment()
        self.name = name
        self.run = setup.prepare(
            dataclasses.replace(base, train=dataclasses.replace(base.train, frozen=frozen)), jax.devices()[:1]
        )
        self.step = step_lib.compile_step(self.run)
        params, _ = setup.fresh_params(self.run)
        trainable, self.frozen = state_lib.split(params, self.run.frozen_patterns)
        self.state = state_lib.TrainState(jnp.int32(0), trainable, self.run.tx.init(trainable))
        self.key = sharding.on_all_hosts(lambda: jax.random.key(0), sharding.replicated(self.run.mesh))
        self.state = jax.device_put(self.state, jax.tree.map(lambda leaf: leaf.sharding, self.run.state))
        rng = np.random.default_rng(0)
        local = {
            "video": rng.integers(0, 256, (8, 4, 64, 64, 3), dtype=np.uint8),
            "ids": rng.integers(3, 8192, (8, 32), dtype=np.int32),
            "mask": np.ones((8, 32), np.int32),
            "valid": np.ones(8, bool),
        }
        self.batch = sharding.put_batch(local, np.arange(8), 8, self.run.mesh)
        self.seconds: list[float] = []

    def once(self) -> None:
        began = time.perf_counter()
        self.state, metrics = self.step(self.state, self.frozen, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    sides = [Side("frozen tree apart", None), Side("everything trained", ())]
    for _ in range(args.steps + 3):
        for side in sides:
            side.once()
    result = {}
    for side in sides:
        memory = side.step.memory_analysis()
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((side.state.trainable, side.state.opt_state)))
        times = side.seconds[3:]
        result[side.name] = {
            "trained": state_lib.count(side.run.state.trainable),
            "frozen": state_lib.count(side.run.frozen),
            "ms": round(1000 * statistics.median(times), 1),
            "spread_ms": [round(1000 * q, 1) for q in np.quantile(times, [0.1, 0.9])],
            "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
            "step_checkpoint_mib": round(state_bytes / 2**20, 1),
        }
        print(f"{side.name:<20} {result[side.name]}")
    first, second = (result[side.name] for side in sides)
    print(json.dumps({**result, "speedup": round(second["ms"] / first["ms"], 2)}))


if __name__ == "__main__":
    main()
