"""Kills training runs with SIGKILL at random moments, and proves that they end as if nothing had happened, to the bit.

    python -m benchmarks.kills --out runs/kills [--kills 100] [--task mplug2] [--processes 2] [--place gs://BUCKET/FOLDER]

A tiny run without interruption is the reference, and a second one the control. Then runs of the same command are started, killed
with all their processes, and started again until they end. A kill comes at a moment drawn uniformly over the time of a whole run,
from its start to its exit; the share `--aimed` of the kills waits instead for something rare, such as the first save, and follows within
a tenth of a second. Afterwards all that a run leaves behind must equal the reference: parameters, optimizer state, carried state, data position, best
step, scores, lines of metrics.jsonl and files, see `kills_compare`. The last line is one JSON object; OUT/kills.jsonl has a line per
kill, and OUT/logs what each start said.

`--place` puts data and runs into a bucket, while logs and compiled programs stay in OUT. `--emulator` starts the storage server of the
tests as that bucket; with `--faults`, a proxy before it refuses, delays and cuts requests at random during the killed runs.
"""

import argparse
import contextlib
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
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from benchmarks import kills_compare, kills_data
from ymplug_jax.core import places
from ymplug_jax.core.text_table import columns

ROOT = Path(__file__).parents[1]
STEPS, SAVE, EVALUATE = 24, 4, 2  # evaluations between two saves are repeated after a kill
GIVE_UP = 900  # seconds for one start
RETRY = 5  # exit code of a failed disk or bucket: start again
SAVING, FIRST, BEST, FROZEN = "a save", "the first save", "a write of best/", "the write of frozen parameters"
START, TRAIN, CHECK, END = "start-up", "a training step", "an evaluation", "the end, after the last evaluation"
PHASES = (START, FROZEN, TRAIN, CHECK, FIRST, SAVING, BEST, END)
AIMS = (FROZEN, FIRST, SAVING, BEST, CHECK, END)
FLAGS = (
    f"--config.train.duration={STEPS} steps", f"--config.train.save_every={SAVE} steps", f"--config.train.eval_every={EVALUATE} steps",
    f"--config.train.eval_scores_every={EVALUATE} steps", "--config.train.best=loss", "--config.train.log_every=1 steps",
    "--config.train.keep=2", "--config.train.batch_size=8", "--config.optim.lr=0.02", "--config.optim.warmup=2 steps",
)  # fmt: skip


class Seen(NamedTuple):
    """A run's folder at one moment."""

    unfinished: dict[str, set[Any]]  # kind of write -> its temporary folders
    steps: set[int]  # complete checkpoints
    best: tuple[list[int], int | None]  # steps in best/, and the step that best.json names
    lines: list[str]  # of metrics.jsonl


class Place(NamedTuple):
    """Where everything is."""

    out: Path  # logs and compiled programs
    runs: epath.Path  # data and runs
    data: list[str]  # flags that name the data
    processes: int


def look(workdir: epath.Path) -> Seen:
    """Describe the folder, without changing it."""
    checkpoints = {"": workdir / "checkpoints", BEST: workdir / "best" / "checkpoints"}
    unfinished = {
        SAVING: _unfinished(checkpoints[""] / "steps"),
        BEST: _unfinished(checkpoints[BEST] / "steps"),
        FROZEN: _unfinished(checkpoints[""]),
    }
    steps, in_best = (sorted(_complete(folder / "steps")) for folder in checkpoints.values())
    note = None
    with contextlib.suppress(OSError, ValueError):
        note = json.loads((workdir / "best" / "best.json").read_text())["step"]
    file = workdir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return Seen(unfinished, set(steps), (in_best, note), lines)


def _entries(folder: epath.Path) -> list[epath.Path]:
    try:
        return [*folder.iterdir()] if folder.exists() else []
    except FileNotFoundError:
        return []


def _committed(folder: epath.Path) -> bool:
    """Whether Orbax has finished a folder: it renames local folders, and marks those in a bucket."""
    if "://" in str(folder):
        return (folder / "commit_success.txt").exists()
    return "tmp" not in folder.name


def _complete(folder: epath.Path) -> list[int]:
    return [int(entry.name) for entry in _entries(folder) if entry.name.isdigit() and _committed(entry)]


def _unfinished(folder: epath.Path) -> set[Any]:
    """Temporary folders of saves, with what distinguishes those of two starts."""
    found = set()
    for entry in _entries(folder):
        if (
            entry.name == "steps"
            or _committed(entry)
            or (entry.name != "frozen" and not entry.name[:1].isdigit() and "tmp" not in entry.name)
        ):
            continue
        with contextlib.suppress(OSError):
            if "://" in str(entry):
                found.add((entry.name, len(_entries(entry))))
            else:
                found.add((entry.name, Path(entry).stat().st_ino, Path(entry).stat().st_mtime_ns))
    return found


