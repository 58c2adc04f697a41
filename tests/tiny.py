"""A tiny experiment and random batches, without files; shared by the tests of the step, the state and the mesh."""

import dataclasses

import jax
import numpy as np

from ymplug_jax.core import sharding
from ymplug_jax.core.config import Data, Experiment, Mesh, Optim, Train
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.training import setup
from ymplug_jax.training.setup import Run

MODEL = MPLUGVideo(
    vision=TimeSformer(image_size=16, patch_size=8, depth=2, width=16, heads=2, frames=2),
    abstractor=Abstractor(queries=4, heads=2),
    llm=GPT3(vocab=64, width=32, depth=2, heads=2, max_positions=32),
)


def experiment(model: MPLUGVideo = MODEL, **changes) -> Experiment:
    """Return an experiment with a batch size of 8; change settings by group, e.g. train={"accumulate": 2}, mesh={"fsdp": 8}."""
    groups = {
        "data": Data(frames=2, image_size=16, max_tokens=8, augment=False, examples=64),
        "optim": Optim(lr=1e-2, warmup="0 steps", no_decay=(".*/bias",)),
        "mesh": Mesh(),
        "train": Train(batch_size=8, duration="8 steps", frozen_dtype="float32"),
    }
    for name, change in changes.items():
        groups[name] = dataclasses.replace(groups[name], **change)
    return Experiment(task="pretrain", model=model, **groups)


def prepare(devices: int = 1, **changes) -> Run:
    """Prepare the run on the first `devices` virtual devices."""
    return setup.prepare(experiment(**changes), jax.devices()[:devices])


def batch(run: Run, seed: int = 0, **changes) -> dict[str, jax.Array]:
    """Return a random global batch on the devices; `changes` replaces arrays by key."""
    rng = np.random.default_rng(seed)
    size, data = run.experiment.train.batch_size, run.experiment.data
    lengths = rng.integers(3, data.max_tokens + 1, size)
    local = {
        "video": rng.integers(0, 256, (size, data.frames, data.image_size, data.image_size, 3), dtype=np.uint8),
        "ids": rng.integers(3, 64, (size, data.max_tokens), dtype=np.int32),
        "mask": (np.arange(data.max_tokens) < lengths[:, None]).astype(np.int32),
        "valid": np.ones(size, bool),
    } | changes
    rows = sharding.local_rows(size, run.mesh)
    return sharding.put_batch({key: value[rows] for key, value in local.items()}, rows, size, run.mesh)
