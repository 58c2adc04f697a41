"""SCALING.md: every real configuration compiled ahead of time for every slice by `--mode compile`.

    python -m benchmarks.scaling [--only v5e ...] [--missing] [--stale]     # needs the extra `tpu`; a minute or more per row
    python -m benchmarks.scaling --draw                                     # only draws SCALING.md and its chart

SCALING.json keeps the results, so that single rows can be compiled again; SCALING.md is drawn from all of them. After a change of
the models, `--stale` marks every row as outdated. Compiling a row again removes its mark, and `--missing` includes marked rows.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import chart
from configs.mplug2 import slices as mplug2
from configs.mplug_chat import slices as chat
from configs.mplug_video.slices import SLICES

ROOT = Path(__file__).parents[1]
DATA = ROOT / "SCALING.json"
CHART = ROOT / "docs" / "images" / "scaling.svg"
HEAD = """# Scale

No figure here was measured: nothing was run on a TPU. All are computed from the compiled training step, by a roofline model and by the compiler's own estimate.
Real steps are slower than the roofline, so the compiler's column is the more cautious one. Use the tables to compare layouts.

"""
METHOD = """![MFU of pre-training on each slice](docs/images/scaling.svg)

## How the figures are made

`python -m benchmarks.scaling` runs `python -m ymplug_jax.main --config CONFIG --mode compile --topology SLICE` for every row: libtpu compiles the training
step without a TPU.

- Memory is the compiler's figure.
- FLOPs are counted in the traced program. Bytes are read from the compiled program, loops counted as often as they run.
- The roofline time adds three parts without overlap: matrix products (the longer of arithmetic at peak and their memory traffic), memory traffic of everything
  else, and transfers over links and network.
- The compiler's step is the sum of the cycles that libtpu estimates for every instruction, at the chip's clock. For this project's kernels, for which libtpu has
  no estimate, their memory traffic is added. Where that is less than the roofline, because attention kernels do much of the arithmetic, there is no estimate.
- MFU counts neither recomputation nor gradients of frozen weights.

