"""Starts of a run for `kills`, and the moments at which they are killed."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from etils import epath

from benchmarks.kills_phases import END, EVALUATE, FIRST, FROZEN, STEPS, Seen, lines_of, look, phase

ROOT = Path(__file__).parents[1]
SAVE = 4  # steps; evaluations between two saves are repeated after a kill
GIVE_UP = 3600  # seconds for one start
FLAGS = (
    f"--config.train.duration={STEPS} steps", f"--config.train.save_every={SAVE} steps", f"--config.train.eval_every={EVALUATE} steps",
    f"--config.train.eval_scores_every={EVALUATE} steps", "--config.train.best=loss", "--config.train.log_every=1 steps",
    "--config.train.keep=2", "--config.train.batch_size=8", "--config.optim.lr=0.02", "--config.optim.warmup=2 steps",
)  # fmt: skip


class Place(NamedTuple):
    """Where everything is."""

    out: Path  # logs and compiled programs
    runs: epath.Path  # data and runs
    data: list[str]  # flags that name the data
    processes: int


class Start:
    """One start of a run: all of its processes, each in a process group of its own."""

    def __init__(self, place: Place, workdir: epath.Path, log: Path):
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(place.out / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT),
            # These programs run for a moment: LLVM's optimisations would cost more than they save.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        }  # fmt: skip
        command = [sys.executable, "-m", "ymplug_jax.main", f"--workdir={workdir}", *place.data, *FLAGS]
        self._processes, self._logs = [], []
        for i in range(place.processes):
            many = [
                f"--coordinator=localhost:{port}",
                f"--processes={place.processes}",
                f"--process_id={i}",
                "--config.mesh.fsdp=2",
            ]
            self._logs.append(Path(f"{log}.{i}"))
            with self._logs[-1].open("w") as file:
                self._processes.append(subprocess.Popen(
                    [*command, *(many if place.processes > 1 else [])],
                    cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True,
                ))  # fmt: skip

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self._processes)

    def kill(self, order: random.Random) -> None:
        """Kill all processes, in random order and within a moment."""
        for process in order.sample(self._processes, len(self._processes)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def codes(self) -> list[int]:
        """Wait for all processes and return their exit codes."""
        deadline = time.monotonic() + GIVE_UP
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired:
            self.kill(random.Random(0))
            raise SystemExit(f"{self._logs[0]}: this start did not end within {GIVE_UP} s") from None

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self._logs)


class Clock:
    """The time line of a run without interruption, in which the moments of kills are drawn.

    Other programs on the machine make one start slower than another, so moments are told by what a start has written: some time
    after its n-th line of metrics.jsonl. Before the first line, the time is scaled by the duration of the latest start-up.
    """

    def __init__(self, poll: float):
        self.lines: list[float] = []  # seconds from the start to each line
        self.end = 0.0  # seconds from the start to the exit
        self._poll = poll
        self._slow = 1.0  # duration of the latest start-up over that of this time line

    def measure(self, start: Start, workdir: epath.Path, began: float) -> None:
        """Follow a start without interruption to its end."""
        self.lines = []
        while not start.ended():
            new = len(lines_of(workdir)) - len(self.lines)
            self.lines += [time.monotonic() - began] * new
            time.sleep(self._poll)
        self.end = time.monotonic() - began

    def wait(self, moment: float, start: Start, workdir: epath.Path, before: Seen, began: float) -> None:
        """Return at the moment (seconds on the time line), or when the start has ended."""
        earlier = [line for line in self.lines if line <= moment]
        seen = 0
        while seen < len(earlier) and not start.ended():
            new = len(lines_of(workdir)) - len(before.lines)
            if new and not seen:
                self._slow = (time.monotonic() - began) / self.lines[0]
            seen = new
            time.sleep(self._poll)
        self.pause(moment - earlier[-1] if earlier else moment * self._slow, start)

    def aim(self, what: str, least: int, start: Start, workdir: epath.Path, before: Seen) -> None:
        """Return when the start is seen in a phase after a step of at least `least`, or when it has ended."""
        while not start.ended():
            now = look(workdir)
            step = json.loads(now.lines[-1])["step"] if len(now.lines) > len(before.lines) else -1
            if phase(before, now) == what and (step >= least or what in (FROZEN, FIRST, END)):
                return
            time.sleep(self._poll)

    def pause(self, seconds: float, start: Start) -> None:
        deadline = time.monotonic() + seconds
        while not start.ended() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
