"""A padded pass over a split: losses during training, predictions and scores from a checkpoint."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ymplug_jax import checkpoint, index_file, page, sharding
from ymplug_jax import run as run_lib
from ymplug_jax import state as state_lib
from ymplug_jax.config import Experiment
from ymplug_jax.data import loader
from ymplug_jax.data.source import open_split
from ymplug_jax.run import Run
from ymplug_jax.state import Params
from ymplug_jax.tasks import metrics as metrics_lib
from ymplug_jax.tasks.task import Batch, Report, Row
from ymplug_jax.writer import Metrics

LossStep = Callable[[Params, Params, Batch], Metrics]


def make_loss_step(run: Run) -> LossStep:
    """The jitted (trainable, frozen, batch) -> metrics; make it once, it compiles at its first call."""

    def step(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        return run.task.loss(state_lib.merge(trainable, frozen), batch, None)[1]

    return jax.jit(step, out_shardings=sharding.replicated(run.mesh))


def losses(run: Run, step: LossStep, records: Any, trainable: Params, frozen: Params) -> dict[str, float]:
    """Mean of every metric of the task over the head of the evaluation split (`eval_examples` at most), without dropout."""
    total: Metrics = {}
    for batch, _ in _batches(run, records, run.experiment.train.eval_examples, "evaluation"):
        metrics = step(trainable, frozen, batch)
        total = jax.tree.map(lambda a, b: a + b, total, metrics) if total else metrics
    return {name: mean.value() for name, mean in jax.device_get(total).items()}


def evaluate_all(
    runs: list[tuple[Experiment, epath.Path]], workdir: epath.Path, *, examples: int = 0
) -> dict[str, Any]:
    """`evaluate` of one run; of several, mean and standard deviation of every score, written to `workdir`/seeds.json too."""
    scores = [evaluate(experiment, folder, examples=examples) for experiment, folder in runs]
    if len(runs) == 1:
        return scores[0]
    same = {key: scores[0][key] for key in ("task", "split", "examples")}
    result = same | {"seeds": [experiment.train.seed for experiment, _ in runs], **metrics_lib.over_seeds(scores)}
    if jax.process_index() == 0:
        (workdir / "seeds.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def evaluate(experiment: Experiment, workdir: epath.Path, *, examples: int = 0) -> dict[str, Any]:
    """Score the run's newest checkpoint on its evaluation split.

    Writes `eval/<split>/`: scores.json, predictions.jsonl (one line an example), report.html (the same for the eye) and,
    for retrieval, index.npz.

    Args:
      experiment: the settings of the run.
      workdir: the run's folder.
      examples: stop after this many; 0: the whole split.

    Returns:
      Scores, with the split, the step and the number of examples they were taken over; None where nothing was counted.
    """
    run = run_lib.prepare(experiment)
    trainable, frozen = state_lib.split(load(run, workdir), run.frozen_patterns)
    frozen = run_lib.hold(run, frozen)
    split = experiment.data.eval_split
    records = open_split(experiment.data.path, split)
    whole = sharding.replicated(run.mesh)
    predict = run.task.predict and jax.jit(
        lambda t, f, batch: run.task.predict(state_lib.merge(t, f), batch), out_shardings=whole
    )
    loss_step = make_loss_step(run)
    total: Metrics = {}
    rows: list[Row] = []
    for batch, start in _batches(run, records, examples, f"evaluate {split}"):
        metrics = loss_step(trainable, frozen, batch)
        total = jax.tree.map(lambda a, b: a + b, total, metrics) if total else metrics
        if predict:
            rows += _rows(jax.device_get(predict(trainable, frozen, batch)), start)
    report = Report({}, [])
    if run.task.rescore:
        with jax.set_mesh(run.mesh):
            rows = run.task.rescore(state_lib.merge(trainable, frozen), rows)
    if run.task.score:
        report = run.task.score(rows, records)
    means = {name: mean.value() for name, mean in jax.device_get(total).items()}
    scores: dict[str, Any] = {
        "task": experiment.task,
        "split": split,
        "step": checkpoint.latest_step(str(workdir)) or 0,
        "examples": len(rows) if predict else _size(records, examples),
        **{name: value if np.isfinite(value) else None for name, value in means.items()},
        **report.scores,
    }
    if jax.process_index() == 0:
        if report.arrays:  # vectors of two runs are not comparable
            report.arrays.update(index_file.origin(experiment, str(workdir)), split=split)
        _write(workdir / "eval" / split, scores, report)
        page.write(workdir / "eval" / split / "report.html", scores, report.rows, records)
        for row in report.rows[:10]:
            logging.info(
                "%s", "   ".join(f"{key}: {value}" for key, value in row.items() if not isinstance(value, list))
            )
    return scores


def load(run: Run, workdir: epath.Path) -> Params:
    """All parameters of the run's newest checkpoint, placed as the run wants them; of a run that has not begun, those that
    `init_from` gives, to score without training."""
    if checkpoint.latest_step(str(workdir)) is None and run.experiment.train.init_from:
        logging.warning("%s: no checkpoint; scoring config.train.init_from as it stands", workdir)
        return run_lib.fresh_params(run)[0]
    abstract = state_lib.merge(run.state.trainable, run.frozen)
    return state_lib.unflatten(checkpoint.load_params(str(workdir), abstract))


def _write(folder: epath.Path, scores: dict[str, Any], report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in report.rows)
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    if report.arrays:
        index_file.write(folder / "index.npz", report.arrays)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _size(records: Any, examples: int) -> int:
    return min(len(records), examples) if examples else len(records)


def _batches(run: Run, records: Any, examples: int, title: str) -> Iterator[tuple[Batch, int]]:
    """Every example once, in order, with the place of the batch's first one in the split; the last batch is padded with
    `valid` False. The same number of batches on every host."""
    data, size = run.experiment.data, run.experiment.train.batch_size
    rows = sharding.local_rows(size, run.mesh)
    stream = loader.batches(
        records, run.task.example, seed=0, batch_size=size, rows=rows, shuffle=False,
        num_examples=_size(records, examples), threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
    )  # fmt: skip
    steps = -(-_size(records, examples) // size)
    hidden = jax.process_index() != 0
    with jax.set_mesh(run.mesh):
        bar = tqdm(
            stream, total=steps, desc=title, unit="batch", disable=hidden, file=sys.stderr, leave=False, mininterval=1.0
        )
        for number, local in enumerate(bar):
            yield sharding.put_batch(local, rows, size, run.mesh), number * size
    if stream.skipped:
        logging.warning("%s: %d corrupt records were left out", title, stream.skipped)


def _rows(batch: dict[str, np.ndarray], start: int) -> list[Row]:
    """The valid rows of a batch of predictions."""
    return [
        {key: value[i] for key, value in batch.items() if key != "valid"} | {"index": np.int64(start + i)}
        for i in np.flatnonzero(batch["valid"])
    ]
