"""The launch scripts: their syntax, the commands that they start, and when they restart a run."""

import importlib.util
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from ymplug_jax.training import hosts

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def stub(folder: Path, name: str, body: str) -> dict[str, str]:
    """Create a program of that name and return an environment with it first on PATH; $LOG names a file for its output."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log")}


def test_a_slice_restarts_until_the_run_is_done(tmp_path: Path) -> None:
    body = 'printf "%s\\n" "$@" >> "$LOG"; [ "$(grep -c -- --worker=all "$LOG")" -ge 2 ]'
    env = stub(tmp_path / "bin", "gcloud", body) | {"TPU": "a", "ZONE": "z"}
    stub(tmp_path / "bin", "sleep", "exit 0")
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "--config", "c.py", "--workdir", "gs://b/a run"], env=env, check=False)
    log = (tmp_path / "bin" / "log").read_text()
    assert done.returncode == 0 and log.count("--worker=all") == 2
    assert ".venv/bin/python -m ymplug_jax.main --config c.py --workdir gs://b/a\\ run" in log


def test_a_user_error_is_not_retried(tmp_path: Path) -> None:
    env = stub(tmp_path / "bin", "gcloud", 'echo x >> "$LOG"; exit 2') | {"TPU": "a", "ZONE": "z"}
    assert subprocess.run([LAUNCH / "tpu_vm.sh", "--config", "c.py"], env=env).returncode == 2
    assert (tmp_path / "bin" / "log").read_text() == "x\n"
    del env["TPU"]
    assert subprocess.run([LAUNCH / "tpu_vm.sh"], env=env, capture_output=True).returncode != 0


def test_a_failed_disk_or_bucket_is_retried_a_few_times(tmp_path: Path) -> None:
    env = stub(tmp_path / "bin", "gcloud", 'echo x >> "$LOG"; exit 5') | {"TPU": "a", "ZONE": "z"}
    stub(tmp_path / "bin", "sleep", "exit 0")
    assert subprocess.run([LAUNCH / "tpu_vm.sh", "--config", "c.py"], env=env).returncode == 5
    assert (tmp_path / "bin" / "log").read_text() == "x\n" * 5
    body = (
        'case "$*" in *describe*) echo ACTIVE;; *--command=run*) ;; *"get code"*) ;; *) echo x >> "$LOG"; exit 5;; esac'
    )
    env = stub(tmp_path / "queued", "gcloud", body) | QUEUED
    stub(tmp_path / "queued", "sleep", "exit 0")
    assert subprocess.run([LAUNCH / "tpu_queued.sh", "--config", "c.py"], env=env, timeout=60).returncode == 5
    assert (tmp_path / "queued" / "log").read_text() == "x\n" * 5


def test_a_host_stops_a_run_left_from_a_lost_connection(tmp_path: Path) -> None:
    """Execute the command that gcloud sends to every host while an earlier run is still active."""
    env = stub(tmp_path / "bin", "gcloud", 'for last; do :; done; bash -c "${last#--command=}"') | {
        "TPU": "a",
        "ZONE": "z",
    }
    python = tmp_path / "code" / ".venv" / "bin"
    python.mkdir(parents=True)
    (tmp_path / "code" / "launch").symlink_to(LAUNCH)
    stub(python, "python", 'echo "$@" >> "$LOG"')
    left = subprocess.Popen(
        ["bash", "-c", 'trap "echo saved >> $LOG; exit 0" TERM; while :; do sleep 0.1; done'], env=env
    )
    (tmp_path / "code" / "run.pid").write_text(f"{left.pid}\n")
    time.sleep(1)  # until the trap is set
    run = subprocess.Popen([LAUNCH / "tpu_vm.sh", "--x=a b"], env=env | {"FOLDER": str(tmp_path / "code")})
    left.wait(timeout=60)
    assert run.wait(timeout=60) == 0
    assert (tmp_path / "bin" / "log").read_text() == "saved\n-m ymplug_jax.main --x=a b\n"


GCLOUD = """
echo "$3 $4" >> "$LOG"
case "$3 $4" in
  "queued-resources describe") cat "$LOG.state" ;;
  "queued-resources create") echo ACTIVE > "$LOG.state"; echo "$@" > "$LOG.request" ;;
  "queued-resources delete") rm "$LOG.state" ;;
  "tpu-vm ssh")
    [[ "$*" == *"--command=get code"* ]] && { echo setup >> "$LOG"; exit 0; }
    echo run >> "$LOG"
    [ "$(grep -c '^run' "$LOG")" = 1 ] && { echo SUSPENDED > "$LOG.state"; exit 255; }
    exit $CODE ;;
