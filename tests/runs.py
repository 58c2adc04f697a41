"""Start real runs of `python -m ymplug_jax.main` in subprocesses, with small shards and a model that compiles quickly."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import shards
from ymplug_jax.core import config, metrics, state, stored_params
from ymplug_jax.training import setup

ROOT = Path(__file__).parent.parent
SMALL = [
    "--config.model.vision.image_size=16",
    "--config.model.vision.patch_size=8",
    "--config.model.vision.width=16",
    "--config.model.vision.heads=2",
    "--config.model.vision.frames=2",
    "--config.model.abstractor.queries=4",
    "--config.model.abstractor.heads=2",
    "--config.model.llm.vocab=64",
    "--config.model.llm.width=32",
    "--config.model.llm.depth=2",
    "--config.data.frames=2",
    "--config.data.image_size=16",
    "--config.data.max_tokens=12",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.save_every=5 steps",
    "--config.optim.warmup=2 steps",
]


def make_data(folder: Path) -> list[str]:
    """Write shards of two splits and a tokenizer; return the flags that name them."""
    shards.write(folder / "data", (13, 8))
    shards.write(folder / "data", (9,), split="validation", first=50)
    shards.tokenizer(folder / "t.model")
    return [f"--config.data.path={folder / 'data'}", f"--config.data.tokenizer={folder / 't.model'}"]


def command(workdir: Path, data: list[str], *more: str) -> list[str]:
    base = [sys.executable, "-m", "ymplug_jax.main", "--config=configs/tiny/pretrain.py", f"--workdir={workdir}"]
    return [*base, *data, *SMALL, *more]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of the tests (compilation cache, XLA flags) with the given number of devices."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags}


def start(*args, devices: int = 1, **options) -> subprocess.Popen:
    """Start a run in the background."""
    return subprocess.Popen(
        command(*args),
        cwd=ROOT,
        env=environment(devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run(*args, devices: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    """Run to the end and check the exit code."""
    done = subprocess.run(
        command(*args), cwd=ROOT, env=environment(devices), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done


def losses(workdir: Path) -> dict[int, float]:
    """Return {step: training loss}."""
    return {line["step"]: line["loss"] for line in metrics.read_metrics(workdir) if "loss" in line}


def saved(workdir: Path) -> dict[str, np.ndarray]:
    """Return {path: value} of every parameter in the newest checkpoint."""
    experiment = config.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    one = dataclasses.replace(experiment, mesh=config.Mesh())
    run = setup.prepare(one, jax.devices()[:1])
    return {
        path: np.asarray(leaf)
        for path, leaf in stored_params.load_params(str(workdir), state.merge(run.state.trainable, run.frozen)).items()
    }
