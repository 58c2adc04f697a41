"""The launch scripts: their syntax, and what they would start."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def stub(folder: Path, name: str, body: str) -> dict[str, str]:
    """A program of that name, first on the path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_slice_is_tried_again_until_the_run_is_done(tmp_path: Path) -> None:
    body = 'printf "%s\\n" "$@" >> "$LOG"; [ "$(grep -c -- --worker=all "$LOG")" -ge 2 ]'
    env = stub(tmp_path / "bin", "gcloud", body) | {"TPU": "a", "ZONE": "z", "LOG": str(tmp_path / "log")}
    stub(tmp_path / "bin", "sleep", "exit 0")
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "--config", "c.py", "--workdir", "gs://b/a run"], env=env, check=False)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0 and log.count("--worker=all") == 2
    assert ".venv/bin/python -m ymplug_jax.main --config c.py --workdir gs://b/a\\ run" in log


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    env = stub(tmp_path / "bin", "gcloud", 'echo x >> "$LOG"; exit 2') | {
        "TPU": "a",
        "ZONE": "z",
        "LOG": str(tmp_path / "log"),
    }
    assert subprocess.run([LAUNCH / "tpu_vm.sh", "--config", "c.py"], env=env).returncode == 2
    assert (tmp_path / "log").read_text() == "x\n"
    del env["TPU"]
    assert subprocess.run([LAUNCH / "tpu_vm.sh"], env=env, capture_output=True).returncode != 0