def phase(before: Seen, after: Seen) -> str:
    """What a start was doing when it was killed, from the run's folder before the start and after the kill."""
    new = {kind for kind, folders in after.unfinished.items() if folders - before.unfinished[kind]}
    in_best, note = after.best
    if BEST in new or (after.best != before.best and in_best != [note]):
        return BEST
    if SAVING in new:
        return SAVING if after.steps else FIRST
    if FROZEN in new:
        return FROZEN
    if len(after.lines) == len(before.lines):
        return START
    line = json.loads(after.lines[-1])
    evaluated = any(key.startswith("eval/") for key in line)
    if line["step"] == STEPS and evaluated:
        return END
    due = line["step"] % EVALUATE == 0 or line["step"] == STEPS
    return CHECK if due and not evaluated else TRAIN


class Start:
    """One start of a run: all of its processes, each in a process group of its own."""

    def __init__(self, place: Place, workdir: epath.Path, log: Path):
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(place.out / "compiled"),
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


def wait(start: Start, workdir: epath.Path, before: Seen, aim: tuple[str, int] | None, seconds: float) -> None:
    """Return when it is time to kill, or when the start has ended.

    Args:
      start: the start to watch.
      workdir: folder of the run.
      before: the folder before the start.
      aim: (phase to wait for, first step from which it counts); None: only the time counts.
      seconds: time to wait from now, without an aim, or from the moment that the phase is seen.
    """
    while aim and not start.ended():
        now = look(workdir)
        far = json.loads(now.lines[-1])["step"] if len(now.lines) > len(before.lines) else -1
        if phase(before, now) == aim[0] and (far >= aim[1] or aim[0] in (FROZEN, FIRST, END)):
            break
        time.sleep(0.002)
    deadline = time.monotonic() + seconds
    while not start.ended() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


class Killer:
    """Starts, kills and compares runs, and counts."""

    def __init__(self, place: Place, seed: int, aimed: float):
        self._place, self._random, self._aimed = place, random.Random(seed), aimed
        self.phases: Counter[str] = Counter()
        self.early: Counter[str] = Counter()  # before the first checkpoint
        self.unequal: list[str] = []
        self.restarts = 0  # after an error of the disk or bucket
        self.lifetime = 0.0  # seconds of a run without interruption

    def kills(self) -> int:
        return sum(self.phases.values())

    def run(self, name: str, most: int) -> kills_compare.Content:
        """Make one run with at most that many kills, and return what it leaves behind."""
        workdir = self._place.runs / name / "run"  # a name of its own, since the model card repeats it
        for number in range(1000):
            before = look(workdir)
            began = time.monotonic()
            start = Start(self._place, workdir, self._place.out / "logs" / f"{name}_{number:03}")
            if most > 0:
                self._wait(start, workdir, before)
                start.kill(self._random)
            codes = start.codes()
            seconds = time.monotonic() - began
            if -signal.SIGKILL in codes:
                most -= 1
                self._count(name, number, seconds, before, look(workdir))
            elif not any(codes):
                self.lifetime = self.lifetime or seconds
                return kills_compare.content(workdir)
            elif RETRY in codes:
                self.restarts += 1
            else:
                raise SystemExit(f"run {name}, start {number}: exit codes {codes}\n{start.said()}")
        raise SystemExit(f"run {name}: still not at its end after 1000 starts")

    def _wait(self, start: Start, workdir: epath.Path, before: Seen) -> None:
        aim = None
        if self._random.random() < self._aimed:
            aim = self._random.choice(AIMS), self._random.randrange(STEPS)
        wait(start, workdir, before, aim, self._random.uniform(0, 0.1 if aim else self.lifetime))

    def _count(self, name: str, number: int, seconds: float, before: Seen, after: Seen) -> None:
        what = phase(before, after)
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
        print(json.dumps(result(Killer(place, flags.seed, flags.aimed), place, flags)), flush=True)


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
    want = killer.run("reference", 0)
    killer.lifetime = 0.0  # that run compiled
    problems = {"control": kills_compare.differences(want, killer.run("control", 0))}
    number = 0
    while killer.kills() < flags.kills:
        name = f"{number:03}"
        problems[name] = kills_compare.differences(want, killer.run(name, flags.kills - killer.kills()))
        for line in problems[name]:
            print(f"run {name} differs: {line}", file=sys.stderr, flush=True)
        if not problems[name] and not flags.keep:
            (place.runs / name).rmtree()
        number += 1
    rows = [(name, str(killer.phases[name]), str(killer.early[name])) for name in PHASES]
    print(columns([("killed in", "kills", "before the first checkpoint"), *rows], right=2), file=sys.stderr)
    bad = {name: lines for name, lines in problems.items() if lines}
    return {
        "task": flags.task, "place": str(place.runs), "processes": place.processes, "seed": flags.seed, "kills": killer.kills(),
        "runs": number, "equal": number - len(bad.keys() - {"control"}), "control_equal": "control" not in bad,
        "unequal": dict(Counter(kind for lines in bad.values() for kind in {re.split(": ", line)[0] for line in lines})),
        "compared": len(want), "phases": dict(killer.phases), "before_first_checkpoint": sum(killer.early.values()),
        "restarts_after_errors": killer.restarts, "seconds_of_a_run": round(killer.lifetime, 1), "seconds": round(time.monotonic() - began),
    }  # fmt: skip


if __name__ == "__main__":
    main()
