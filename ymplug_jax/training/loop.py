"""The training loop, shared by all tasks and models: it depends only on the `Task` record and the `Run` of `setup.py`."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from ymplug_jax.core import checkpoint_files, durations, progress, sharding
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.checkpoint_files import BEST, place_of
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.core.metrics import Metrics, Writer
from ymplug_jax.core.state import Params, TrainState
from ymplug_jax.data import loader, text
from ymplug_jax.data.prefetch import Feed
from ymplug_jax.data.records import CorruptRecord
from ymplug_jax.data.source import open_split
from ymplug_jax.reports.curves import draw_curve
from ymplug_jax.tasks.task import Batch
from ymplug_jax.training import evaluate, introductions, mixing, model_card, parameter_table, run_folder, setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.best_step import Best
from ymplug_jax.training.setup import Run
from ymplug_jax.training.stop import Stop, finite_scores, must_have_targets, reading

Describe = Callable[[Run, jax.stages.Compiled], str]


def train(experiment: Experiment, workdir: epath.Path, describe: Describe | None = None) -> dict[str, float]:
    """Train until the end of `config.train.duration`, from the newest checkpoint in `workdir` if there is one.

    The first SIGINT or SIGTERM saves a checkpoint and returns; a second SIGINT ends the process immediately. The folder is not
    changed until the settings and stored parameters have been checked and the step has compiled.

    Args:
      experiment: resolved settings.
      workdir: folder of the run.
      describe: returns text about the run and its compiled step, such as its memory use, to log before training starts.

    Returns:
      The scores of the last evaluation.

    Raises:
      Mistake: the folder cannot be used, or holds a run that cannot resume with these settings.
      TrainingStopped: `max_bad_steps` consecutive steps were not finite, a batch has no target, or an evaluation is not finite.
      CorruptRecord: a record is damaged and `skip_corrupt` is not set. A single-process run saves a checkpoint first.
      PlaceFailed: the data or the folder can no longer be read or written. A single-process run saves a checkpoint first.
    """
    run_folder.check(experiment, workdir)
    run_folder.check_no_conversion(workdir)
    if checkpoint_files.latest_step(str(workdir)) is None:
        run_folder.check_init_from(experiment)
    with Stop() as stop:
        run = setup.prepare(experiment, workdir=workdir)
        with contextlib.closing(Checkpoints(str(workdir), keep=experiment.train.keep)) as checkpoints:
            scores = _Training(run, workdir, checkpoints, stop, describe).go()
        with place_of(workdir):
            if jax.process_index() == 0 and (picture := draw_curve(workdir)):
                logging.info("loss curve: %s", picture)
    return scores


class _Training:
    """One training run: its state, log, evaluation and checkpoints."""

    def __init__(self, run: Run, workdir: epath.Path, checkpoints: Checkpoints, stop: Stop, describe: Describe | None):
        self._run, self._workdir, self._checkpoints, self._stop = run, workdir, checkpoints, stop
        settings, data = run.experiment.train, run.experiment.data
        first = jax.process_index() == 0
        self._state, frozen, self._seen, origin = setup.initialise(run, checkpoints)
        self._start = int(self._state.step)
        logging.info("\n%s", parameter_table.table(run, origin))
        self._mixture = mixing.begin(run.mixture, workdir, self._seen)
        self._run = run = step_lib.with_checked_kernels(run)
        self._compiled = step_lib.compile_step(run)
        if describe is not None:
            logging.info("\n%s", describe(run, self._compiled))
        if data.tokenizer:
            begins = text.load_tokenizer(data.tokenizer, lower_case=data.lower_case).begins()
            logging.info("tokenizer %s: %s", data.tokenizer, begins)
        if self._start >= run.total_steps:
            logging.info("already at step %d of %d; nothing to train", self._start, run.total_steps)
            checkpoints.keep_newest()
        stop.listen()
        if first:
            with place_of(workdir):
                introductions.write(run, workdir, self._start)
                run_folder.write(run.experiment, workdir)
                mixing.write(self._mixture, workdir)
        model_card.begin(run, workdir, origin, self._start)
        checkpoints.save_frozen(frozen, run.frozen)
        self._frozen = setup.hold(run, frozen)
        del frozen
        with place_of(workdir):
            self._writer = Writer(workdir, active=first)
        self._log = _Log(run, self._writer, checkpoints, self._start)
        self._evaluation = _Evaluation(run, workdir) if data.eval_split else None
        self._scores: dict[str, float] = {}
        self._key = sharding.on_all_hosts(lambda: jax.random.key(settings.seed), sharding.replicated(run.mesh))

    def go(self) -> dict[str, float]:
        """Run the remaining steps and return the scores of the last evaluation."""
        run, stop, log = self._run, self._stop, self._log
        settings = run.experiment.train
        log_every, save_every = steps_in(run, settings.log_every), steps_in(run, settings.save_every)
        if self._start == 0:
            self._check(0)
        with contextlib.closing(self._feed()) as feed:
            for step in range(self._start + 1, run.total_steps + 1):  # `step` counts finished steps
                self._take(step, feed)
                last, stopping = step == run.total_steps, stop.asked(step)
                if step % log_every == 0 or last or stopping:
                    log.flush(step, corrupt=feed.skipped)
                if self._evaluation and self._evaluation.due(step) and not stopping:
                    log.flush(step)
                    self._check(step)
                    stopping = stop.alone and stop.asked(step)
                if step % save_every == 0 or last or stopping:
                    self._save(step)
                if stopping:
                    log.say(f"stop requested: saving step {step}; run the same command again to resume")
                    break
        log.close()
        with place_of(self._workdir):
            self._writer.close()
        return self._scores

    def _feed(self) -> Feed[Batch]:
        run, settings, data = self._run, self._run.experiment.train, self._run.experiment.data
        records = open_split(data.path, data.train_split)
        rows = sharding.local_rows(settings.batch_size, run.mesh)
        stream = loader.batches(
            records, run.task.example, seed=settings.seed, batch_size=settings.batch_size, rows=rows, start=self._seen, shuffle=True,
            threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
            order=self._mixture.order if self._mixture else None, packed=run.task.measure is not None,
        )  # fmt: skip
        return Feed(stream, lambda local: sharding.put_batch(local, rows, settings.batch_size, run.mesh))

    def _take(self, step: int, feed: Feed[Batch]) -> None:
        """Fetch a batch and dispatch training step `step`."""
        with self._saved_first(step - 1), self._log.waiting(), reading(self._run.experiment.data.path):
            batch = next(feed)
        with jax.transfer_guard("disallow"):
            self._state, metrics = self._compiled(self._state, self._frozen, batch, self._key)
        self._log.add(step, metrics)

    def _check(self, step: int) -> None:
        """Evaluate after `step`, unless a stop is requested; a signal aborts the evaluation."""
        stop, log, evaluation = self._stop, self._log, self._evaluation
        if evaluation is None or (stop.alone and stop.asked(step)):
            return
        data = self._run.experiment.data
        found: dict[str, float] = {}
        whole: dict[str, Any] = {}
        with self._saved_first(step), stop.at_once(), reading(data.path):
            found, whole = evaluation.at(step, self._state, self._frozen)
            self._scores |= finite_scores(step, found, data.eval_split)
            log.write(step, {f"eval/{name}": value for name, value in found.items()})
            log.say(f"step {step}: evaluation " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        best, sums = evaluation.best, self._checkpoints.frozen_sums
        kept = bool(best and whole and best.offer(self._state, step, self._seen_after(step), whole, sums))
        if kept:
            log.say(f"step {step}: best {self._run.experiment.train.best} so far, kept in {self._workdir / BEST}")
        if found:
            model_card.add_scores(self._run, self._workdir, step, found, best=kept)
        log.restart_clock()

    def _seen_after(self, step: int) -> int:
        return self._seen + (step - self._start) * self._run.experiment.train.batch_size

    def _save(self, step: int) -> None:
        self._log.flush(step)  # raises on too many non-finite steps, before they become the newest checkpoint
        with place_of(self._workdir):
            self._writer.flush()
        self._checkpoints.save(self._state, step, self._seen_after(step))

    @contextlib.contextmanager
    def _saved_first(self, step: int) -> Iterator[None]:
        """Save `step` if reading data fails inside. Single process only: saving waits for all processes."""
        try:
            yield
        except (PlaceFailed, CorruptRecord) as error:
            if step == self._start or not self._stop.alone:
                raise
            self._save(step)
            self._checkpoints.wait()
            text = f"{error}; saved step {step}, run the same command again to resume"
            raise type(error)(text) from None


class _Evaluation:
    """The evaluation during training: losses every `eval_every`, the task's scores every `eval_scores_every`."""

    def __init__(self, run: Run, workdir: epath.Path):
        settings, data = run.experiment.train, run.experiment.data
        self._run = run
        self._records = open_split(data.path, data.eval_split)
        self._loss_step = evaluate.make_loss_step(run)
        self._every = steps_in(run, settings.eval_every)
        self._scorer = evaluate.Scorer(run) if settings.eval_scores_every else None
        self._scores_every = steps_in(run, settings.eval_scores_every) if self._scorer else 0
        self.best: Best | None = None
        if settings.best:
            better = bool(run.task.score_named(settings.best).higher_is_better)
            self.best = Best(run.experiment, workdir, higher_is_better=better)

    def due(self, step: int) -> bool:
        """Return whether to evaluate after this step."""
        scores = self._scorer is not None and step % self._scores_every == 0
        return step % self._every == 0 or step == self._run.total_steps or scores

    def at(self, step: int, state: TrainState, frozen: Params) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluate the state after `step`.

        Returns:
          (values to write to metrics.jsonl, all scores of the task). The second is empty if only the losses are due.
        """
        if self._scorer is None or (step % self._scores_every and step != self._run.total_steps):
            return evaluate.losses(self._run, self._loss_step, self._records, state.trainable, frozen), {}
        examples = self._run.experiment.train.eval_examples
        whole, _ = self._scorer.score(self._records, state.trainable, frozen, examples, step)
        return {name: value for name, value in whole.items() if isinstance(value, float)}, whole


def steps_in(run: Run, duration: str) -> int:
    """Convert an interval of the settings, such as "2 epochs", to whole steps, at least 1."""
    return max(1, durations.steps_in(duration, steps_per_epoch=run.steps_per_epoch, total=run.total_steps))


class _Log:
    """Buffers metrics on the device until the next log step, so that the host does not block; counts skipped steps."""

    def __init__(self, run: Run, writer: Writer, checkpoints: Checkpoints, start: int):
        self._run, self._writer, self._checkpoints = run, writer, checkpoints
        self._pending: list[tuple[int, Metrics]] = []
        self._once = run.mixture.counts() if run.mixture else {}  # facts for the next line
        self._bad_in_a_row = 0
        self._skipped = 0
        self._since = time.perf_counter()
        self._waited = 0.0  # seconds since then spent waiting for batches
        hidden = jax.process_index() != 0
        self._bar: progress.Bar[None] = progress.bar(
            total=run.total_steps, initial=start, unit="step", desc="train", hidden=hidden, leave=True
        )

    def add(self, step: int, metrics: Metrics) -> None:
        """Buffer the metrics of `step`; return once the previous step has finished.

        At most one step is queued behind the running one. Without this bound the host would run ahead, and `input_wait` would not
        measure the time that the device waits for batches.
        """
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
        self._pending.append((step, metrics))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as `input_wait`; wrap the fetching of a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def restart_clock(self) -> None:
        """Exclude the time since the last log line, such as an evaluation, from throughput."""
        self._since, self._waited = time.perf_counter(), 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of metrics.

        Raises:
          PlaceFailed: the folder can no longer be written.
        """
        with place_of(self._checkpoints.workdir):
            self._writer.write(step, values)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on process 0 only."""
        if not self._bar.disable:
            progress.write(text)

    def flush(self, step: int, corrupt: int = 0) -> None:
        """Fetch the buffered metrics and write one line of metrics.

        Args:
          step: step of the line.
          corrupt: number of corrupt records skipped so far on this host, without those in prefetched batches.

        Raises:
          TrainingStopped: `max_bad_steps` consecutive steps were not finite, or a batch had no target.
        """
        if not self._pending:
            return
        fetched = [(number, jax.device_get(metrics)) for number, metrics in self._pending]
        total = self._summed(fetched)
        seconds = time.perf_counter() - self._since
        samples = len(fetched) * self._run.experiment.train.batch_size
        values: dict[str, float] = {name: mean.value() for name, mean in total.items()}
        values |= {
            "skipped_total": self._skipped,
            "samples_per_second": samples / seconds,
            "input_wait": self._waited / seconds,  # fraction of the time, 0 to 1
            "epoch": step / self._run.steps_per_epoch,
        }
        values, self._once = values | self._once, {}
        if corrupt:
            values["corrupt_total"] = corrupt
        self.write(step, values)
        self._bar.update(len(fetched))
        self._bar.set_postfix_str(
            f"loss {values.get('loss', float('nan')):.4f}, {samples / seconds:.1f} samples/s, "
            f"{values['input_wait']:.0%} waiting for input"
            + (f", {self._skipped} skipped" if self._skipped else "")
            + (f", {corrupt} corrupt records" if corrupt else "")
        )
        self._pending.clear()
        self.restart_clock()

    def _summed(self, fetched: list[tuple[int, Metrics]]) -> Metrics:
        """Sum the metrics of several steps; a non-finite step contributes only `skipped` and `lr`."""
        limit = self._run.experiment.train.max_bad_steps
        total: Metrics = {}
        for number, metrics in fetched:
            must_have_targets(number, float(metrics["loss"].weight))
            bad = bool(metrics["skipped"].total)
            self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
            self._skipped += bad
            if self._bad_in_a_row >= limit:
                good = self._checkpoints.latest_step()
                where = (
                    "no checkpoint was saved yet"
                    if good is None
                    else f"the newest checkpoint is step {good} in {self._checkpoints.folder}"
                )
                raise step_lib.TrainingStopped(
                    f"step {number}: the loss or gradient was not finite in {limit} consecutive steps ({where}); lower "
                    "config.optim.lr or check the data"
                )
            for name, mean in metrics.items():
                if bad and name not in ("skipped", "lr"):
                    continue  # one NaN would hide the finite steps of the interval
                total[name] = total[name] + mean if name in total else mean
        return total

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()
