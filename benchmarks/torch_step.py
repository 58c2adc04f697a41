"""The training step compared with the same computation in PyTorch with Hugging Face's classes: `python -m benchmarks.torch_step`.

PyTorch's model consists of TimesformerModel, a layer of cross-attention with learned queries (nn.MultiheadAttention), a linear
connector and a frozen GPT2LMHeadModel; AdamW updates the trainable parameters. It is compared with `step.compile_step` of a model
of the same sizes. Both start from the same weights and see the same batch, and their first losses are compared before anything is
timed. There is no dropout.

There are two forms of the PyTorch model: "classes" uses the classes unchanged (logits at all positions, the video encoder's own
attention); "tuned" uses fused attention everywhere and computes logits at text positions only. Each runs eagerly and, with
`--compile`, through torch.compile. On a GPU use `--device cuda --dtype bfloat16 --size 1.3b`; PyTorch then runs under autocast.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from benchmarks.torch_captioner import MODELS, Captioner, batch_of, fresh, to_jax
from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.training import setup as run_lib
from ymplug_jax.training import step as step_lib


class Ours:
    """The compiled train step with its state."""

    def __init__(self, model: MPLUGVideo, params: dict, batch: dict[str, np.ndarray], dtype: str, keep_logits: bool):
        size = len(batch["ids"])
        experiment = Experiment(
            task="pretrain",
            model=model.clone(
                vision=model.vision.clone(dtype=dtype),
                abstractor=model.abstractor.clone(dtype=dtype),
                llm=model.llm.clone(dtype=dtype),
            ),
            data=Data(
                frames=model.vision.frames,
                image_size=model.vision.image_size,
                max_tokens=batch["ids"].shape[1],
                examples=1000 * size,
            ),
            optim=Optim(warmup="0 steps"),
            train=Train(batch_size=size, duration="1000 steps", frozen_dtype=dtype, keep_logits=keep_logits),
        )
        self.run = run = run_lib.prepare(experiment, jax.devices()[:1])
        self.compiled = step_lib.compile_step(run)
        trainable, frozen = state_lib.split(params, run.frozen_patterns)
        state = state_lib.TrainState(jnp.int32(0), trainable, run.tx.init(trainable))

        def put(tree: dict, like: dict) -> dict:
            return jax.tree.map(lambda x, to: jax.device_put(np.asarray(x, to.dtype), to.sharding), tree, like)

        self.state, self.frozen = put(state, run.state), put(frozen, run.frozen)
        self.key = sharding.on_all_hosts(lambda: jax.random.key(0), sharding.replicated(run.mesh))
        self.batch = sharding.put_batch(batch, np.arange(size), size, run.mesh)
        self.trained = state_lib.count(run.state.trainable)

    def step(self) -> float:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch, self.key)
        jax.block_until_ready(self.state)
        return metrics["caption_loss"].value()


class Theirs:
    """The PyTorch step with its state. `torch_model` is copied, except the frozen decoder, which all copies share."""

    def __init__(
        self, torch_model: Captioner, batch: dict[str, np.ndarray], dtype: str, *, tuned: bool, compiled: bool
    ):
        device = next(torch_model.parameters()).device.type
        self.model = copy.deepcopy(torch_model, {id(torch_model.llm): torch_model.llm}).train()
        if tuned:
            self.model.tune()
        self.loss = torch.compile(self.model) if compiled else self.model
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, eps=1e-6, weight_decay=0.05, fused=True)
        self.batch = [torch.from_numpy(batch["video"]), *(torch.from_numpy(batch[k]).long() for k in ("ids", "mask"))]
        self.batch = [x.to(device) for x in self.batch]
        self.device, self.half = device, dtype == "bfloat16"
        self.trained = sum(p.numel() for p in self.weights)

    def step(self) -> float:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = self.loss(*self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads). CPU seconds vary little on a shared core."""
    began, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(MODELS), default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="PyTorch device, cpu or cuda; JAX uses its first device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    args = parser.parse_args()
    model = MODELS[args.size]
    size = args.batch
    batch = batch_of(model, size)
    first = fresh(model, args.device, args.dtype)
    params = to_jax(first, model)
    sides = {
        "ours": Ours(model, params, batch, args.dtype, keep_logits=False),
        "ours, logits kept": Ours(model, params, batch, args.dtype, keep_logits=True),
        "PyTorch, classes": Theirs(first, batch, args.dtype, tuned=False, compiled=False),
        "PyTorch, tuned": Theirs(first, batch, args.dtype, tuned=True, compiled=False),
    }
    if args.compile:
        sides |= {
            "PyTorch, classes, compiled": Theirs(first, batch, args.dtype, tuned=False, compiled=True),
            "PyTorch, tuned, compiled": Theirs(first, batch, args.dtype, tuned=True, compiled=True),
        }
    losses = {
        name: [side.step() for _ in range(3)] for name, side in sides.items()
    }  # the first calls compile and warm up
    for name, values in losses.items():
        print(f"{name:<28} losses " + " ".join(f"{value:.5f}" for value in values))
        np.testing.assert_allclose(values, losses["ours"], rtol=1e-4 if args.dtype == "float32" else 1e-2)
    times: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.steps):
        for name, side in sides.items():
            seconds, used = timed(side.step)
            times[name].append(seconds)
            cpu[name].append(used)
    for name, values in times.items():
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
        ratio = statistics.median(t / o for t, o in zip(values, times["ours"], strict=True))
        print(
            f"{name:<28} {1000 * median:8.0f} ms ({1000 * low:.0f} to {1000 * high:.0f}), {ratio:.2f} x ours, {min(cpu[name]):.2f} CPU s"
        )
    medians = {name: statistics.median(values) for name, values in times.items()}
    counts = {"trained": sides["ours"].trained, "whole": state_lib.count(params)}
    print(json.dumps({"device": args.device, "dtype": args.dtype, "batch": size, **counts, "seconds": medians}))


if __name__ == "__main__":
    main()
