"""Kills training runs with SIGKILL at random moments, and proves that they end as if nothing had happened, to the bit.

    python -m benchmarks.kills --out runs/kills [--kills 100] [--task mplug2] [--processes 2] [--place gs://BUCKET/FOLDER]

A tiny run without interruption is the reference, and a second one the control. Then runs of the same command are started, killed
with all their processes, and started again until they end. A kill comes at a moment drawn uniformly over the time line of the control,
from its start to its exit; the share `--aimed` of the kills waits instead for something rare, such as the first save, and follows within
a tenth of a second. Afterwards all that a run leaves behind must equal the reference: parameters, optimizer state, carried state, data position, best
step, scores, lines of metrics.jsonl and files, see `kills_compare`. The last line is one JSON object; OUT/kills.jsonl has a line per
kill, and OUT/logs what each start said.

`--place` puts data and runs into a bucket, while logs and compiled programs stay in OUT. `--emulator` starts the storage server of the
tests as that bucket; with `--faults`, a proxy before it refuses, delays and cuts requests at random during the killed runs.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from benchmarks import kills_compare, kills_data
from benchmarks.kills_phases import (
    BEST,
    CHECK,
    END,
    EVALUATE,
    FIRST,
    FROZEN,
    PHASES,
    SAVING,
    STEPS,
    Seen,
    lines_of,
    look,
    phase,
)
from ymplug_jax.core import places
from ymplug_jax.core.text_table import columns

ROOT = Path(__file__).parents[1]
SAVE = 4  # steps; evaluations between two saves are repeated after a kill
GIVE_UP = 900  # seconds for one start
REFERENCE, CONTROL = "reference", "control"  # runs that are not killed
RETRY = 5  # exit code of a failed disk or bucket: start again
AIMS = (FROZEN, FIRST, SAVING, BEST, CHECK, END)
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
        self.pause((moment - (earlier[-1] if earlier else 0)) * self._slow, start)

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


class Killer:
    """Starts, kills and compares runs, and counts."""

    def __init__(self, place: Place, kills: int, seed: int, aimed: float, minutes: float = 1e6):
        self._place, self._seed, self._aimed = place, seed, aimed
        self._left, self._deadline = kills, time.monotonic() + 60 * minutes
        self._lock = threading.Lock()
        self.phases: Counter[str] = Counter()
        self.early: Counter[str] = Counter()  # before the first checkpoint
        self.restarts = 0  # after an error of the disk or bucket
        self.clock = Clock(0.5 if places.is_remote(place.runs) else 0.04)

    def kills(self) -> int:
        return sum(self.phases.values())

    def left(self) -> int:
        """Return the number of kills to do."""
        return self._left if time.monotonic() < self._deadline else 0

    def _take(self) -> bool:
        with self._lock:
            taken = self.left() > 0
            self._left -= taken
        return taken

    def run(self, name: str) -> kills_compare.Content:
        """Make one run, killed as long as kills are left unless it is the reference or the control, and return what it leaves behind."""
        workdir = self._place.runs / name / "run"  # a name of its own, since the model card repeats it
        order = random.Random(f"{self._seed} {name}")
        alone = name in (REFERENCE, CONTROL)
        for number in range(1000):
            before = look(workdir)
            began = time.monotonic()
            start = Start(self._place, workdir, self._place.out / "logs" / f"{name}_{number:03}")
            taken = not alone and self._take()
            if taken:
                self._wait(order, start, workdir, before, began)
                start.kill(order)
            elif alone:
                self.clock.measure(start, workdir, began)
            codes = start.codes()
            seconds = time.monotonic() - began
            killed = -signal.SIGKILL in codes
            with self._lock:
                self._left += taken and not killed
            if killed:
                self._count(name, number, seconds, before, look(workdir))
            elif not any(codes):
                return kills_compare.content(workdir)
            elif RETRY in codes:
                self.restarts += 1
            else:
                raise RuntimeError(f"run {name}, start {number}: exit codes {codes}\n{start.said()}")
        raise RuntimeError(f"run {name}: still not at its end after 1000 starts")

    def _wait(self, order: random.Random, start: Start, workdir: epath.Path, before: Seen, began: float) -> None:
        if order.random() < self._aimed:
            aim = order.choice(AIMS[2:] if before.steps else AIMS)
            self.clock.aim(aim, order.randrange(STEPS), start, workdir, before)
            self.clock.pause(order.uniform(0, 0.1), start)
        else:
            self.clock.wait(order.uniform(0, self.clock.end), start, workdir, before, began)

    def _count(self, name: str, number: int, seconds: float, before: Seen, after: Seen) -> None:
        what = phase(before, after)
        with self._lock:
            self.phases[what] += 1
            self.early[what] += not after.steps
        step = json.loads(after.lines[-1])["step"] if after.lines else None
        line = {
            "run": name,
            "start": number,
            "phase": what,
            "step": step,
            "checkpoints": sorted(after.steps),
            "seconds": round(seconds, 2),
        }
        with (self._place.out / "kills.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"kill {self.kills()}: {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder for logs, compiled programs and, without --place, runs"
    )
    parser.add_argument("--place", default="", help="folder for data and runs, local or gs://; default: OUT")
    parser.add_argument(
        "--emulator", action="store_true", help="a bucket on this machine instead of --place; needs the extra dev"
    )
    parser.add_argument("--faults", type=float, default=0.0, help="with --emulator: injected faults per second")
    parser.add_argument("--task", choices=sorted(kills_data.TASKS), default="pretrain", help="what is trained")
    parser.add_argument("--kills", type=int, default=100, help="kills in all runs together")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="processes of a run")
    parser.add_argument("--aimed", type=float, default=0.4, help="share of the kills that wait for something rare")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--streams", type=int, default=1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=1e6, help="kill nothing after this time, and let the runs end")
    parser.add_argument("--keep", action="store_true", help="keep the folders of equal runs")
    flags = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax
    out = flags.out.absolute()
    if out.exists():
        raise SystemExit(f"--out {out}: exists already; give a new folder")
    (out / "logs").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        if flags.emulator:
            from tests import buckets

            server = stack.enter_context(buckets.served("kills", faults=bool(flags.faults)))
            flags.place = "gs://kills/runs"
            if flags.faults:
                threading.Thread(target=disturb, args=(server, flags.seed, flags.faults), daemon=True).start()
        runs = places.place(flags.place, "--place") if flags.place else epath.Path(out)
        place = Place(out, runs, kills_data.make(flags.task, out / "made", runs / "data"), flags.processes)
        print(
            json.dumps(result(Killer(place, flags.kills, flags.seed, flags.aimed, flags.minutes), place, flags)),
            flush=True,
        )


def disturb(server: Any, seed: int, rate: float) -> None:
    """Inject faults for ever, that many per second; each hits the next request that it fits."""
    from tests import buckets

    order = random.Random(seed)
    while True:
        time.sleep(order.expovariate(rate))
        server.inject(buckets.Fault(order.choice(("503", "503 after", "429", "slow", "cut read", "cut write"))))


def result(killer: Killer, place: Place, flags: argparse.Namespace) -> dict[str, Any]:
    """Make all runs, print the table of phases and return the counts."""
    began = time.monotonic()
    want = killer.run(REFERENCE)
    # The first run compiled, so the second one sets the time line.
    problems = {CONTROL: kills_compare.differences(want, killer.run(CONTROL))}
    numbers = itertools.count()

    def stream() -> None:
        while killer.left() > 0:
            name = f"{next(numbers):03}"
            problems[name] = kills_compare.differences(want, killer.run(name))
            for line in problems[name]:
                print(f"run {name} differs: {line}", file=sys.stderr, flush=True)
            if not problems[name] and not flags.keep:
                (place.runs / name).rmtree()

    with ThreadPoolExecutor(flags.streams) as pool:
        for done in [pool.submit(stream) for _ in range(flags.streams)]:
            done.result()
    rows = [(name, str(killer.phases[name]), str(killer.early[name])) for name in PHASES]
    print(columns([("killed in", "kills", "before the first checkpoint"), *rows], right=2), file=sys.stderr)
    bad = {name: lines for name, lines in problems.items() if lines}
    return {
        "task": flags.task, "place": str(place.runs), "processes": place.processes, "seed": flags.seed, "kills": killer.kills(),
        "runs": len(problems) - 1, "equal": len(problems.keys() - bad.keys() - {CONTROL}), "control_equal": CONTROL not in bad,
        "unequal": dict(Counter(kind for lines in bad.values() for kind in {re.split(": ", line)[0] for line in lines})),
        "compared": len(want), "phases": dict(killer.phases), "before_first_checkpoint": sum(killer.early.values()),
        "restarts_after_errors": killer.restarts, "seconds_of_a_run": round(killer.clock.end, 1), "seconds": round(time.monotonic() - began),
    }  # fmt: skip


if __name__ == "__main__":
    main()
