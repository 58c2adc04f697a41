"""Two and four processes on this machine are one run: the same losses, one set of files, also after a kill or a SIGTERM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import runs
import shards
from ymplug_jax import hosts

STEPS, SAVE = 24, 6
SECONDS = 900  # for a busy machine
SETTINGS = [f"--config.train.duration={STEPS} steps", f"--config.train.save_every={SAVE} steps", "--config.mesh.fsdp=2"]
# The entry point, which also tells what it reads of the splits and what it writes below its folder, and takes its time.
PROGRAM = """
import os, runpy, sys, time
from ymplug_jax import train
from ymplug_jax.data.records import Records
told = open(os.environ["TOLD"], "a", buffering=1)
get, asked, pause = Records.__getitem__, train._Stop.asked, float(os.environ["PAUSE"])
def getitem(self, i):
    print("read", self.split, int(i), file=told)
    return get(self, i)
def hook(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) and os.environ["WORKDIR"] in str(args[0]):
        print("write", args[0], file=told)
Records.__getitem__ = getitem
train._Stop.asked = lambda self, step: time.sleep(pause) or asked(self, step)
sys.addaudithook(hook)
sys.argv[0] = "main"
runpy.run_module("ymplug_jax.main", run_name="__main__", alter_sys=True)
"""


class Group:
    """Processes of one run that were started together."""

    def __init__(
        self, workdir: Path, flags: list[str], count: int, *, devices: int = 1, pause: float = 0, slurm: bool = False
    ):
        port = runs.free_port()
        self.workdir, self.processes = workdir, []
        for i in range(count):
            options = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # compiles sooner
            env = os.environ | {
                "XLA_FLAGS": options,
                "TOLD": f"{workdir}.told{i}", "WORKDIR": f"{workdir}/", "PAUSE": str(pause),
                # The same program is compiled for every start on the same topology.
                "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }  # fmt: skip
            own = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process_id={i}"] if count > 1 else []
            if slurm:
                own = []
                env |= {
                    "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
                    "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
                }  # fmt: skip
            command = [sys.executable, "-c", PROGRAM, *runs.command(f"file://{workdir}", [], *flags, *own)[3:]]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, cwd=runs.ROOT, env=env, **pipes))

    def wait_for_step(self, step: int) -> None:
        """Until that step is in the metrics and a checkpoint is whole."""
        end = time.monotonic() + SECONDS
        while not any(line >= step for line in runs.losses(self.workdir)) or not steps(self.workdir):
            for process in self.processes:
                assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.05)

    def end(self, seconds: float = SECONDS) -> list[tuple[int, str]]:
        """(exit code, stderr) of each."""
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
    """Whole checkpoints, ascending."""
    return sorted(int(p.name) for p in (workdir / "checkpoints" / "steps").glob("*") if p.name.isdigit())


def finished(group: Group) -> Group:
    for code, errors in group.end():
        assert code == 0, errors[-4000:]
    return group


def same_bytes(a: Path, b: Path) -> None:
    assert runs.losses(a) == runs.losses(b) and sorted(runs.losses(a)) == list(range(1, STEPS + 1))
    want, got = runs.saved(a), runs.saved(b)
    assert want.keys() == got.keys() and all(want[path].tobytes() == got[path].tobytes() for path in want)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data for one epoch of 40 steps: no record is read twice in a run."""
    folder = tmp_path_factory.mktemp("processes")
    shards.write(folder / "data", (200, 120))
    shards.write(folder / "data", (9,), split="validation", first=500)
    shards.tokenizer(folder / "t.model")
    return folder


@pytest.fixture(scope="module")
def flags(place: Path) -> list[str]:
    return [f"--config.data.path={place / 'data'}", f"--config.data.tokenizer={place / 't.model'}", *SETTINGS]


@pytest.fixture(scope="module")
def one(place: Path, flags: list[str]) -> Group:
    return finished(Group(place / "one", flags, 1, devices=2))


