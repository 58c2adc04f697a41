"""The one training loop. It sees a Task, never a particular model; what a run needs is laid out in `run.py`."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from ymplug_jax.core import checkpoint_files, config, progress, sharding
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.checkpoint_files import BEST, place_of
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.core.metrics import Metrics, Writer
from ymplug_jax.data import loader
from ymplug_jax.data import prefetch as feed_lib
from ymplug_jax.data.source import open_split
from ymplug_jax.reports.curves import draw_curve
from ymplug_jax.training import evaluate, parameter_table, run_folder, setup
from ymplug_jax.training import step as step_lib
from ymplug_jax.training.best_step import Best
from ymplug_jax.training.setup import Run
from ymplug_jax.training.stop import Stop, finite_scores, must_have_targets, reading


def train(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
    """Train until the end of `duration`, or go on where this folder's newest checkpoint stands. Returns the last scores.

    The first SIGINT or SIGTERM saves and returns; a second SIGINT ends the process at once. Nothing in the folder changes before the
    settings, the stored parameters and the compiled step were found to fit.

    Raises:
      Mistake: the folder cannot be used, or holds a run that cannot go on with these settings.
      TrainingStopped: too many consecutive non-finite steps, a step without any target, or an evaluation that is not finite.
      PlaceFailed: the data or the folder could not be read or written any more; the run was saved where that was possible.
    """
    run_folder.check(experiment, workdir)
    if checkpoint_files.latest_step(str(workdir)) is None:
        run_folder.check_init_from(experiment)
    with Stop() as stop:
        run = setup.prepare(experiment)
        with contextlib.closing(Checkpoints(str(workdir), keep=experiment.train.keep)) as checkpoints:
            scores = _train(run, workdir, checkpoints, stop)
        with place_of(workdir):
            if jax.process_index() == 0 and (picture := draw_curve(workdir)):
                logging.info("loss curve: %s", picture)
    return scores


def _train(run: Run, workdir: epath.Path, checkpoints: Checkpoints, stop: Stop) -> dict[str, float]:
    experiment = run.experiment
    settings, data = experiment.train, experiment.data
    first = jax.process_index() == 0
    state, frozen, seen, origin = setup.initialise(run, checkpoints)
    start = int(state.step)
    logging.info("\n%s", parameter_table.table(run, origin))
    run = step_lib.with_checked_kernels(run)
    compiled = step_lib.compile_step(run)
    logging.info("\n%s", parameter_table.render_estimate(parameter_table.estimate(run, compiled)))
    if start >= run.total_steps:
        logging.info("step %d of %d is reached already; nothing to train", start, run.total_steps)
    stop.listen()
    if first:
        with place_of(workdir):
            run_folder.write(experiment, workdir)
    checkpoints.save_frozen(frozen)
    frozen = setup.hold(run, frozen)

    with place_of(workdir):
        writer = Writer(workdir, active=first)

    def steps(duration: str) -> int:
        return max(1, config.steps_in(duration, steps_per_epoch=run.steps_per_epoch, total=run.total_steps))

    log_every, save_every, eval_every = map(steps, (settings.log_every, settings.save_every, settings.eval_every))
    key = sharding.on_all_hosts(lambda: jax.random.key(settings.seed), sharding.replicated(run.mesh))
    scores: dict[str, float] = {}
    records = open_split(data.path, data.train_split)
    rows = sharding.local_rows(settings.batch_size, run.mesh)
    stream = loader.batches(
        records, run.task.example, seed=settings.seed, batch_size=settings.batch_size, rows=rows, start=seen, shuffle=True,
        threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
    )  # fmt: skip
    log = _Log(run, writer, checkpoints, start)

    loss_step = evaluate.make_loss_step(run)
    held_out = open_split(data.path, data.eval_split) if data.eval_split else None
    scorer = evaluate.Scorer(run) if settings.eval_scores_every else None
    scores_every = steps(settings.eval_scores_every) if scorer else 0
    best = Best(experiment, workdir) if settings.best else None

    def check(step: int) -> None:
        """The losses of the evaluation split, and every `eval_scores_every` the task's own scores."""
        if stop.alone and stop.asked(step):
            return
        whole: dict[str, Any] = {}
        with saved_first(step), stop.at_once(), reading(data.path):
            if scorer and (step % scores_every == 0 or step == run.total_steps):
                whole, _ = scorer.score(held_out, state.trainable, frozen, settings.eval_examples, step)
                found = {name: value for name, value in whole.items() if isinstance(value, float)}
            else:
                found = evaluate.losses(run, loss_step, held_out, state.trainable, frozen)
            scores.update(finite_scores(step, found, data.eval_split))
            log.write(step, {f"eval/{name}": value for name, value in found.items()})
            log.say(f"step {step}: evaluation " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        if best and whole and best.offer(state, step, seen_after(step), whole, checkpoints.frozen_sums):
            log.say(f"step {step}: best {settings.best} so far, kept in {workdir / BEST}")
        log.restart_clock()

    def seen_after(step: int) -> int:
        return seen + (step - start) * settings.batch_size

    def save(step: int) -> None:
        log.flush(step)  # a run of bad steps must not become the last good checkpoint
        with place_of(workdir):
            writer.flush()
        checkpoints.save(state, step, seen_after(step))

    @contextlib.contextmanager
    def saved_first(step: int) -> Iterator[None]:
        """Where the data cannot be read any more after `step`, that step is saved; several processes would wait for each other."""
        try:
            yield
        except PlaceFailed as error:
            if step == start or not stop.alone:
                raise
            save(step)
            checkpoints.wait()
            raise PlaceFailed(f"{error}; step {step} is saved, the same command goes on from there") from None

    if held_out is not None and start == 0:
        check(0)
    with contextlib.closing(
        feed_lib.Feed(stream, lambda local: sharding.put_batch(local, rows, settings.batch_size, run.mesh))
    ) as feed:
        for step in range(start + 1, run.total_steps + 1):  # `step` counts finished steps
            with saved_first(step - 1), log.waiting(), reading(data.path):
                batch = next(feed)
            with jax.transfer_guard("disallow"):
                state, metrics = compiled(state, frozen, batch, key)
            log.add(step, metrics)
            last, stopping = step == run.total_steps, stop.asked(step)
            if step % log_every == 0 or last or stopping:
                log.flush(step, corrupt=feed.skipped)
            due = step % eval_every == 0 or last or (scorer and step % scores_every == 0)
            if held_out is not None and due and not stopping:
                log.flush(step)
                check(step)
                stopping = stop.alone and stop.asked(step)
            if step % save_every == 0 or last or stopping:
                save(step)
            if stopping:
                log.say(f"asked to stop: saving step {step}; the same command goes on from there")
                break
    log.close()
    with place_of(workdir):
        writer.close()
    return scores


class _Log:
    """Keeps device metrics until a log step, so that the host never waits in between; counts and judges skipped steps."""

    def __init__(self, run: Run, writer: Writer, checkpoints: Checkpoints, start: int):
        self._run, self._writer, self._checkpoints = run, writer, checkpoints
        self._pending: list[tuple[int, Metrics]] = []
        self._bad_in_a_row = 0
        self._skipped = 0
        self._since = time.perf_counter()
        self._waited = 0.0  # seconds since then, for batches
        hidden = jax.process_index() != 0
        self._bar = progress.bar(
            total=run.total_steps, initial=start, unit="step", desc="train", hidden=hidden, leave=True
        )

    def add(self, step: int, metrics: Metrics) -> None:
        """Returns when the step before is done: one step is queued behind the running one, and what the loop then waits for
        is the input, not its own lead."""
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
        self._pending.append((step, metrics))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches a batch: its time counts as `input_wait`."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def restart_clock(self) -> None:
        """Leave out what was not training."""
        self._since, self._waited = time.perf_counter(), 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.

        Raises:
          PlaceFailed: the folder takes it no more.
        """
        with place_of(self._checkpoints.workdir):
            self._writer.write(step, values)

    def say(self, text: str) -> None:
        if not self._bar.disable:
            progress.write(text)

    def flush(self, step: int, corrupt: int = 0) -> None:
        """Fetch what is pending, write one line; `corrupt` records were left out so far (on this host, those read ahead not
        counted).

        Raises:
          TrainingStopped: more than `max_bad_steps` steps in a row were not finite, or a batch had no target.
        """
        if not self._pending:
            return
        limit = self._run.experiment.train.max_bad_steps
        fetched = [(number, jax.device_get(metrics)) for number, metrics in self._pending]
        total: Metrics = {}
        for number, metrics in fetched:
            must_have_targets(number, float(metrics["loss"].weight))
            bad = bool(metrics["skipped"].total)
            self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
            self._skipped += bad
            if self._bad_in_a_row >= limit:
                good = self._checkpoints.latest_step()
                where = (
                    "there is no checkpoint yet"
                    if good is None
                    else f"the last good checkpoint is step {good} in {self._checkpoints.folder}"
                )
                raise step_lib.TrainingStopped(
                    f"step {number}: loss or gradient was not finite {limit} times in a row; {where}. Lower config.optim.lr or look at the data"
                )
            for name, mean in metrics.items():
                if bad and name not in ("skipped", "lr"):
                    continue  # a NaN would hide the good steps of the interval
                total[name] = total[name] + mean if name in total else mean
        seconds = time.perf_counter() - self._since
        samples = len(fetched) * self._run.experiment.train.batch_size
        values = {name: mean.value() for name, mean in total.items()}
        values |= {
            "skipped_total": self._skipped,
            "samples_per_second": samples / seconds,
            "input_wait": self._waited / seconds,  # share of the time, 0 to 1
            "epoch": step / self._run.steps_per_epoch,
        }
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

    def close(self) -> None:
        self._bar.close()
