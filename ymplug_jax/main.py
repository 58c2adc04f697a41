"""Train, evaluate, plan, compile or benchmark a run.

  python -m ymplug_jax.main --config configs/tiny/pretrain.py --workdir DIR   start a run, or resume it
  python -m ymplug_jax.main --workdir DIR                                     resume with its stored settings
  python -m ymplug_jax.main --workdir DIR --mode eval                         score its newest checkpoint

On a pod, start the same command on every host. In every mode but train, the last line on stdout is one
JSON object; all other output goes to stderr.

Exit codes (docs/troubleshooting.md explains every message):
  0    success
  1    bug in the program (with a traceback)
  2    user error in the settings, flags, paths or data; do not retry
  3    --mode compile: the step does not fit the memory of a chip
  4    another process of the run is missing or lost; start the same command on all hosts to resume
  5    a disk, folder or bucket failed during the run; retry a few times
  130  interrupted by Ctrl-C with nothing to save
"""

import argparse
import dis
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ymplug_jax import command_line
from ymplug_jax.core import exits
from ymplug_jax.core.config import Experiment
from ymplug_jax.training import cluster, hosts

HERE = Path(__file__).parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)  # failed writes carry no file name


def main(argv: Sequence[str]) -> int:
    """Run one mode and return the exit code. User errors (settings, paths, data) print one line on stderr and return 2.

    Args:
      argv: the program's name and its arguments.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    started = False  # an OSError before the start is a user error; a later one is a path that stopped working
    try:
        flags, settings = command_line.parse(argv[1:], __doc__)
        _quiet()
        if flags.mode == "compile":
            # Ahead-of-time compilation needs libtpu but no chip: keep JAX from searching for one.
            os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
            os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # allow parallel compilations
        experiment = command_line.experiment_of(flags, settings)
        if flags.mode != "compile":
            _join(flags)
        runs = _accepted(flags, experiment)
        started = True
        result = _result_of(flags, experiment, runs)
    except Exception as error:
        if (code := _code(error, started)) is None:
            raise
        logging.error("error: %s", _line(error))
        return code
    except KeyboardInterrupt:  # `training.stop` handles Ctrl-C during training
        logging.error("interrupted")
        return exits.STOPPED
    import jax

    if result is not None and jax.process_index() == 0:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return exits.DOES_NOT_FIT if result is not None and not result.get("fits", True) else 0


def _quiet() -> None:
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns about optional metadata of partial checkpoints
    for noisy in ("jax", "orbax", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _join(flags: argparse.Namespace) -> None:
    """Join the other processes of a multi-process run; only process 0 logs below the level WARNING."""
    meeting = cluster.find(flags.coordinator, flags.processes, flags.process_id, flags.start_timeout)
    if meeting:
        hosts.join(meeting, flags.start_timeout, flags.heartbeat)
    import jax

    if jax.process_index() != 0:
        logging.getLogger().setLevel(logging.WARNING)


def _accepted(flags: argparse.Namespace, experiment: Experiment) -> list[tuple[Experiment, Any]]:
    """Return (settings, folder) of each run to train or evaluate, after checking all of them."""
    if flags.mode not in ("train", "eval"):
        return []
    if not flags.workdir:
        raise exits.Mistake(f"--workdir: missing; give the folder of the run for --mode {flags.mode}")
    if flags.examples < 0:
        raise exits.Mistake(f"--examples: {flags.examples} is negative; give 1 or more, or 0 for the whole split")
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.training import preflight, setup

    folder = checkpoint_files.folder_of(flags.workdir, "--workdir")
    runs = setup.seeds(experiment, folder, flags.seeds)
    if flags.mode == "eval" and flags.seeds > 1:
        _check_seeds(folder, runs)
    for one, workdir in runs:
        preflight.check(one, workdir, flags.mode)
    return runs


def _check_seeds(folder: Any, runs: list[tuple[Experiment, Any]]) -> None:
    """Check that every seed to evaluate has a run.

    Raises:
      Mistake: a seed has no run, or `folder` holds a single run.
    """
    from ymplug_jax.training import run_folder

    if (folder / run_folder.CONFIG).exists():
        raise exits.Mistake(
            f"--seeds {len(runs)}: {folder} holds a single run, not one run per seed; evaluate it without --seeds"
        )
    if missing := [place.name for _, place in runs if not (place / run_folder.CONFIG).exists()]:
        there = sorted(place.name for place in folder.glob("seed_*")) if folder.exists() else []
        raise exits.Mistake(
            f"--seeds {len(runs)}: no run in {folder / missing[0]} (found: {', '.join(there) or 'none'}); train with the same "
            "--seeds first"
        )


def _result_of(
    flags: argparse.Namespace, experiment: Experiment, runs: list[tuple[Experiment, Any]]
) -> dict[str, Any] | None:
    """Run the mode and return what it prints as JSON; None for training."""
    if flags.mode == "plan":
        from ymplug_jax.analysis import estimate
        from ymplug_jax.training import parameter_table, setup
        from ymplug_jax.training import step as step_lib

        ready = setup.prepare(experiment)
        logging.info("%s", parameter_table.table(ready))
        facts = estimate.estimate(ready, step_lib.compile_step(ready))
        logging.info("%s", estimate.render(facts))
        return facts
    if flags.mode == "compile":
        from ymplug_jax.analysis import aot

        if flags.program == "predict":
            if flags.slices != 1:
                raise exits.Mistake("--slices: --program predict answers on one slice; leave it out")
            result = aot.compile_answers(experiment, flags.topology)
        else:
            result = aot.compile_for(experiment, flags.topology, flags.slices)
        logging.info("%s", aot.render(result))
        return result
    if flags.mode == "bench":
        from ymplug_jax.analysis import bench  # imports neither Orbax nor data libraries
        from ymplug_jax.core import places

        result = bench.bench(
            experiment, flags.steps, places.place(flags.workdir, "--workdir") if flags.workdir else None
        )
        logging.info("%s", bench.render(result))
        return result
    from ymplug_jax.analysis import estimate
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.training import evaluate, loop

    if flags.mode == "eval":
        return evaluate.evaluate_all(runs, checkpoint_files.folder_of(flags.workdir), examples=flags.examples)
    for one, workdir in runs:
        loop.train(one, workdir, estimate.describe)
    return None


def _code(error: Exception, started: bool) -> int | None:
    """Return the exit code of an error whose message is meant for the user; None for a bug, which keeps its traceback."""
    if isinstance(error, exits.Mistake):
        return exits.MISTAKE
    if isinstance(error, exits.PlaceFailed):
        return exits.PLACE
    if isinstance(error, hosts.HostsError):
        return exits.LOST
    if _on_purpose(error) and isinstance(error, ValueError | FileNotFoundError):
        return exits.MISTAKE
    if _on_purpose(error) and type(error).__name__ == "TrainingStopped":  # by name: importing its module imports JAX
        return exits.MISTAKE
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK or _on_purpose(error)):
        return exits.PLACE if started else exits.MISTAKE
    return None


def _line(error: Exception) -> str:
    """Return the error's message as one line; for an operating system error, its path and reason."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: no such file; correct the path"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror or error}; check its permissions"
    return " ".join(str(error).splitlines())


def _on_purpose(error: BaseException) -> bool:
    """Return whether a `raise` statement of this package raised the error; errors raised by Python or a library are bugs."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and Path(code.co_filename).is_relative_to(HERE)


if __name__ == "__main__":
    hosts.without_accelerator()  # config files import JAX
    sys.exit(hosts.announced(main)(sys.argv))
