"""Entry point: `python -m ymplug_jax.main --config configs/tiny/pretrain.py --workdir DIR --mode train|eval|plan|compile|bench`.

For all modes but train the last line on stdout is one JSON object; everything else goes to stderr. On a pod the same
command runs on every host.
"""

import json
import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from ymplug_jax import exits, hosts

HERE = Path(__file__).parent
CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="configs/<model>/<task>.py[:size]; settings follow as --config.data.path=..."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run (local or gs://): checkpoints, metrics, settings.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "plan", "compile", "bench"], "What to do.")
TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:4x4", "With --mode=compile: the TPU slice, e.g. v5e:4x8, v5p:4x4x4, v6e:8x8."
)
SLICES = flags.DEFINE_integer(
    "slices", 1, "With --mode=compile: so many of them; data runs over the network between them."
)
STEPS = flags.DEFINE_integer("steps", 30, "With --mode=bench: steps that are timed, after three to warm up.")
EXAMPLES = flags.DEFINE_integer("examples", 0, "Evaluate only this many examples; 0: the whole split.")
SEEDS = flags.DEFINE_integer(
    "seeds",
    1,
    "Runs with config.train.seed and the ones after it, in folders seed_N of --workdir; eval: mean and deviation.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for plain hosts; TPU pods need none.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds until every process must have come, with several.")
HEARTBEAT = flags.DEFINE_integer("heartbeat", 100, "Seconds of silence after which a process counts as dead.")


def main(argv: list[str]) -> int:
    """Runs one mode. Mistakes of the user (settings, paths, data) end in one line on stderr and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(
            f"do not know what to do with {argv[1]!r}; settings are written as --config.train.batch_size=8"
        )
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of metadata that a part of a checkpoint never has
    for noisy in ("jax", "orbax", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if MODE.value == "compile":
        # The compiler is asked, no chip: JAX must not look for one.
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nor is the library held by one process
    # After the flags: a wrong flag is answered at once, and importing this module stays quick.
    import jax

    from ymplug_jax import config, plan, run
    from ymplug_jax import step as step_lib

    try:
        meeting = None
        if MODE.value != "compile":
            meeting = hosts.find(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value, START_TIMEOUT.value)
        if meeting:
            hosts.join(meeting, START_TIMEOUT.value, HEARTBEAT.value)
    except (ValueError, hosts.HostsError) as error:
        logging.error("error: %s", error)
        return hosts.LOST if isinstance(error, hosts.HostsError) else 2
    if jax.process_index() != 0:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        experiment = config.from_config_dict(CONFIG.value)
        if MODE.value == "plan":
            ready = run.prepare(experiment)
            logging.info("%s", plan.table(ready))
            facts = plan.estimate(ready, step_lib.compile_step(ready))
            logging.info("%s", plan.render_estimate(facts))
            result = facts
        elif MODE.value == "compile":
            from ymplug_jax import aot

            result = aot.compile_for(experiment, TOPOLOGY.value, SLICES.value)
            logging.info("%s", aot.render(result))
        elif MODE.value == "bench":
            from ymplug_jax import bench  # needs neither Orbax nor anything that reads data

            result = bench.bench(experiment, STEPS.value, epath.Path(WORKDIR.value) if WORKDIR.value else None)
            logging.info("%s", bench.render(result))
        else:
            from ymplug_jax import checkpoint, evaluate, train

            if not WORKDIR.value:
                raise ValueError(f"--workdir is missing: the folder of the run that --mode={MODE.value} works in")
            folder = checkpoint.folder_of(WORKDIR.value)
            runs = run.seeds(experiment, folder, SEEDS.value)
            if MODE.value == "eval":
                result = evaluate.evaluate_all(runs, folder, examples=EXAMPLES.value)
            else:
                for one, workdir in runs:
                    train.train(one, workdir)
                return 0
    except exits.PlaceFailed as error:
        logging.error("error: %s", error)
        return exits.PLACE
    except (ValueError, FileNotFoundError, step_lib.TrainingStopped) as error:
        if not _ours(error):
            raise
        logging.error("error: %s", error)
        return 2
    if jax.process_index() == 0:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return 3 if MODE.value == "compile" and not result["fits"] else 0


def _ours(error: BaseException) -> bool:
    """Whether this package raised the error on purpose, with a message for the user; anything else is a bug and keeps its traceback."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).parent in (
        HERE,
        *(p for p in HERE.iterdir() if p.is_dir()),
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    hosts.without_accelerator()  # config files import JAX
    app.run(hosts.announced(main))
