"""Two processes on this machine are one run: the same losses, one set of files."""

import socket
import subprocess
import time
from pathlib import Path

import numpy as np

import runs


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes_equal_one(tmp_path: Path):
    data = runs.make_data(tmp_path)
    more = ["--config.train.duration=6 steps", "--config.mesh.fsdp=2"]
    runs.run(tmp_path / "one", data, *more, devices=4)
    port = free_port()
    processes = [
        runs.start(
            tmp_path / "two",
            data,
            *more,
            f"--coordinator=localhost:{port}",
            "--processes=2",
            f"--process_id={i}",
            devices=2,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        raise
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    assert "it/s" not in outputs[1][1] and "step 6: evaluation" not in outputs[1][1], "process 1 keeps quiet"
    one, two = runs.losses(tmp_path / "one"), runs.losses(tmp_path / "two")
    assert sorted(two) == sorted(one) == list(range(1, 7))
    np.testing.assert_allclose([two[step] for step in two], [one[step] for step in two], rtol=2e-5)
    a, b = runs.saved(tmp_path / "one"), runs.saved(tmp_path / "two")
    for path in a:
        np.testing.assert_allclose(b[path], a[path], atol=2e-3, err_msg=path)


def wait_for_step(workdir: Path, step: int, seconds: float = 240) -> None:
    """Until a checkpoint of that step is whole."""
    end = time.monotonic() + seconds
    while not (workdir / "checkpoints" / "steps" / str(step)).exists():
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.2)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path):
    """One of two is killed: the other ends with a clear error in bounded time; one process alone then finishes the run, as if
    nothing had happened."""
    data = runs.make_data(tmp_path)
    more = ["--config.train.duration=60 steps", "--config.mesh.fsdp=2", "--config.data.eval_split="]
    runs.run(tmp_path / "whole", data, *more, devices=2)
    workdir, port = tmp_path / "run", free_port()
    flags = [f"--coordinator=localhost:{port}", "--processes=2", "--heartbeat=10"]
    processes = [runs.start(workdir, data, *more, *flags, f"--process_id={i}", devices=1) for i in range(2)]
    try:
        wait_for_step(workdir, 5)
        processes[1].kill()
        begin = time.monotonic()
        _, errors = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode not in (0, None) and time.monotonic() - begin < 90
    assert "goes on from the newest checkpoint" in errors or "heartbeat" in errors.lower(), errors[-3000:]
    runs.run(workdir, data, *more, devices=2)
    one, two = runs.losses(tmp_path / "whole"), runs.losses(workdir)
    assert max(two) == 60
    np.testing.assert_allclose(two[60], one[60], rtol=1e-3)


def test_a_missing_process_ends_the_others(tmp_path: Path):
    data = runs.make_data(tmp_path)
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--process_id=0", "--start_timeout=5"]
    process = runs.start(tmp_path / "run", data, *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "waiting for all 2 processes, at most 5 s" in errors, errors[-3000:]
    assert not (tmp_path / "run").exists()


def test_tasks_of_slurm_find_each_other(tmp_path: Path):
    data, job = runs.make_data(tmp_path), str(free_port())
    common = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    processes = []
    for i in range(2):
        environment = runs.environment(1) | common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        command = runs.command(tmp_path / "run", data, "--config.train.duration=2 steps", "--config.data.eval_split=")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=runs.ROOT, env=environment, **pipes))
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    assert sorted(runs.losses(tmp_path / "run")) == [1, 2]
    facts = (tmp_path / "run" / "environment.json").read_text()
    assert '"processes": 2' in facts