"""


# Stages of the chat model, the trained partition and the slice.
CHAT = tuple(
    (task, config, name)
    for name in ("v5p-4", "v5e-16")
    for task, config in (("pretrain", "7b-adapters_abstractor"), ("instruct", "7b-lora"))
)
# Runs of mPLUG-2: the task's config, the size and the slice.
MPLUG2 = (("pretrain", "youku-b16", "v5e-16"), ("pretrain", "youku-l14", "v5e-16"), ("caption", "large", "v5e-16"))
# Rows that one chip answers together, with int8 weights: prompts of PROMPT tokens with a clip each, and NEW new tokens.
ANSWERED, PROMPT, NEW = (1, 4), 1984, 64
FAMILIES = {"chat": "mplug_chat", "answers": "mplug_chat", "mplug2": "mplug2"}  # table -> folder of its configs
ANSWER_FLAGS = (
    "--program=predict",
    "--config.train.frozen_dtype=int8",
    f"--config.data.max_tokens={PROMPT}",
    f"--config.options.new_tokens={NEW}",
    "--config.options.choices=0",
    "--config.options.images_per_row=0",
    "--config.options.videos_per_row=1",
)


def jobs() -> list[dict]:
    """Rows: pre-training and fine-tuning on every slice, weak scaling from 16 to 256 chips, two slices over the network, chat, mPLUG-2."""
    rows = []
    for task in ("pretrain", "classify", "caption", "retrieve", "match"):
        for size in ("1.3b", "2.7b"):
            for name, layout in SLICES.items():
                if layout.frozen_dtype == "int8" and task != "pretrain":
                    continue  # fine-tuning fits without int8 at the recipe's batch size
                tables = ["pretrain" if task == "pretrain" else "tune"]
                if task == "pretrain" and size == "1.3b" and name.startswith("v5p"):
                    tables.append("weak")
                rows.append(_job(tables, task, f"{size}@{name}", layout.topology))
    few = [f"--config.train.batch_size={16 * SLICES['v5p-64'].batch['1.3b']}"]
    rows.append(_job(["weak"], "pretrain", "1.3b@v5p-64", "v5p:2x2x4", more=few))
    for name in ("v5e-64", "v5p-64"):
        more = [f"--config.train.batch_size={2 * SLICES[name].chips * SLICES[name].batch['1.3b']}"]
        rows.append(_job(["slices"], "pretrain", f"1.3b@{name}", SLICES[name].topology, slices=2, more=more))
    rows += [_job(["chat"], task, f"{config}@{name}", chat.SLICES[name].topology) for task, config, name in CHAT]
    rows += [_job(["mplug2"], task, f"{size}@{name}", mplug2.SLICES[name].topology) for task, size, name in MPLUG2]
    for count in ANSWERED:
        more = [*ANSWER_FLAGS, f"--config.train.batch_size={count}"]
        rows.append(_job(["answers"], "instruct", f"7b-lora, {count} rows", "v5e:1x1", more=more))
    return sorted(rows, key=lambda job: job["tables"] == ["tune"])  # pre-training first


def _job(
    tables: list[str], task: str, config: str, topology: str, slices: int = 1, more: Sequence[str] = ()
) -> dict[str, Any]:
    return {"tables": tables, "task": task, "config": config, "topology": topology, "slices": slices, "more": [*more]}


def key(job: dict) -> str:
    return f"{job['task']} {job['config']} {job['topology']} x{job['slices']}"


def measure(job: dict) -> dict:
    """What the command prints for one row."""
    command = [sys.executable, "-m", "ymplug_jax.main", "--mode", "compile", "--topology", job["topology"]]
    family = next((FAMILIES[table] for table in job["tables"] if table in FAMILIES), "mplug_video")
    config = job["config"].partition(",")[0] if "answers" in job["tables"] else job["config"]
    command += ["--config", f"configs/{family}/{job['task']}.py:{config}", "--slices", str(job["slices"])]
    done = subprocess.run([*command, *job["more"]], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    print(key(job), flush=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    facts.pop("compiler_costs", None)  # long, and not in the tables
    return job | {"facts": facts}


def row(job: dict) -> str:
    """One line of a table."""
    facts = job["facts"]
    place = f"{job['slices']} x {job['topology']}" if job["slices"] > 1 else job["topology"]
    mark = " †" if job.get("old") else ""
    head = f"| `{job['task']}.py:{job['config']}`{mark} | {place} | {facts['devices']} | {facts['batch_size'] // facts['devices']} "
    if not facts["fits"]:
        return head + "| does not fit | | | | | | |"
    gib = 2**30
    sent = ", ".join(
        f"{kind} {axis} {size / 2**20:.0f} MiB"
        for kind, axes in facts["collectives"].items()
        for axis, size in axes.items()
        if size > 2**19
    )
    seconds = facts["seconds"]
    parts = " + ".join(f"{1e3 * seconds[name]:.0f}" for name in ("products", "memory", "links", "network"))
    flops = f"{facts['model_flops_per_device'] / 1e12:.1f} / {facts['program_flops_per_device'] / 1e12:.1f}"
    return head + (
        f"| {facts['hbm_bytes_per_device'] / gib:.1f} of {facts['hbm_capacity'] / gib:.1f} GiB | {sent} | {flops} "
        f"| {parts} = {1e3 * seconds['step']:.0f} ms | {100 * facts['predicted_mfu']:.0f} % "
        f"| {facts['predicted_samples_per_second']:,.0f} "
        f"| {compiler_estimate(facts)} |"
    )


def compiler_estimate(facts: dict) -> str:
    """The compiler's step and MFU; nothing if it is below the roofline, because most of the arithmetic is in kernels."""
    if facts["compiler_step_seconds"] < facts["predicted_step_seconds"]:
        return "no estimate"
    return f"{1e3 * facts['compiler_step_seconds']:.0f} ms, {100 * facts['compiler_mfu']:.0f} %"


def answer_row(job: dict) -> str:
    """One line of the table of answers."""
    facts, gib = job["facts"], 2**30
    parts = ", ".join(f"{name} {size / gib:.1f}" for name, size in facts["hbm"].items() if size > gib / 20)
    memory = f"{facts['hbm_bytes_per_device'] / gib:.1f} of {facts['hbm_capacity'] / gib:.1f} GiB ({parts})"
    name = f"`{job['task']}.py:{job['config'].partition(',')[0]}`" + (" †" if job.get("old") else "")
    return f"| {name} | {job['topology']} | {facts['batch_size']} | {memory if facts['fits'] else 'does not fit'} |"


