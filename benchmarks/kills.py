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
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from benchmarks import kills_compare, kills_data
from benchmarks.kills_phases import BEST, CHECK, END, FIRST, FROZEN, PHASES, SAVING, STEPS, Seen, look, phase
from benchmarks.kills_starts import Clock, Place, Start
from ymplug_jax.core import places
from ymplug_jax.core.text_table import columns

REFERENCE, CONTROL = "reference", "control"  # runs that are not killed
RETRY = 5  # exit code of a failed disk or bucket: start again
AIMS = (FROZEN, FIRST, SAVING, BEST, CHECK, END)


class Killer:
    """Starts, kills and compares runs. OUT/kills.jsonl and OUT/runs.jsonl keep what was done, so the program itself may be killed."""

    def __init__(self, place: Place, kills: int, seed: int, aimed: float, minutes: float = 1e6):
        self._place, self._seed, self._aimed = place, seed, aimed
        self._left, self._deadline = kills - len(self.kills()), time.monotonic() + 60 * minutes
        self._lock = threading.Lock()
        self.clock = Clock(0.5 if places.is_remote(place.runs) else 0.04)

    def kills(self) -> list[dict[str, Any]]:
        """Return the kills so far, one dict each."""
        return read(self._place.out / "kills.jsonl")

    def left(self) -> int:
        """Return the number of kills to do."""
        return self._left if time.monotonic() < self._deadline else 0

    def _take(self) -> bool:
        with self._lock:
            taken = self.left() > 0
            self._left -= taken
        return taken

    def undisturbed(self) -> tuple[kills_compare.Content, list[str]]:
        """Make the reference and the control, or read those of an earlier call.

        Returns:
          (what the reference leaves behind, what the control leaves behind in another way).
        """
        file = self._place.out / "clock.json"
        if not file.exists():
            for name in (REFERENCE, CONTROL):  # the first one compiles, so the second one sets the time line
                self.run(name)
            file.write_text(json.dumps({"lines": self.clock.lines, "end": self.clock.end}))
        self.clock.lines, self.clock.end = json.loads(file.read_text()).values()
        want, same = (kills_compare.content(self._place.runs / name / "run") for name in (REFERENCE, CONTROL))
        return want, kills_compare.differences(want, same)

    def run(self, name: str) -> kills_compare.Content:
        """Make or go on with a run, killed as long as kills are left, but not the reference and the control.

        Returns:
          What it leaves behind.
        """
        workdir = self._place.runs / name / "run"  # a name of its own, since the model card repeats it
        first = len(list((self._place.out / "logs").glob(f"{name}_*.0")))
        for number in range(first, first + 1000):
            order = random.Random(f"{self._seed} {name} {number}")
            before = look(workdir)
            began = time.monotonic()
            start = Start(self._place, workdir, self._place.out / "logs" / f"{name}_{number:03}")
            taken = name not in (REFERENCE, CONTROL) and self._take()
            if taken:
                self._wait(order, start, workdir, before, began)
                start.kill(order)
            elif name in (REFERENCE, CONTROL):
                self.clock.measure(start, workdir, began)
            codes = start.codes()
            killed = -signal.SIGKILL in codes
            with self._lock:
                self._left += taken and not killed
            if killed:
                self._count(name, number, time.monotonic() - began, before, look(workdir))
            elif not any(codes):
                return kills_compare.content(workdir)
            elif RETRY not in codes:
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
        step = json.loads(after.lines[-1])["step"] if after.lines else None
        line = {
            "run": name,
            "start": number,
            "phase": phase(before, after),
            "step": step,
            "checkpoints": sorted(after.steps),
        }
        line["seconds"] = round(seconds, 2)
        with self._lock:
            write(self._place.out / "kills.jsonl", line)
        print(line, file=sys.stderr, flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write(file: Path, line: dict[str, Any]) -> None:
    """Append a JSON line."""
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for logs, compiled programs and, without --place, runs; the same command goes on",
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
    if out.exists() and flags.emulator:
        raise SystemExit(
            f"--out {out}: exists, but the bucket of --emulator does not outlive this program; give a new folder"
        )
    (out / "logs").mkdir(parents=True, exist_ok=True)
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
    want, control = killer.undisturbed()
    ended = {line["run"] for line in read(place.out / "runs.jsonl")}
    begun = {line["run"] for line in killer.kills()} - ended
    fresh = (name for i in itertools.count() if (name := f"{i:03}") not in ended | begun)
    names = itertools.chain(sorted(begun), fresh)

    def stream() -> None:
        while begun or killer.left() > 0:
            name = next(names)
            begun.discard(name)
            found = kills_compare.differences(want, killer.run(name))
            write(place.out / "runs.jsonl", {"run": name, "differences": found})
            print(f"run {name} differs: {found}" if found else f"run {name} is equal", file=sys.stderr, flush=True)
            if not found and not flags.keep:
                (place.runs / name).rmtree()

    with ThreadPoolExecutor(flags.streams) as pool:
        for done in [pool.submit(stream) for _ in range(flags.streams)]:
            done.result()
    runs, kills = read(place.out / "runs.jsonl"), killer.kills()
    phases, early = (
        Counter(kill["phase"] for kill in some) for some in (kills, [k for k in kills if not k["checkpoints"]])
    )
    rows = [(name, str(phases[name]), str(early[name])) for name in PHASES]
    print(columns([("killed in", "kills", "before the first checkpoint"), *rows], right=2), file=sys.stderr)
    bad = [{line.partition(": ")[0] for line in run["differences"]} for run in runs if run["differences"]]
    starts = len(list((place.out / "logs").glob("[0-9]*_*.0")))
    return {
        "task": flags.task, "place": str(place.runs), "processes": place.processes, "seed": flags.seed, "kills": len(kills),
        "runs": len(runs), "equal": len(runs) - len(bad), "control_equal": not control,
        "unequal": dict(Counter(kind for kinds in bad for kind in kinds)), "compared": len(want), "phases": dict(phases),
        "before_first_checkpoint": sum(early.values()), "restarts_after_errors": starts - len(kills) - len(runs),
        "seconds_of_a_run": round(killer.clock.end, 1), "seconds_of_killed_starts": round(sum(kill["seconds"] for kill in kills)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
