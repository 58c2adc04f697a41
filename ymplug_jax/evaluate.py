"""A padded pass over a split: losses during training, predictions and scores from a checkpoint."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ymplug_jax import checkpoint, sharding
from ymplug_jax import run as run_lib
from ymplug_jax import state as state_lib
from ymplug_jax.config import Experiment
from ymplug_jax.data import loader
from ymplug_jax.data.source import open_split
from ymplug_jax.run import Run
from ymplug_jax.state import Params
from ymplug_jax.tasks.task import Batch
from ymplug_jax.writer import Metrics

LossStep = Callable[[Params, Params, Batch], Metrics]


def make_loss_step(run: Run) -> LossStep:
    """The jitted (trainable, frozen, batch) -> metrics; make it once, it compiles at its first call."""

    def step(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        return run.task.loss(state_lib.merge(trainable, frozen), batch, None)[1]

    return jax.jit(step, out_shardings=sharding.replicated(run.mesh))


def losses(run: Run, step: LossStep, trainable: Params, frozen: Params) -> dict[str, float]:
    """Mean of every metric of the task over the head of the evaluation split (`eval_examples` at most), without dropout."""
    total: Metrics = {}
    for batch in _batches(run, run.experiment.data.eval_split, run.experiment.train.eval_examples, "evaluation"):
        metrics = step(trainable, frozen, batch)
        total = jax.tree.map(lambda a, b: a + b, total, metrics) if total else metrics
    return {name: mean.value() for name, mean in jax.device_get(total).items()}


def evaluate(experiment: Experiment, workdir: Path, *, examples: int = 0) -> dict[str, Any]:
    """Score the run's newest checkpoint on its evaluation split; writes `eval/<split>/{scores.json,predictions.jsonl}`.

    Args:
      experiment: the settings of the run.
      workdir: the run's folder.
      examples: stop after this many; 0: the whole split.

    Returns:
      Scores, with the split, the step and the number of examples they were taken over.
    """
    run = run_lib.prepare(experiment)
    abstract = state_lib.merge(run.state.trainable, run.frozen)
    params = state_lib.unflatten(checkpoint.load_params(str(workdir), abstract))
    trainable, frozen = state_lib.split(params, run.frozen_patterns)
    split = experiment.data.eval_split
    whole = sharding.replicated(run.mesh)
    predict = run.task.predict and jax.jit(
        lambda t, f, batch: run.task.predict(state_lib.merge(t, f), batch), out_shardings=whole
    )
    loss_step = make_loss_step(run)
    total: Metrics = {}
    rows: list[dict[str, np.ndarray]] = []
    for batch in _batches(run, split, examples, f"evaluate {split}"):
        metrics = loss_step(trainable, frozen, batch)
        total = jax.tree.map(lambda a, b: a + b, total, metrics) if total else metrics
        if predict:
            rows += _rows(jax.device_get(predict(trainable, frozen, batch)))
    scores: dict[str, Any] = {name: mean.value() for name, mean in jax.device_get(total).items()}
    readable: list[dict] = []
    if run.task.score:
        more, readable = run.task.score(rows)
        scores |= more
    step = checkpoint.latest_step(str(workdir))
    scores = {"split": split, "step": step, "examples": _size(run, split, examples), **scores}
    if jax.process_index() == 0:
        folder = workdir / "eval" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in readable)
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        for row in readable[:10]:
            logging.info("%s", "   ".join(f"{key}: {value}" for key, value in row.items()))
    return scores


def _size(run: Run, split: str, examples: int) -> int:
    size = len(open_split(run.experiment.data.path, split))
    return min(size, examples) if examples else size


def _batches(run: Run, split: str, examples: int, title: str) -> Iterator[Batch]:
    """Every example once, in order; the last batch is padded with `valid` False. The same number of batches on every host."""
    data, size = run.experiment.data, run.experiment.train.batch_size
    rows = sharding.local_rows(size, run.mesh)
    stream = loader.batches(
        open_split(data.path, split), run.task.example, seed=0, batch_size=size, rows=rows, shuffle=False,
        num_examples=_size(run, split, examples), threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
    )  # fmt: skip
    steps = -(-_size(run, split, examples) // size)
    hidden = jax.process_index() != 0
    with jax.set_mesh(run.mesh):
        for local in tqdm(
            stream, total=steps, desc=title, unit="batch", disable=hidden, file=sys.stderr, leave=False, mininterval=1.0
        ):
            yield sharding.put_batch(local, rows, size, run.mesh)


def _rows(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The valid rows of a batch of predictions."""
    return [{key: value[i] for key, value in batch.items() if key != "valid"} for i in np.flatnonzero(batch["valid"])]
