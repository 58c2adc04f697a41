"""What a host must deliver to keep the chips of each slice busy: the table in docs/scale.md, "Feeding a pod".

    python -m benchmarks.feeding [--clip_us 4240] [--frame_kb 37] [--stored 16] [--write]

Steps and batches are those of SCALING.json. The costs of a clip are measured: `--clip_us` by `python -m benchmarks.loader` in
processor time; for shards of your own (`--path`) give what it prints. Machine types are those of Google Cloud with four chips, of
which slices of more than one host consist. `--write` puts the table into docs/scale.md.
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "SCALING.json", ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- feeding -->", "<!-- /feeding -->"
AHEAD = 9  # batches of a host in memory, loader and feed together, as measured with a slow step
FAMILIES = {"mplug2": "mplug2", "pretrain": "mplug_video", "slices": "mplug_video", "tune": "mplug_video"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A host of a TPU slice."""

    name: str
    chips: int
    cores: int  # half of its virtual CPUs, which are two to a core
    memory: int  # GB


MACHINES = {
    "v5e": Machine("ct5lp-hightpu-4t", 4, 56, 192),
    "v5p": Machine("ct5p-hightpu-4t", 4, 104, 448),
    "v6e": Machine("ct6e-standard-4t", 4, 90, 720),
}


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a clip. All but the first are independent of the number of frames that a task uses."""

    frame_us: float = 1060.0  # one core: decode and augment a frame, its share of reading and batching
    bucket_us: float = 830.0  # one core: TensorStore reads a record of 590 KB from a bucket
    frame_bytes: float = 37_000.0  # a stored JPEG
    stored: int = 16  # frames of a record

    def core_seconds(self, frames: int) -> float:
        """Processor time of a clip that is read from a bucket."""
        return (frames * self.frame_us + self.bucket_us) / 1e6


@dataclasses.dataclass(frozen=True)
class Need:
    """What a layout needs to keep its chips busy, by its roofline (the fastest that a step can be)."""

    name: str
    machine: Machine
    hosts: int
    frames: int  # of a clip, used
    clips: float  # a second and host
    clips_by_compiler: float  # a second and host, at the compiler's step time
    batch: int  # rows a host
    side: int  # of a frame, pixels

    def cores(self, costs: Costs) -> float:
        return self.clips * costs.core_seconds(self.frames)

    def row(self, costs: Costs) -> str:
        """A line of the table."""
        record = costs.stored * costs.frame_bytes
        whole, chosen = (self.clips * self.hosts * size / 1e9 for size in (record, self.frames * costs.frame_bytes))
        requests = self.clips * self.hosts
        memory = AHEAD * self.batch * self.frames * self.side**2 * 3 / 1e9
        return (
            f"| `{self.name}` | {self.hosts} | {self.frames} | {self.clips:,.0f} / {self.clips_by_compiler:,.0f} "
            f"| {self.cores(costs):.1f} of {self.machine.cores} | {memory:.1f} of {self.machine.memory} GB "
            f"| {self.clips * record / 1e6:,.0f} MB/s | {whole:.1f} GB/s, {requests:,.0f}/s "
            f"| {chosen:.1f} GB/s, {self.frames * requests:,.0f}/s |"
        )


def need(job: dict[str, Any]) -> Need:
    """Needs of a row of SCALING.json."""
    facts = job["facts"]
    family = next(FAMILIES[table] for table in job["tables"] if table in FAMILIES)
    config = importlib.import_module(f"configs.{family}.{job['task']}").get_config(job["config"])
    machine = MACHINES[job["topology"].partition(":")[0]]
    hosts, batch = facts["devices"] // machine.chips, facts["batch_size"]
    name = f"{'' if family == 'mplug_video' else family + '/'}{job['task']}.py:{job['config']}"
    return Need(
        name + (f" x {job['slices']}" if job["slices"] > 1 else ""),
        machine,
        hosts,
        config.data.frames,
        batch / facts["predicted_step_seconds"] / hosts,
        batch / facts["compiler_step_seconds"] / hosts,
        -(-batch // hosts),
        config.data.image_size,
    )


def needs(results: dict[str, dict[str, Any]]) -> list[Need]:
    """Needs of all pre-training layouts, and of the fine-tuning task that keeps the hosts of a slice busiest."""
    found, hungriest = [], dict[str, Need]()
    for job in results.values():
        if not job["facts"]["fits"] or not any(table in FAMILIES for table in job["tables"]):
            continue
        one = need(job)
        if "tune" not in job["tables"]:
            found.append(one)
            continue
        slice_name = job["config"].partition("@")[2]
        known = hungriest.get(slice_name)
        if known is None or one.clips * one.frames > known.clips * known.frames:
            hungriest[slice_name] = one
    return [*found, *hungriest.values()]


def table(results: dict[str, dict[str, Any]], costs: Costs) -> str:
    """The table of docs/scale.md."""
    head = (
        "| config | hosts | frames used | clips/s a host, roofline / compiler | cores a host, busy | prefetch a host "
        "| read a host | whole records, requests, all hosts | chosen frames only |"
    )
    return "\n".join([head, "|---" * 9 + "|", *(one.row(costs) for one in needs(results))])


def main() -> None:
    """Print the table, or write it into the page."""
    defaults = Costs()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feeding", description=__doc__.splitlines()[0])
    parser.add_argument("--clip_us", type=float, default=4 * defaults.frame_us, help="processor time of 4 frames, µs")
    parser.add_argument("--frame_kb", type=float, default=defaults.frame_bytes / 1e3, help="size of a stored JPEG, KB")
    parser.add_argument("--stored", type=int, default=defaults.stored, help="stored frames a record")
    parser.add_argument("--write", action="store_true", help="write the table into docs/scale.md")
    args = parser.parse_args()
    costs = Costs(frame_us=args.clip_us / 4, frame_bytes=1e3 * args.frame_kb, stored=args.stored)
    made = table(json.loads(DATA.read_text(encoding="utf-8")), costs)
    if args.write:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, tail = rest.partition(END)
        PAGE.write_text(f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
