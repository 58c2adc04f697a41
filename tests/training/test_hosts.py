"""Several processes of one run: missing and lost ones are named, and all others exit in bounded time. No model is involved."""

import contextlib
import fnmatch
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import runs
from ymplug_jax.training import cluster, hosts

HOST = socket.gethostname()
SLACK = 60  # seconds for a busy machine
# Joins the other processes, prints the sum of all process indices, then does what its last argument says.
PROGRAM = """
import sys, time, logging
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
from ymplug_jax.training import cluster, hosts
def main(argv):
    coordinator, count, number, timeout, heartbeat, then = argv
    try:
        meeting = cluster.find(coordinator, int(count), int(number), float(timeout))
        hosts.join(meeting, float(timeout), float(heartbeat))
    except hosts.HostsError as error:
        logging.error("error: %s", error)
        return hosts.LOST
    import jax
    from jax.experimental import multihost_utils
    total = int(multihost_utils.process_allgather(jax.numpy.int32(jax.process_index())).sum())
    print("together", jax.process_count(), total, flush=True)
    if then == "wait":
        time.sleep(600)
    if then == "raise":
        raise OSError("the disk is full")
    return int(then)
sys.exit(hosts.announced(main)(sys.argv[1:]))
"""


@contextlib.contextmanager
def started(
    thens: dict[int, str], count: int, timeout: int = 120, heartbeat: int = 100, counts: dict | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Start the processes in `thens`, out of `count` with one coordinator; kill those still running at the end."""
    address = f"localhost:{runs.free_port()}"
    processes = []
    for number, then in thens.items():
        command = [sys.executable, "-c", PROGRAM, address, str((counts or {}).get(number, count)), str(number)]
        command += [str(timeout), str(heartbeat), then]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=runs.ROOT, env=runs.environment(1), **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ends(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Return (exit code, stderr) of each process."""
    deadline = time.monotonic() + seconds
    outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    return [(process.returncode, errors) for process, (_, errors) in zip(processes, outputs, strict=True)]


def together(processes: list[subprocess.Popen]) -> None:
    """Wait until all processes have joined."""
    for process in processes:
        lines = iter(process.stdout.readline, "")  # Gloo prints a line first
        assert any(line.startswith("together") for line in lines), process.stderr.read()


def test_processes_that_joined_name_the_missing_ones() -> None:
    with started({0: "0", 2: "0"}, count=4, timeout=8) as processes:
        for code, errors in ends(processes, 8 + SLACK):
            assert code == hosts.LOST
            assert "2 of 4 processes did not join at" in errors and ": process 1, process 3; " in errors, errors
            assert f"joined: process 0 ({HOST}), process 2 ({HOST});" in errors and "--start_timeout" in errors
            assert "Traceback" not in errors


def test_a_missing_first_process_is_named() -> None:
    with started({1: "0"}, count=2, timeout=3) as processes:
        ((code, errors),) = ends(processes, 3 + SLACK)
    assert code == hosts.LOST and f"process 1 ({HOST}): no answer from process 0 at localhost:" in errors, errors
    assert "within 3 s" in errors and "start process 0 on that host" in errors, errors


@pytest.mark.parametrize(
    ("numbers", "counts", "message"),
    [
        ([0, 1, 1], {}, "--process_id 1: used by two processes, on "),
        ([0, 1], {1: 2}, "was started with 2, process 0 with 3; give the same number on all hosts"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_at_once(numbers: list[int], counts: dict, message: str) -> None:
    address, processes = f"localhost:{runs.free_port()}", []
    for number in numbers:
        command = [sys.executable, "-c", PROGRAM, address, str(counts.get(number, 3)), str(number), "120", "100", "0"]
        processes.append(
            subprocess.Popen(command, cwd=runs.ROOT, env=runs.environment(1), stderr=subprocess.PIPE, text=True)
        )
    first = processes[0].communicate(timeout=100)[1]
    for process in processes[1:]:
        process.kill()
        process.wait()
    assert processes[0].returncode == hosts.LOST and message in first, first


def test_unrelated_connections_to_the_port_are_ignored() -> None:
    """A port scan and a silent client connect to process 0 before the other process does."""
    with started({0: "0"}, count=2) as (first,):
        address = first.args[3].split(":")
        while True:
            try:
                scan = socket.create_connection((address[0], int(address[1])))
                break
            except OSError:
                assert first.poll() is None
                time.sleep(0.05)
        scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
        scan.close()
        silent = socket.create_connection((address[0], int(address[1])))
        command = [*first.args[:5], "1", *first.args[6:]]
        second = subprocess.run(
            command, cwd=runs.ROOT, env=runs.environment(1), capture_output=True, text=True, timeout=200
        )
        silent.close()
        assert second.returncode == 0 and second.stdout.endswith("together 2 1\n"), second.stderr
        assert ends([first], SLACK)[0][0] == 0


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_and_all_others_exit(victim: int) -> None:
    with started(dict.fromkeys(range(3), "wait"), count=3) as processes:
        together(processes)
        processes[victim].kill()
        others = [process for i, process in enumerate(processes) if i != victim]
        for code, errors in ends(others, SLACK):
            assert f"error: process {victim} ({HOST}) is lost: its connection closed" in errors, errors
            # -6: JAX, whose coordinator is process 0, aborted first.
            assert code == hosts.LOST or (victim == 0 and code == -6), code


def test_a_silent_process_is_named_after_the_heartbeat() -> None:
    """A stopped process keeps its connections open, like a host that loses power or network."""
    with started(dict.fromkeys(range(3), "wait"), count=3, heartbeat=5) as processes:
        together(processes)
        processes[1].send_signal(19)  # SIGSTOP
        for code, errors in ends([processes[0], processes[2]], 5 + SLACK):
            assert code == hosts.LOST and f"process 1 ({HOST}) is lost: no message for 5 s" in errors, errors


def test_an_error_of_one_process_stops_all() -> None:
    with started({0: "wait", 1: "raise", 2: "wait"}, count=3) as processes:
        (zero, zero_says), (one, one_says), (two, two_says) = ends(processes, hosts.GRACE + 2 * SLACK)
    assert one == 1 and "OSError: the disk is full" in one_says
    assert zero == two == hosts.LOST
    for says in (zero_says, two_says):
        assert f"error: process 1 ({HOST}) exited with code 1; see the output of that process" in says, says


def test_the_same_mistake_on_all_keeps_its_exit_code() -> None:
    with started(dict.fromkeys(range(3), "2"), count=3) as processes:
        assert [code for code, _ in ends(processes, hosts.GRACE + 2 * SLACK)] == [2, 2, 2]


def test_flags_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="give all three or none"):
        cluster.find("a:1", None, 0, 1)
    with pytest.raises(ValueError, match="write host:port"):
        cluster.find("a", 2, 0, 1)
    with pytest.raises(ValueError, match="--process_id 2: out of range for --processes 2; give 0 to 1"):
        cluster.find("a:1", 2, 2, 1)


def test_a_single_process_needs_no_flags() -> None:
    assert cluster.find(None, None, None, 1) is None


SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[08-10],login", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip


def test_slurm_variables_give_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    meeting = cluster.find(None, None, None, 1)
    assert meeting.names == ("gpu08", "gpu09", "gpu10", "login") and (meeting.count, meeting.number) == (4, 2)
    assert meeting.address == "gpu08:61441" and meeting.devices is None, "the only task of a node uses all its GPUs"
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert cluster.find(None, None, None, 1).devices == (1,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # SLURM restricts the visible GPUs itself
    assert cluster.find(None, None, None, 1).devices is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert cluster.find(None, None, None, 1) is None


def test_tpu_variables_give_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_has_tpu", lambda: True)  # this machine has no chips
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,b.svc,c.svc,d.svc")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    for name, value in {
        "MEGASCALE_COORDINATOR_ADDRESS": "",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    names = ("localhost", "b.svc", "c.svc", "d.svc")
    assert cluster.find(None, None, None, 1) == hosts.Meeting("localhost:8482", 4, 3, names)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:8080")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    assert cluster.find(None, None, None, 1) == hosts.Meeting("localhost:8482", 8, 7)


TPU_ENV = "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"


@pytest.mark.parametrize("joined", [False, True])
def test_the_metadata_server_gives_the_meeting(monkeypatch: pytest.MonkeyPatch, joined: bool):
    """A local server answers like the metadata server of a TPU VM."""
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:10.0.0.3",
    }
    answers |= {"tpu-env": TPU_ENV} if joined else {}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = answers.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(200 if text and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cluster, "_has_tpu", lambda: True)  # this machine has no chips
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    try:
        found = cluster.find(None, None, None, 1)
        del answers["agent-worker-number"]
        assert cluster.find(None, None, None, 1) is None, "a machine that is not a TPU VM"
    finally:
        server.shutdown()
        server.server_close()
    names = ("127.0.0.1", "10.0.0.3")
    assert found == (
        cluster.Meeting("127.0.0.1:8482", 4, 3) if joined else cluster.Meeting("127.0.0.1:8482", 2, 1, names)
    )


def test_a_host_name_of_process_0_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "_has_tpu", lambda: True)  # this machine has no chips
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "nowhere.invalid,b")
    with pytest.raises(
        hosts.HostsError, match=r"^nowhere\.invalid: the host name of process 0 does not resolve within 0 s; check"
    ):
        cluster.find(None, None, None, 0.2)


def test_missing_processes_are_listed_with_their_host_names() -> None:
    meeting = hosts.Meeting("gpu08:1", 4, 0, ("gpu08", "gpu09", "gpu10", "login"))
    text = hosts._missing(meeting, {2: hosts._Peer(2, "gpu10", socket.socket())}, 30.0)
    assert "2 of 4 processes did not join at gpu08:1 within 30 s: process 1 (gpu09), process 3 (login); " in text
    many = hosts._missing(hosts.Meeting("a:1", 64, 0), {}, 30.0)
    assert "process 16 and 47 more" in many


@pytest.mark.parametrize(
    ("files", "said", "expected"), [((), None, "cpu"), (("accel0",), None, None), ((), "tpu", "tpu")]
)
def test_jax_uses_the_cpu_on_a_host_without_accelerators(
    monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], said: str | None, expected: str | None
):
    class Folder:
        def glob(self, pattern: str) -> list[str]:
            return [name for name in files if fnmatch.fnmatch(name, pattern)]

    monkeypatch.setattr(hosts, "Path", lambda path: Folder())
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if said:
        monkeypatch.setenv("JAX_PLATFORMS", said)
    hosts.without_accelerator()
    assert os.environ.get("JAX_PLATFORMS") == expected