def headline(results: dict[str, dict]) -> str:
    """Table of pre-training, one row for each config and slice."""
    lines = [
        "| pre-training | chips | global batch | memory per chip | samples/s, roofline | MFU, roofline | MFU, compiler |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in _known(results, "pretrain"):
        facts, gib = job["facts"], 2**30
        if not facts["fits"]:
            continue
        lines.append(
            f"| `{job['config']}` | {facts['devices']} | {facts['batch_size']:,} "
            f"| {facts['hbm_bytes_per_device'] / gib:.1f} of {facts['hbm_capacity'] / gib:.1f} GiB "
            f"| {facts['predicted_samples_per_second']:,.0f} | {100 * facts['predicted_mfu']:.0f} % "
            f"| {100 * facts['compiler_mfu']:.0f} % |"
        )
    return "\n".join(lines) + "\n\n"


def picture(results: dict[str, dict]) -> str:
    """Chart of the compiler's MFU for pre-training."""
    rows = [
        chart.Bar(job["config"], 100 * job["facts"]["compiler_mfu"], f"{100 * job['facts']['compiler_mfu']:.0f} %")
        for job in _known(results, "pretrain")
        if job["facts"]["fits"]
    ]
    note = "Model FLOPs utilisation in percent as libtpu estimates it for the compiled step; not run"
    return chart.bars("Pre-training of mPLUG-video on TPU slices", note, rows)


def _known(results: dict[str, dict], table: str) -> list[dict]:
    return [results[key(job)] for job in jobs() if table in job["tables"] and key(job) in results]


def draw(results: dict[str, dict]) -> str:
    """The whole page."""
    columns = (
        "| config | slice | chips | examples per chip | memory per chip | collectives per chip and step "
        "| TFLOP per chip, model / program | products + memory + links + network | MFU | samples/s "
        "| compiler's step, MFU |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    text = HEAD + headline(results) + METHOD
    for table, title in (
        ("pretrain", "Pre-training of mPLUG-video with the layouts of `configs/mplug_video/slices.py`"),
        ("tune", "Fine-tuning with the recipe's batches; matching on 16 chips of v5e with half of them"),
        ("weak", "Weak scaling: the same work per chip"),
        ("slices", "Two slices, gradients summed over the network between them"),
        ("mplug2", "mPLUG-2 with the layouts of `configs/mplug2/slices.py`"),
        (
            "chat",
            "Chat model with BLOOMZ-7B1, rows of 2,048 tokens, with the layouts of `configs/mplug_chat/slices.py`",
        ),
    ):
        known = _known(results, table)
        lines = [row(job) for job in sorted(known, key=lambda job: job["facts"]["devices"] if table == "weak" else 0)]
        if lines:
            text += f"## {title}\n\n{columns}" + "\n".join(lines) + "\n\n"
    if known := _known(results, "answers"):
        text += (
            "## Answers of the chat model on one chip\n\n"
            f"The language model is in int8. Each row is a prompt of {PROMPT:,} tokens with a clip, and its answer has {NEW} tokens.\n\n"
            "| config | slice | rows together | memory |\n|---|---|---|---|\n"
        )
        text += "\n".join(map(answer_row, known)) + "\n\n"
    if missing := sum(key(job) not in results for job in jobs()):
        text += (
            f"{missing} of {len(jobs())} rows are missing; `python -m benchmarks.scaling --missing` compiles them.\n"
        )
    if any(job.get("old") for job in results.values()):
        text += "† compiled before the models last changed; `python -m benchmarks.scaling --missing` compiles these rows again.\n"
    return text.rstrip() + "\n"


def main() -> None:
    """Compile the rows whose name contains --only and draw the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="compile the rows whose name contains all of these")
    parser.add_argument(
        "--missing", action="store_true", help="compile only rows that are missing or marked as outdated"
    )
    parser.add_argument("--stale", action="store_true", help="first mark all rows as outdated")
    parser.add_argument("--draw", action="store_true", help="compile nothing, draw page and chart")
    args = parser.parse_args()
    results = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    wanted = [] if args.draw else [job for job in jobs() if all(word in key(job) for word in args.only)]
    if args.stale:
        results = {name: job | {"old": True} for name, job in results.items()}
        DATA.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.missing:
        wanted = [job for job in wanted if results.get(key(job), {"old": True}).get("old")]
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(measure, wanted):
            results[key(made)] = made
            DATA.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    CHART.write_text(picture(results), encoding="utf-8")
    (ROOT / "SCALING.md").write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