@pytest.fixture(scope="module")
def two(place: Path, flags: list[str]) -> Group:
    """As two tasks of SLURM, which tells them where to meet."""
    return finished(Group(place / "two", flags, 2, slurm=True))


@pytest.fixture(scope="module")
def four(place: Path, flags: list[str]) -> Group:
    return finished(Group(place / "four", flags, 4))


@pytest.fixture(params=["two", "four"])
def several(request: pytest.FixtureRequest) -> Group:
    return request.getfixturevalue(request.param)


def test_losses_and_parameters_are_those_of_one_process(one: Group, several: Group):
    def lines(group: Group, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in runs.writer.read_metrics(group.workdir) if name in line}

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
        "more than some batches ahead"
    )
    assert {line for line in read(one, 0, "train")[: 8 * STEPS // 2]} <= union
    held_out = [set(read(several, i, "validation")) for i in range(count)]
    assert len(set.union(*held_out)) == 9 and all(len(part) <= 9 // count + 2 for part in held_out)  # with padding


def test_only_the_first_process_writes(several: Group):
    outside = [
        {Path(line).relative_to(several.workdir).parts[0] for line in several.told(i, "write")} - {"checkpoints"}
        for i in range(len(several.processes))
    ]
    assert {"config.json", "environment.json", "metrics.jsonl", "tensorboard", "tokenizer", "loss.png"} <= outside[0]
    assert all(not names for names in outside[1:]), outside
    assert len(list((several.workdir / "tensorboard").iterdir())) == 1


@pytest.fixture(scope="module")
def killed(place: Path, flags: list[str]) -> Path:
    """Two processes, the second of them killed after a checkpoint; the first must end by itself and say why."""
    group = Group(place / "killed", [*flags, "--config.data.eval_split="], 2, pause=0.3)
    group.wait_for_step(SAVE + 2)
    group.processes[1].kill()
    begin = time.monotonic()
    (code, errors), _ = group.end(60)  # seconds; measured: about one on an idle machine
    print(f"the other process ended {time.monotonic() - begin:.1f} s after the kill")
    assert code == hosts.LOST and "error: process 1 (" in errors and "is gone" in errors, errors[-4000:]
    assert max(steps(group.workdir)) < STEPS
    return group.workdir


def copied(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.parent / name))


def test_a_killed_run_goes_on_exactly(two: Group, killed: Path, flags: list[str]):
    group = finished(Group(copied(killed, "killed_two"), [*flags, "--config.data.eval_split="], 2))
    same_bytes(group.workdir, two.workdir)


def test_a_killed_run_goes_on_with_another_number_of_processes(two: Group, killed: Path, flags: list[str]):
    group = finished(Group(copied(killed, "killed_one"), [*flags, "--config.data.eval_split="], 1, devices=2))
    want, got = runs.losses(two.workdir), runs.losses(group.workdir)
    assert sorted(got) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([got[step] for step in want], [want[step] for step in want], rtol=1e-4)


@pytest.mark.parametrize("receivers", [[1], [0, 1]], ids=["one", "all"])
def test_sigterm_makes_all_save_the_same_step(two: Group, place: Path, flags: list[str], receivers: list[int]):
    flags = [*flags, "--config.data.eval_split=", f"--config.train.save_every={SAVE + 1} steps"]
    group = Group(place / f"stopped{len(receivers)}", flags, 2, pause=0.3)
    group.wait_for_step(SAVE + 2)
    for i in receivers:
        os.kill(group.processes[i].pid, signal.SIGTERM)
    ended = group.end()
    assert [code for code, _ in ended] == [0, 0], ended
    step = max(runs.losses(group.workdir))
    assert SAVE + 2 <= step < STEPS and max(steps(group.workdir)) == step
    assert f"asked to stop: saving step {step}" in ended[0][1]
    progress = group.workdir / "checkpoints" / "steps" / str(step) / "progress" / "metadata"
    assert json.loads(progress.read_text()) == {"step": step, "examples_seen": 8 * step}
    same_bytes(finished(Group(group.workdir, flags, 2)).workdir, two.workdir)
