"""Find the coordinator of a multi-process run: from flags, SLURM variables, TPU variables or the TPU metadata server.

`jax.distributed.initialize` detects the same facts but does not expose them, and `hosts` needs them for its roll call before JAX
starts. Variables, attributes and ports are the ones JAX uses, so both detections agree on the address.
"""

import dataclasses
import importlib.util
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_PORT = "8482"
PATIENCE = 5.0  # seconds to wait for one answer of the metadata server
TRIES = 6


class HostsError(RuntimeError):
    """The processes of the run could not connect; the message names the missing ones and the fix. Exit code `exits.LOST`."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Rendezvous of the processes of a run: the coordinator's address, the number of processes and the index of this one."""

    address: str  # host:port of process 0
    count: int
    number: int
    names: tuple[str, ...] = ()  # host name of each process; empty if the platform does not list them
    devices: tuple[int, ...] | None = None  # local devices that this process uses; None: all


def find(coordinator: str | None, processes: int | None, process_id: int | None, timeout: float) -> Meeting | None:
    """Return the rendezvous of the processes, from the flags or else from SLURM or a TPU slice; None for a single process.

    Args:
      coordinator: value of `--coordinator`, host:port of process 0.
      processes: value of `--processes`.
      process_id: value of `--process_id`.
      timeout: seconds to wait until the network resolves the host name of process 0.

    Raises:
      ValueError: only some of the three flags are given, or a value is out of range.
      HostsError: the host name of process 0 does not resolve within `timeout` seconds.
    """
    if coordinator is None or processes is None or process_id is None:
        if (coordinator, processes, process_id) != (None, None, None):
            raise ValueError(
                "--coordinator, --processes, --process_id: only some of them are set; give all three or none"
            )
        try:
            return _of_platform(timeout)
        except OSError as error:  # TPU chips, but no metadata server
            logging.warning("TPU metadata server: no answer (%s); continuing as a single process", error)
            return None
        except RuntimeError as error:
            raise HostsError(
                f"{error} within {timeout:.0f} s; check that this host has started, or increase --start_timeout"
            ) from None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator {coordinator!r}: not an address; write host:port of process 0")
    if not 0 <= process_id < processes:
        raise ValueError(
            f"--process_id {process_id}: out of range for --processes {processes}; give 0 to {processes - 1}"
        )
    return Meeting(coordinator, processes, process_id)


def _of_platform(timeout: float) -> Meeting | None:
    """Return the rendezvous detected from SLURM or a TPU slice; None for a single process.

    Raises:
      OSError: the host has TPU chips, but no metadata server answers.
      RuntimeError: the host name of process 0 does not resolve within `timeout` seconds.
    """
    if all(name in os.environ for name in SLURM):
        return _slurm()
    if not _has_tpu():
        return None
    if workers := os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES"):  # Kubernetes
        return _slice(workers.split(","), int(os.environ.get("TPU_WORKER_ID", "0")), timeout)
    if "TPU_SKIP_MDS_QUERY" in os.environ or not (number := _metadata("agent-worker-number")):
        return None
    # Each endpoint is either a name or name:id:address.
    endpoints = [worker.split(":") for worker in _metadata("worker-network-endpoints").split(",")]
    return _slice([parts[2] if len(parts) == 3 else parts[0] for parts in endpoints], int(number), timeout)


def _slurm() -> Meeting | None:
    if (count := int(os.environ["SLURM_NTASKS"])) == 1:
        return None
    names = nodes(os.environ["SLURM_STEP_NODELIST"])
    # One port per job, among the 4096 highest.
    port = os.environ.get("JAX_COORDINATOR_PORT") or 65535 - 2**12 + 1 + int(os.environ["SLURM_JOB_ID"]) % 2**12
    known = tuple(names) if len(names) == count else ()
    return Meeting(f"{names[0]}:{port}", count, int(os.environ["SLURM_PROCID"]), known, _own_devices())


def nodes(text: str) -> list[str]:
    """Expand a SLURM node list: "a[1,03-05],b" -> a1, a03, a04, a05, b. Supports one level of brackets."""
    found: list[str] = []
    for prefix, inside, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        for part in inside.split(",") if inside else [""]:
            low, _, high = part.partition("-")
            numbers = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] if high else [low]
            found += [prefix + number + suffix for number in numbers]
    return found


def _own_devices() -> tuple[int, ...] | None:
    """Return this task's GPU if a node runs several tasks that all see every GPU; else None (all visible GPUs)."""
    per_node = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    several = per_node is not None and int(per_node[0]) > 1 and len(seen) > 1
    return (int(os.environ["SLURM_LOCALID"]),) if several else None


def _has_tpu() -> bool:
    """Return whether this host has TPU-like device files and libtpu is installed."""
    files = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/*")]
    return bool(files) and importlib.util.find_spec("libtpu") is not None


def _slice(workers: list[str], number: int, timeout: float) -> Meeting | None:
    """Return the rendezvous of a TPU slice, or of several slices joined by Megascale; None for a single host.

    Args:
      workers: host addresses of this slice, by worker index.
      number: worker index of this host within its slice.
      timeout: seconds to wait until the host name of process 0 resolves.
    """
    slices = int(_of_slice("MEGASCALE_NUM_SLICES") or 1)
    if (count := len(workers) * slices) == 1:
        return None
    number += int(_of_slice("MEGASCALE_SLICE_ID") or 0) * len(workers)
    host = (_of_slice("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    deadline = time.monotonic() + timeout
    while not _known(host):  # the first host of a slice may start after the others
        if time.monotonic() > deadline:
            raise RuntimeError(f"{host}: the host name of process 0 does not resolve")
        time.sleep(min(5.0, timeout))
    port = os.environ.get("JAX_COORDINATOR_PORT") or TPU_PORT
    return Meeting(f"{host}:{port}", count, number, tuple(workers) if slices == 1 else ())


def _known(host: str) -> bool:
    try:
        socket.gethostbyname(host)
    except socket.gaierror:
        return False
    return True


def _of_slice(key: str) -> str:
    """Return a Megascale setting from the environment or the metadata server; "" if neither has it."""
    if (value := os.environ.get(key)) is not None:
        return value
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    try:
        text = _metadata("tpu-env")
    except OSError:  # Kubernetes: the variables are complete
        return ""
    found = re.search(rf"^\s*{key}\s*:\s*'?([^'\n]*)'?\s*$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _metadata(key: str) -> str:
    """Return an attribute of this machine from Google Cloud's metadata server; "" if it is not set.

    Raises:
      OSError: no server answers.
    """
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
            if not left:
                raise
        time.sleep(0.5)
    return ""
