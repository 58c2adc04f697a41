"""The one training loop. It sees a Task, never a particular model; what a run needs is laid out in `run.py`."""

import contextlib
import json
import logging
import platform
import signal
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from ymplug_jax import config, evaluate, plan, progress, sharding
from ymplug_jax import run as run_lib
from ymplug_jax import step as step_lib
from ymplug_jax.checkpoint import Checkpoints
from ymplug_jax.config import Experiment
from ymplug_jax.data import feed as feed_lib
from ymplug_jax.data import loader
from ymplug_jax.data.source import open_split
from ymplug_jax.reports.curves import draw_curve
from ymplug_jax.run import Run
from ymplug_jax.writer import Metrics, Writer


def train(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
    """Train until the end of `duration`, or go on where this folder's newest checkpoint stands. Returns the last scores.

    Raises:
      TrainingStopped: too many consecutive non-finite steps.
    """
    run = run_lib.prepare(experiment)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Checkpoints(str(workdir), keep=experiment.train.keep)) as checkpoints:
        scores = _train(run, workdir, checkpoints)
    if jax.process_index() == 0 and (picture := draw_curve(workdir)):
        logging.info("loss curve: %s", picture)
    return scores


def _train(run: Run, workdir: epath.Path, checkpoints: Checkpoints) -> dict[str, float]:
    experiment = run.experiment
    settings, data = experiment.train, experiment.data
    first = jax.process_index() == 0
    if first:
        _write_facts(experiment, workdir)
    state, frozen, seen, origin = run_lib.initialise(run, checkpoints)
    start = int(state.step)
    logging.info("\n%s", plan.table(run, origin))
    compiled = step_lib.compile_step(run)
    logging.info("\n%s", plan.render_estimate(plan.estimate(run, compiled)))
    if start >= run.total_steps:
        logging.info("step %d of %d is reached already; nothing to train", start, run.total_steps)
    checkpoints.save_frozen(frozen)
    frozen = run_lib.hold(run, frozen)

    writer = Writer(workdir, active=first)
    save_every = max(
        1, config.steps_in(settings.save_every, steps_per_epoch=run.steps_per_epoch, total=run.total_steps)
    )
    eval_every = max(
        1, config.steps_in(settings.eval_every, steps_per_epoch=run.steps_per_epoch, total=run.total_steps)
    )
    key = sharding.on_all_hosts(lambda: jax.random.key(settings.seed), sharding.replicated(run.mesh))
    scores: dict[str, float] = {}
    stop = _Stop()
    records = open_split(data.path, data.train_split)
    rows = sharding.local_rows(settings.batch_size, run.mesh)
    stream = loader.batches(
        records, run.task.example, seed=settings.seed, batch_size=settings.batch_size, rows=rows, start=seen, shuffle=True,
        threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
    )  # fmt: skip
    log = _Log(run, writer, checkpoints, start)

    loss_step = evaluate.make_loss_step(run)
    held_out = open_split(data.path, data.eval_split) if data.eval_split else None

    def check(step: int) -> None:
        scores.update(evaluate.losses(run, loss_step, held_out, state.trainable, frozen))
        writer.write(step, {f"eval/{name}": value for name, value in scores.items()})
        log.say(f"step {step}: evaluation " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        log.restart_clock()

    if held_out is not None and start == 0:
        check(0)
    with contextlib.closing(
        feed_lib.Feed(stream, lambda local: sharding.put_batch(local, rows, settings.batch_size, run.mesh))
    ) as feed:
        for step in range(start + 1, run.total_steps + 1):  # `step` counts finished steps
            with log.waiting():
                batch = next(feed)
            with jax.transfer_guard("disallow"):
                state, metrics = compiled(state, frozen, batch, key)
            log.add(step, metrics)
            last, stopping = step == run.total_steps, stop.asked(step)
            if step % settings.log_every == 0 or last or stopping:
                log.flush(step, corrupt=feed.skipped)
            if held_out is not None and (step % eval_every == 0 or last):
                log.flush(step)
                check(step)
            if step % save_every == 0 or last or stopping:
                log.flush(step)  # a run of bad steps must not become the last good checkpoint
                writer.flush()
                checkpoints.save(state, step, seen + (step - start) * settings.batch_size)
            if stopping:
                log.say(f"asked to stop: saving step {step}; the same command goes on from there")
                break
    log.close()
    writer.close()
    return scores


class _Stop:
    """Notices SIGTERM. On several hosts all of them must stop at the same step, which JAX's preemption sync decides."""

    def __init__(self):
        self._flag = False
        self._alone = jax.process_count() == 1
        if self._alone:
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_flag", True))

    def asked(self, step: int) -> bool:
        return self._flag if self._alone else multihost_utils.reached_preemption_sync_point(step)


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

    def say(self, text: str) -> None:
        if not self._bar.disable:
            progress.write(text)

    def flush(self, step: int, corrupt: int = 0) -> None:
        """Fetch what is pending, write one line; `corrupt` records were left out so far (on this host, those read ahead not
        counted).

        Raises:
          TrainingStopped: more than `max_bad_steps` steps in a row were not finite.
        """
        if not self._pending:
            return
        limit = self._run.experiment.train.max_bad_steps
        fetched = [(number, jax.device_get(metrics)) for number, metrics in self._pending]
        total: Metrics = {}
        for number, metrics in fetched:
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
        self._writer.write(step, values)
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


def _write_facts(experiment: Experiment, workdir: epath.Path) -> None:
    """config.json, environment.json and the tokenizer; a changed setting of a resumed run is named."""
    path = workdir / "config.json"
    text = config.to_json(experiment)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        old, new = _leaves(json.loads(path.read_text(encoding="utf-8"))), _leaves(json.loads(text))
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        logging.warning("this folder was written with other settings: %s", "; ".join(changed))
    path.write_text(text, encoding="utf-8")
    if experiment.data.tokenizer:  # a run answers questions long after its data is gone
        (workdir / "tokenizer").mkdir(exist_ok=True)
        tokenizer = epath.Path(experiment.data.tokenizer)
        (workdir / "tokenizer" / tokenizer.name).write_bytes(tokenizer.read_bytes())
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ymplug_jax")
    facts = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "versions": {name: metadata.version(name) for name in names},
    }
    (workdir / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in _leaves(value, f"{prefix}.{key}" if prefix else key).items()
    }
