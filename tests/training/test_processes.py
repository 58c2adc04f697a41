"""Runs of four local processes: the losses equal those of one process, and only process 0 writes files."""

import json
from pathlib import Path

import numpy as np
import pytest

import runs
import shards
from together import Group, finished

pytestmark = pytest.mark.slow

STEPS = 24
SETTINGS = [f"--config.train.duration={STEPS} steps", "--config.train.save_every=12 steps", "--config.mesh.fsdp=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data for one epoch of 40 steps, so that no record is read twice in a run."""
    folder = tmp_path_factory.mktemp("processes")
    shards.write(folder / "data", (200, 120))
    shards.write(folder / "data", (9,), split="validation", first=500)
    shards.tokenizer(folder / "t.model")
    return folder


@pytest.fixture(scope="module")
def flags(place: Path) -> list[str]:
    data = [f"--config.data.path={place / 'data'}", f"--config.data.tokenizer={place / 't.model'}"]
    return ["--config=configs/tiny/pretrain.py", *data, *runs.SMALL, *SETTINGS]


@pytest.fixture(scope="module")
def one(place: Path, flags: list[str]) -> Group:
    return finished(Group(place / "one", flags, 1, devices=2))


@pytest.fixture(scope="module")
def several(place: Path, flags: list[str]) -> Group:
    """Four SLURM tasks, which find the coordinator from SLURM's variables. Other tests start processes with flags."""
    return finished(Group(place / "four", flags, 4, slurm=True))


def test_losses_and_parameters_are_those_of_one_process(one: Group, several: Group):
    def lines(group: Group, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in runs.metrics.read_metrics(group.workdir) if name in line}

    for name in ("loss", "eval/loss", "grad_norm"):
        want, got = lines(one, name), lines(several, name)
        assert sorted(want) == sorted(got) and want
        np.testing.assert_allclose(
            [got[step] for step in want], [want[step] for step in want], rtol=1e-3 if name == "grad_norm" else 5e-5
        )
    want, got = runs.saved(one.workdir), runs.saved(several.workdir)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=2e-3, err_msg=path)
    facts = json.loads((several.workdir / "environment.json").read_text())
    assert facts["processes"] == len(several.processes)


def test_every_process_reads_its_own_rows(one: Group, several: Group):
    def read(group: Group, i: int, split: str) -> list[str]:
        return [line for line in group.told(i, "read") if line.startswith(split)]

    count = len(several.processes)
    parts = [read(several, i, "train") for i in range(count)]
    union = {line for part in parts for line in part}
    assert sum(map(len, parts)) == len(union), "a record was read twice"
    assert all(8 * STEPS // count <= len(part) <= 8 * STEPS // count + 40 for part in parts), (
        "prefetched more than a few batches"
    )
    assert {line for line in read(one, 0, "train")[: 8 * STEPS // 2]} <= union
    held_out = [set(read(several, i, "validation")) for i in range(count)]
    assert len(set.union(*held_out)) == 9 and all(len(part) <= 9 // count + 2 for part in held_out)  # with padding


def test_only_the_first_process_writes(several: Group):
    def name_of(line: str) -> str:
        name = Path(line).relative_to(several.workdir).parts[0]
        return name.removeprefix(".").removesuffix(".partial")  # temporary name of an atomic write

    outside = [
        {name_of(line) for line in several.told(i, "write")} - {"checkpoints"} for i in range(len(several.processes))
    ]
    assert {"config.json", "environment.json", "metrics.jsonl", "tensorboard", "tokenizer", "loss.png"} <= outside[0]
    assert all(not names for names in outside[1:]), outside
    assert len(list((several.workdir / "tensorboard").iterdir())) == 1
