"""Evaluate a split in padded batches: losses during training, predictions and scores of a checkpoint."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, index_file, progress, sharding, stored_params
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data import loader
from ymplug_jax.data.records import Split
from ymplug_jax.data.source import open_split
from ymplug_jax.reports import evaluation_report
from ymplug_jax.tasks import names
from ymplug_jax.tasks.common import task_metrics as metrics_lib
from ymplug_jax.tasks.kept_rows import KeptRows, first_not_finite
from ymplug_jax.tasks.task import Batch, Report, Row
from ymplug_jax.training import evaluation_files, model_card, setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.setup import Run

LossStep = Callable[[Params, Params, Batch], Metrics]
Arrays = dict[str, jax.Array]


def make_loss_step(run: Run) -> LossStep:
    """Return the jitted loss `(trainable, frozen, batch) -> metrics`. Create it once: it compiles at its first call."""

    def step(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        return run.task.loss(state_lib.merge(trainable, frozen), batch, None)[1]

    return jax.jit(step, out_shardings=sharding.replicated(run.mesh))


def losses(run: Run, step: LossStep, records: Split, trainable: Params, frozen: Params) -> dict[str, float]:
    """Return the mean of every metric over the first `eval_examples` examples of the evaluation split, without dropout.

    Metrics with total weight 0 (no example counts for them) are omitted.

    Raises:
      Mistake: a metric is not finite; the message names it and the first such batch.
    """
    batches = _batches(run, records, run.experiment.train.eval_examples, "evaluation")
    found = [(start, step(trainable, frozen, batch)) for batch, start in batches]
    return _means(found, records, run.experiment)[0]


class Scorer:
    """Scores the evaluation split of a run. Create it once: its functions compile at their first call."""

    def __init__(self, run: Run):
        self._run = run
        self._loss_step = make_loss_step(run)
        self._predict = predictor(run) if run.task.predict else None
        self._compared = False
        self._views: tuple[Split, Mapping[str, Split]] | None = None

    def _compare_kernels(self, trainable: Params, frozen: Params, batch: Batch) -> None:
        """Turn off the kernels whose predictions differ from plain XLA; unlike training, predictions have padded rows."""
        self._compared = True
        checked = step_lib.with_checked_kernels(
            self._run, lambda run: _traced(predictor(run), run, trainable, frozen, batch)
        )
        if checked.kernels_off != self._run.kernels_off:
            self._run, self._predict = checked, predictor(checked)
            self._loss_step = make_loss_step(checked)

    def _views_of(self, records: Split) -> Mapping[str, Split]:
        """The splits that `Task.views` makes of a split; kept, because making them may read the whole split."""
        if self._views is None or self._views[0] is not records:
            made = self._run.task.views(records) if self._run.task.views else {"": records}
            self._views = records, made
        return self._views[1]

    def _over(
        self, records: Split, trainable: Params, frozen: Params, examples: int, title: str, kept: KeptRows | None
    ) -> tuple[list[Row], list[tuple[int, Metrics]]]:
        """Predict a split and, if `kept` is given, collect its losses and the predictions of `Task.kept`."""
        found: list[tuple[int, Metrics]] = []
        rows: list[Row] = []
        for batch, start in _batches(self._run, records, examples, title):
            if self._predict and not self._compared:
                self._compare_kernels(trainable, frozen, batch)
            if kept is not None:
                with self._run.tracing():
                    found.append((start, self._loss_step(trainable, frozen, batch)))
            if self._predict:
                with self._run.tracing():
                    predicted, large, odd = self._predict(trainable, frozen, batch)
                _check_kept(_rows(jax.device_get(odd), start), records)
                if kept is not None:
                    kept.put(start // self._run.experiment.train.batch_size, large)
                rows += _checked(_rows(jax.device_get(predicted), start), records)
        return rows, found

    def score(
        self, records: Split, trainable: Params, frozen: Params, examples: int, step: int
    ) -> tuple[dict[str, Any], Report]:
        """Return (scores, report) of the given parameters.

        Args:
          records: the evaluation split.
          trainable: trainable parameters, on the devices.
          frozen: frozen parameters in the form that `setup.hold` returns.
          examples: maximum number of examples; 0: the whole split.
          step: step of the checkpoint, recorded in the scores.

        Raises:
          Mistake: a metric, prediction or score is not finite (the message names the first example), or no record is readable.
        """
        run, experiment = self._run, self._run.experiment
        split = experiment.data.eval_split
        views = self._views_of(records)
        records = views[""]
        kept = KeptRows(run.mesh, -(-_size(records, examples) // experiment.train.batch_size))
        rows, found = self._over(records, trainable, frozen, examples, f"evaluate {split}", kept)
        for name in views if self._predict else ():
            if name:
                changed = self._over(views[name], trainable, frozen, examples, f"evaluate {split}, {name}", None)[0]
                rows = _joined(rows, changed, name)
        means, note = _means(found, records, experiment)
        if self._predict and not rows:
            raise Mistake(f"{experiment.data.path}: split {split!r} has no readable record; build the shards again")
        report = Report({}, [])
        if run.task.rescore:
            with self._run.tracing():
                rows = run.task.rescore(state_lib.merge(trainable, frozen), rows, kept)
        if run.task.score:
            report = run.task.score(rows, records)
        scores: dict[str, Any] = {
            "task": experiment.task,
            "split": split,
            "step": step,
            "examples": len(rows) if self._predict else _size(records, examples),
            **means,
            **report.scores,
        }
        if note:
            scores["note"] = "; ".join(filter(None, (scores.get("note"), note)))
        evaluation_files.check(scores, report, records)
        return scores, report


def _joined(rows: list[Row], changed: list[Row], name: str) -> list[Row]:
    """Add the predictions of a changed split to those of the same examples, as "KEY/name"."""
    by_index = {int(row["index"]): row for row in changed}
    return [
        row | {f"{key}/{name}": value for key, value in by_index.get(int(row["index"]), {}).items() if key != "index"}
        for row in rows
    ]


def _traced(
    step: Callable[[Params, Params, Batch], object], run: Run, trainable: Params, frozen: Params, batch: Batch
) -> None:
    with run.tracing():
        jax.eval_shape(step, trainable, frozen, batch)


def predictor(run: Run) -> jax.stages.Wrapped:
    """Return the jitted `(trainable, frozen, batch) -> (predicted, large, odd)`.

    `predicted` is replicated. `large` holds the arrays of `task.kept`, which stay sharded. `odd` holds, for each of them, the
    first non-finite value of each row (0: none), and "valid".
    """
    task = run.task

    def step(trainable: Params, frozen: Params, batch: Batch) -> tuple[Arrays, Arrays, Arrays]:
        assert task.predict is not None
        found = task.predict(state_lib.merge(trainable, frozen), batch)
        large = {name: found[name] for name in task.kept}
        odd = {name: first_not_finite(value) for name, value in large.items()}
        rest = {name: value for name, value in found.items() if name not in task.kept}
        return rest, large, odd | {"valid": found["valid"]}

    whole = sharding.replicated(run.mesh)
    return jax.jit(step, out_shardings=(whole, sharding.batch_sharding(run.mesh), whole))


def evaluate_all(
    runs: list[tuple[Experiment, epath.Path]], workdir: epath.Path, *, examples: int = 0
) -> dict[str, Any]:
    """Evaluate one run, or several runs that differ by their seed.

    Args:
      runs: (settings, folder) of each run.
      workdir: folder that holds the runs; with several, their summary is written to `workdir`/seeds.json.
      examples: maximum number of examples per run; 0: the whole split.

    Returns:
      The scores of `evaluate` for one run; for several, the mean and standard deviation of every score.
    """
    scores = [evaluate(experiment, folder, examples=examples) for experiment, folder in runs]
    if len(runs) == 1:
        return scores[0]
    same = {key: scores[0][key] for key in ("task", "split", "examples")}
    result = same | {"seeds": [experiment.train.seed for experiment, _ in runs], **metrics_lib.over_seeds(scores)}
    if jax.process_index() == 0:
        known = names.scores_of(runs[0][0].task)
        (workdir / "seeds.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        logging.info("\n%s\n\nseeds: %s", evaluation_report.summary_of_seeds(result, known), workdir / "seeds.json")
    return result


def evaluate(experiment: Experiment, workdir: epath.Path, *, examples: int = 0) -> dict[str, Any]:
    """Score the newest checkpoint of a run on its evaluation split.

    Writes to `workdir`/eval/<split>: scores.json, predictions.jsonl (one line per example), report.html and, for retrieval,
    index.npz.

    Args:
      experiment: settings of the run.
      workdir: folder of the run.
      examples: maximum number of examples; 0: the whole split.

    Returns:
      Scores by name, with "task", "split", "step" and "examples". Metrics for which no example counts are omitted and listed
      in "note".

    Raises:
      Mistake: a metric, prediction or score is not finite (the message names the first example), or no record is readable.
      ValueError: the split is missing or empty.
    """
    if examples < 0:
        raise Mistake(f"--examples: {examples} is negative; give 1 or more, or 0 for the whole split")
    run = step_lib.with_checked_kernels(setup.prepare(experiment, training=False))
    trainable, frozen = state_lib.split(load(run, workdir), run.frozen_patterns)
    split = experiment.data.eval_split
    records = open_split(experiment.data.path, split)
    scorer = Scorer(run)
    scores, report = scorer.score(records, trainable, frozen, examples, checkpoint_files.latest_step(str(workdir)) or 0)
    if jax.process_index() == 0:
        if report.arrays:  # stored with the vectors: those of different runs are not comparable
            facts = index_file.origin(experiment, str(workdir)) | {"split": split}
            report.arrays.update({name: np.asarray(value) for name, value in facts.items()})
        folder = workdir / "eval" / split
        evaluation_files.write(folder, scores, report)
        html = folder / "report.html"
        known, page = run.task.scores, run.task.page
        evaluation_report.write(
            html, scores, report.rows, records, known=known, page=page, experiment=experiment, workdir=workdir
        )
        logging.info("\n%s\n\nreport: %s", evaluation_report.summary(scores, report.rows, known=known, page=page), html)
        model_card.add_evaluation(run, workdir)
    return scores


def load(run: Run, workdir: epath.Path) -> Params:
    """Load the parameters of the newest checkpoint in the form used on the devices; without one, those of `init_from`."""
    if checkpoint_files.latest_step(str(workdir)) is None and run.experiment.train.init_from:
        logging.warning("%s: no checkpoint; scoring the parameters of config.train.init_from without training", workdir)
        trainable, frozen = state_lib.split(setup.fresh_params(run)[0], run.frozen_patterns)
        return state_lib.merge(trainable, setup.hold(run, frozen))
    abstract = state_lib.merge(run.state.trainable, run.held)
    return state_lib.unflatten(stored_params.load_params(str(workdir), abstract))


def _means(found: list[tuple[int, Metrics]], records: Split, experiment: Experiment) -> tuple[dict[str, float], str]:
    """Return (mean of every metric with non-zero weight, note that lists the other metrics).

    Args:
      found: (index of the first example, metrics) of each batch.
      records: the evaluation split.
      experiment: settings of the run.

    Raises:
      Mistake: a metric is not finite; the message names it and the first such batch.
    """
    total: Metrics = {}
    for start, metrics in jax.device_get(found):
        for name, mean in metrics.items():
            if not (np.isfinite(mean.total) and np.isfinite(mean.weight)):
                last = min(start + experiment.train.batch_size, len(records)) - 1
                raise Mistake(
                    f"{records[start].media_id}: {name} is {mean.total} in the batch that starts with this example (examples "
                    f"{start} to {last} of split {records.split!r}), so nothing was scored; evaluate an earlier checkpoint, or "
                    "train again with a lower config.optim.lr"
                )
        total = jax.tree.map(lambda a, b: a + b, total, metrics) if total else metrics
    means = {name: mean.value() for name, mean in total.items() if mean.weight}
    absent = ", ".join(sorted(total.keys() - means.keys()))
    return means, f"no example of this split counts for {absent}" if absent else ""


def _checked(rows: list[Row], records: Split) -> list[Row]:
    """Return the rows after checking that all their floats are finite, so that a diverged model fails at its first batch."""
    floats = [key for key, value in rows[0].items() if jax.numpy.issubdtype(value.dtype, np.floating)] if rows else []
    metrics_lib.check_rows(rows, records, *floats)
    return rows


def _check_kept(rows: list[Row], records: Split) -> None:
    """Check the rows of `odd` (see `predictor`): every array that stays on the devices is finite."""
    if rows:
        metrics_lib.check_rows(rows, records, *(key for key in rows[0] if key != "index"))


def _size(records: Split, examples: int) -> int:
    return min(len(records), examples) if examples else len(records)


def _batches(run: Run, records: Split, examples: int, title: str) -> Iterator[tuple[Batch, int]]:
    """Yield (batch, index of its first example) over the split, in order, each example once.

    The last batch is padded with rows whose `valid` is False. Every host yields the same number of batches.
    """
    data, size = run.experiment.data, run.experiment.train.batch_size
    rows = sharding.local_rows(size, run.mesh)
    stream = loader.batches(
        records, run.task.example, seed=0, batch_size=size, rows=rows, shuffle=False,
        num_examples=_size(records, examples), threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
        packed=run.task.measure is not None,
    )  # fmt: skip
    steps = -(-_size(records, examples) // size)
    hidden = jax.process_index() != 0
    with run.tracing():
        bar = progress.bar(stream, total=steps, desc=title, unit="batch", hidden=hidden)
        for number, local in enumerate(bar):
            yield sharding.put_batch(local, rows, size, run.mesh), number * size
    if stream.skipped:
        logging.warning("%s: skipped %d corrupt records", title, stream.skipped)


def _rows(batch: dict[str, np.ndarray], start: int) -> list[Row]:
    """Return the valid rows of a batch of predictions, with their index in the split."""
    return [
        {key: value[i] for key, value in batch.items() if key != "valid"} | {"index": np.int64(start + i)}
        for i in np.flatnonzero(batch["valid"])
    ]
