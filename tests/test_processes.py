"""Two processes on this machine are one run: the same losses, one set of files."""

import socket
import subprocess
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