esac
"""
QUEUED = {"TPU": "a", "ZONE": "z", "TYPE": "v5litepod-64", "RUNTIME": "r", "SETUP": "get code"}


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (2, 2)])
def test_a_preempted_slice_is_created_again(tmp_path: Path, code: int, ends: int) -> None:
    env = stub(tmp_path / "bin", "gcloud", GCLOUD) | QUEUED | {"CODE": str(code)}
    stub(tmp_path / "bin", "sleep", "exit 0")
    done = subprocess.run([LAUNCH / "tpu_queued.sh", "--config", "c.py"], env=env, timeout=60)
    assert done.returncode == ends
    log = (tmp_path / "bin" / "log").read_text().splitlines()
    made = ["queued-resources create", "queued-resources describe", "tpu-vm ssh", "setup", "tpu-vm ssh", "run"]
    taken = ["queued-resources describe", "queued-resources delete", "queued-resources describe"]
    assert log == ["queued-resources describe", *made, *taken, *made]
    request = (tmp_path / "bin" / "log.request").read_text()
    assert "--accelerator-type v5litepod-64 --runtime-version r --spot" in request and "create a --zone z" in request


def test_a_queued_slice_needs_its_settings(tmp_path: Path) -> None:
    env = stub(tmp_path / "bin", "gcloud", "exit 1") | QUEUED
    del env["SETUP"]
    done = subprocess.run([LAUNCH / "tpu_queued.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "SETUP is missing" in done.stderr


# srun passes signals to its tasks. This stub is the only task: it saves when it receives SIGTERM.
SRUN = """
echo "srun $@" >> "$LOG"
trap 'echo saved >> "$LOG"; exit ${AFTER:-0}' TERM
[ -n "${CODE:-}" ] && exit "$CODE"
touch "$LOG.ready"
while :; do sleep 0.1; done
"""


def slurm(folder: Path, **more: str) -> dict[str, str]:
    stub(folder, "scontrol", 'echo "scontrol $@" >> "$LOG"')
    return stub(folder, "srun", SRUN) | {"SLURM_JOB_ID": "7"} | more


def test_slurm_saves_and_requeues_before_the_time_limit(tmp_path: Path) -> None:
    assert "#SBATCH --signal=B:TERM@300\n" in (LAUNCH / "slurm.sh").read_text(), (
        "B: the batch shell receives the signal, not the job steps"
    )
    batch = subprocess.Popen([LAUNCH / "slurm.sh", "--workdir", "/a run"], env=slurm(tmp_path / "bin"))
    while not (tmp_path / "bin" / "log.ready").exists():
        time.sleep(0.05)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(timeout=60) == 0
    assert (tmp_path / "bin" / "log").read_text() == (
        "srun --kill-on-bad-exit=1 .venv/bin/python -m ymplug_jax.main --workdir /a run\nsaved\nscontrol requeue 7\n"
    )


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, "0", False),
        (2, "0", False),
        (hosts.LOST, "0", True),
        (hosts.LOST, "19", True),
        (hosts.LOST, "20", False),
        (5, "4", True),
        (5, "5", False),
    ],
)
def test_slurm_requeues_by_exit_code(tmp_path: Path, code: int, restarts: str, again: bool) -> None:
    env = slurm(tmp_path / "bin", CODE=str(code), SLURM_RESTART_COUNT=restarts)
    assert subprocess.run([LAUNCH / "slurm.sh"], env=env, timeout=60).returncode == code
    assert ("scontrol requeue 7" in (tmp_path / "bin" / "log").read_text()) == again


@pytest.mark.parametrize(
    ("asked", "code", "ends"),
    [
        (signal.SIGTERM, 0, 75),
        (signal.SIGINT, 0, 75),
        (signal.SIGTERM, 4, 4),
        (None, 0, 0),
        (None, 4, 4),
        (None, 5, 5),
    ],
)
def test_a_run_stopped_by_a_signal_counts_as_unfinished(
    tmp_path: Path, asked: int | None, code: int, ends: int
) -> None:
    env = slurm(tmp_path / "bin", AFTER=str(code), CODE="" if asked else str(code))
    process = subprocess.Popen([LAUNCH / "unfinished.sh", "srun"], env=env)
    if asked:
        while not (tmp_path / "bin" / "log.ready").exists():
            time.sleep(0.05)
        process.send_signal(asked)
    assert process.wait(timeout=60) == ends


def test_the_manifest_fits_its_slice() -> None:
    manifest = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0, (
        "if one host fails, the others exit, and the JobSet restarts all of them"
    )
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]

    command = container["command"]
    assert command[:5] == ["bash", "launch/unfinished.sh", "python", "-m", "ymplug_jax.main"]
    settings = dict(word.removeprefix("--").split("=", 1) for word in command[5:])
    assert settings["workdir"].startswith("gs://")
    file, size_and_slice = settings["config"].split(":")
    size, name = size_and_slice.split("@")
    spec = importlib.util.spec_from_file_location("slices", LAUNCH.parent / Path(file).with_name("slices.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layout = module.SLICES[name]
    assert layout.chips == chips * slices["replicas"] and layout.topology == f"v5e:{topology}" and size in layout.batch
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
