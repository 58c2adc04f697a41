"""Start several local processes as one run, and record the records that each reads and the files that each writes."""

import subprocess
import sys
import time
from pathlib import Path

import runs

SECONDS = 1200  # time limit, generous for a busy machine
# Runs ymplug_jax.main, logs every record it reads and every file it writes below the run folder, and sleeps after each step.
PROGRAM = """
import os, runpy, sys, time
from ymplug_jax.training import loop
from ymplug_jax.data.records import Records
told = open(os.environ["TOLD"], "a", buffering=1)
get, asked, pause = Records.__getitem__, loop.Stop.asked, float(os.environ["PAUSE"])
def getitem(self, i):
    print("read", self.split, int(i), file=told)
    return get(self, i)
def hook(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) and os.environ["WORKDIR"] in str(args[0]):
        print("write", args[0], file=told)
Records.__getitem__ = getitem
loop.Stop.asked = lambda self, step: time.sleep(pause) or asked(self, step)
sys.addaudithook(hook)
sys.argv[0] = "main"
runpy.run_module("ymplug_jax.main", run_name="__main__", alter_sys=True)
"""


class Group:
    """The processes of one run, started together."""

    def __init__(
        self,
        workdir: Path,
        flags: list[str],
        count: int,
        *,
        devices: int = 1,
        pause: float = 0,
        slurm: bool = False,
        url: str = "",
    ):
        """Start the processes in `workdir`; with `url` their run folder is that one, e.g. gs://runs/a, and `workdir` holds logs only."""
        port = runs.free_port()
        self.workdir, self.processes = workdir, []
        for i in range(count):
            env = runs.environment(devices) | {
                "TOLD": f"{workdir}.told{i}", "WORKDIR": f"{url or workdir}/", "PAUSE": str(pause),
                # Restarts on the same topology compile the same program.
                "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }  # fmt: skip
            own = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process_id={i}"] if count > 1 else []
            if slurm:
                own = []
                env |= {
                    "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
                    "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
                }  # fmt: skip
            command = [sys.executable, "-c", PROGRAM, f"--workdir={url or f'file://{workdir}'}", *flags, *own]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, cwd=runs.ROOT, env=env, **pipes))

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have reached that step and a checkpoint is complete."""
        end = time.monotonic() + SECONDS
        while not any(line >= step for line in runs.losses(self.workdir)) or not steps(self.workdir):
            for process in self.processes:
                assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.05)

    def end(self, seconds: float = SECONDS) -> list[tuple[int, str]]:
        """Wait for all processes and return (exit code, stderr) of each."""
        end = time.monotonic() + seconds
        try:
            said = [process.communicate(timeout=max(0.1, end - time.monotonic()))[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, errors) for process, errors in zip(self.processes, said, strict=True)]

    def told(self, i: int, what: str) -> list[str]:
        lines = Path(f"{self.workdir}.told{i}").read_text().splitlines()
        return [line.removeprefix(f"{what} ") for line in lines if line.startswith(f"{what} ")]


def steps(workdir: Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending."""
    return sorted(int(p.name) for p in (workdir / "checkpoints" / "steps").glob("*") if p.name.isdigit())


def finished(group: Group) -> Group:
    for code, errors in group.end():
        assert code == 0, errors[-4000:]
    return group
