"""Entry point: `python -m ymplug_jax.main --config configs/tiny/pretrain.py --workdir DIR --mode train|eval|plan|compile|bench`.

`--workdir DIR` alone goes on with the run in that folder, or evaluates it with `--mode eval`: its settings are kept there. For all
modes but train the last line on stdout is one JSON object; everything else goes to stderr. On a pod the same command runs on every
host. Exit codes: 0, 1 for an error in the program, and those of `exits.py`.
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
from ymplug_jax.training import hosts

HERE = Path(__file__).parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)  # a write that fails names no file


def main(argv: Sequence[str]) -> int:
    """Runs one mode. Mistakes of the user (settings, paths, data) end in one line on stderr and exit code 2.

    Args:
      argv: the program's name and its arguments.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    started = False  # what fails before is the user's to mend, what fails later is a place that has worked
    try:
        flags, settings = command_line.parse(argv[1:], __doc__)
        _quiet()
        if flags.mode == "compile":
            # The compiler is asked, no chip: JAX must not look for one.
            os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
            os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nor is the library held by one process
        experiment = command_line.experiment_of(flags, settings)
        if flags.mode != "compile":
            _join(flags)
        runs = _accepted(flags, experiment)
        started = True
        result = _run(flags, experiment, runs)
    except Exception as error:
        if (code := _code(error, started)) is None:
            raise
        logging.error("error: %s", _line(error))
        return code
    except KeyboardInterrupt:  # training has a way of its own to stop
        logging.error("stopped")
        return exits.STOPPED
    import jax

    if result is not None and jax.process_index() == 0:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return exits.DOES_NOT_FIT if flags.mode == "compile" and not result["fits"] else 0


def _quiet() -> None:
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of metadata that a part of a checkpoint never has
    for noisy in ("jax", "orbax", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _join(flags: argparse.Namespace) -> None:
    """Meet the other processes, where there are any."""
    meeting = hosts.find(flags.coordinator, flags.processes, flags.process_id, flags.start_timeout)
    if meeting:
        hosts.join(meeting, flags.start_timeout, flags.heartbeat)
    import jax

    if jax.process_index() != 0:
        logging.getLogger().setLevel(logging.WARNING)


def _accepted(flags: argparse.Namespace, experiment: Experiment) -> list[tuple[Experiment, Any]]:
    """(settings, folder) of each run to train or evaluate; all are checked before the first one starts."""
    if flags.mode not in ("train", "eval"):
        return []
    if not flags.workdir:
        raise exits.Mistake(f"--workdir: missing; give the folder of the run that --mode {flags.mode} works in")
    if flags.examples < 0:
        raise exits.Mistake(f"--examples: {flags.examples} is too small; give 0 for the whole split, or more")
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.training import preflight, setup

    runs = setup.seeds(experiment, checkpoint_files.folder_of(flags.workdir), flags.seeds)
    for one, workdir in runs:
        preflight.check(one, workdir, flags.mode)
    return runs


def _run(flags: argparse.Namespace, experiment: Experiment, runs: list) -> dict[str, Any] | None:
    """What the mode prints as JSON."""
    if flags.mode == "plan":
        from ymplug_jax.training import parameter_table, setup
        from ymplug_jax.training import step as step_lib

        ready = setup.prepare(experiment)
        logging.info("%s", parameter_table.table(ready))
        facts = parameter_table.estimate(ready, step_lib.compile_step(ready))
        logging.info("%s", parameter_table.render_estimate(facts))
        return facts
    if flags.mode == "compile":
        from ymplug_jax.analysis import aot

        result = aot.compile_for(experiment, flags.topology, flags.slices)
        logging.info("%s", aot.render(result))
        return result
    if flags.mode == "bench":
        from etils import epath

        from ymplug_jax.analysis import bench  # needs neither Orbax nor anything that reads data

        result = bench.bench(experiment, flags.steps, epath.Path(flags.workdir) if flags.workdir else None)
        logging.info("%s", bench.render(result))
        return result
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.training import evaluate, loop

    if flags.mode == "eval":
        return evaluate.evaluate_all(runs, checkpoint_files.folder_of(flags.workdir), examples=flags.examples)
    for one, workdir in runs:
        loop.train(one, workdir)
    return None


def _code(error: Exception, started: bool) -> int | None:
    """Exit code of an error that has a message for the user; None for a bug, which keeps its traceback."""
    if isinstance(error, exits.Mistake):
        return exits.MISTAKE
    if isinstance(error, exits.PlaceFailed):
        return exits.PLACE
    if isinstance(error, hosts.HostsError):
        return exits.LOST
    if _on_purpose(error) and isinstance(error, ValueError | FileNotFoundError):
        return exits.MISTAKE
    if _on_purpose(error) and type(error).__name__ == "TrainingStopped":  # its module imports JAX
        return exits.MISTAKE
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK or _on_purpose(error)):
        return exits.PLACE if started else exits.MISTAKE
    return None


def _line(error: Exception) -> str:
    """The message in one line; of an error of the system, the place and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror or error}; look at the place and its permissions"
    return " ".join(str(error).splitlines())


def _on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of this package raised the error, with a message for the user. What Python or a library raises is a bug."""
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
