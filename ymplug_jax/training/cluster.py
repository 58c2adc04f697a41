"""Where the processes of a run meet: as the flags say, or SLURM's variables, or those or the metadata server of a TPU slice.

JAX finds the same by itself in `jax.distributed.initialize`, but tells nobody before it starts, and the roll call of `hosts` comes
first. Variables, attributes and ports are those that JAX uses, so that programs of both kinds meet at the same address.
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
PATIENCE = 5.0  # seconds for one answer of the metadata server
TRIES = 6


class HostsError(RuntimeError):
    """The processes did not come together; the message names those that are missing and what to do."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the processes of a run meet, how many they are, and which of them this one is."""

    address: str  # host:port of process 0
    count: int
    number: int
    names: tuple[str, ...] = ()  # hosts by process, as far as the platform tells
    devices: tuple[int, ...] | None = None  # of this host that are this process's; None: all


def find(coordinator: str | None, processes: int | None, process_id: int | None, timeout: float) -> Meeting | None:
    """The meeting that the flags name; without them the one that SLURM or a TPU slice knows; None for a process alone.

    Raises:
      ValueError: some of the three flags without the others, or numbers that cannot be.
      HostsError: the platform does not know process 0's address within `timeout` seconds.
    """
    if coordinator is None or processes is None or process_id is None:
        if (coordinator, processes, process_id) != (None, None, None):
            raise ValueError("--coordinator, --processes and --process_id belong together; give all three or none")
        try:
            return _of_platform(timeout)
        except OSError as error:  # a machine with TPU chips that no metadata server speaks for
            logging.warning("no word from the platform about other hosts (%s); this process goes on alone", error)
            return None
        except RuntimeError as error:
            raise HostsError(f"{error} within {timeout:.0f} s; look whether that host has started") from None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator {coordinator!r}: write host:port of process 0")
    if not 0 <= process_id < processes:
        raise ValueError(f"--process_id {process_id} is not in 0 to {processes - 1} of --processes {processes}")
    return Meeting(coordinator, processes, process_id)


def _of_platform(timeout: float) -> Meeting | None:
    """The meeting that the platform knows; None for a process alone.

    Raises:
      OSError: there are TPU chips, but no metadata server answers.
      RuntimeError: the name of process 0's host means nothing to the network within `timeout` seconds.
    """
    if all(name in os.environ for name in SLURM):
        return _slurm()
    if not _has_tpu():
        return None
    if workers := os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES"):  # Kubernetes
        return _slice(workers.split(","), int(os.environ.get("TPU_WORKER_ID", "0")), timeout)
    if "TPU_SKIP_MDS_QUERY" in os.environ or not (number := _metadata("agent-worker-number")):
        return None
    # A name alone, or name:id:address.
    endpoints = [worker.split(":") for worker in _metadata("worker-network-endpoints").split(",")]
    return _slice([parts[2] if len(parts) == 3 else parts[0] for parts in endpoints], int(number), timeout)


def _slurm() -> Meeting | None:
    if (count := int(os.environ["SLURM_NTASKS"])) == 1:
        return None
    names = nodes(os.environ["SLURM_STEP_NODELIST"])
    # One port a job, of the 4096 highest.
    port = os.environ.get("JAX_COORDINATOR_PORT") or 65535 - 2**12 + 1 + int(os.environ["SLURM_JOB_ID"]) % 2**12
    known = tuple(names) if len(names) == count else ()
    return Meeting(f"{names[0]}:{port}", count, int(os.environ["SLURM_PROCID"]), known, _own_devices())


def nodes(text: str) -> list[str]:
    """SLURM's list of nodes, "a[1,03-05],b" -> a1 a03 a04 a05 b; one level of brackets."""
    found: list[str] = []
    for prefix, inside, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        for part in inside.split(",") if inside else [""]:
            low, _, high = part.partition("-")
            numbers = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] if high else [low]
            found += [prefix + number + suffix for number in numbers]
    return found


def _own_devices() -> tuple[int, ...] | None:
    """The GPU of this task where SLURM runs several on a node and each sees all GPUs; else all that are seen."""
    per_node = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    several = per_node is not None and int(per_node[0]) > 1 and len(seen) > 1
    return (int(os.environ["SLURM_LOCALID"]),) if several else None


def _has_tpu() -> bool:
    """Whether this host has device files such as those of TPU chips, and the library that drives them."""
    files = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/*")]
    return bool(files) and importlib.util.find_spec("libtpu") is not None


def _slice(workers: list[str], number: int, timeout: float) -> Meeting | None:
    """The meeting of a TPU slice, or of several that Megascale joins; `workers` are those of this slice, in their order."""
    slices = int(_of_slice("MEGASCALE_NUM_SLICES") or 1)
    if (count := len(workers) * slices) == 1:
        return None
    number += int(_of_slice("MEGASCALE_SLICE_ID") or 0) * len(workers)
    host = (_of_slice("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    deadline = time.monotonic() + timeout
    while not _known(host):  # the first host of a slice may start after the others
        if time.monotonic() > deadline:
            raise RuntimeError(f"no address of process 0's host {host}")
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
    """A setting of Megascale: of the environment, else of the metadata server; "" without."""
    if (value := os.environ.get(key)) is not None:
        return value
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    try:
        text = _metadata("tpu-env")
    except OSError:  # in Kubernetes the variables say it all
        return ""
    found = re.search(rf"^\s*{key}\s*:\s*'?([^'\n]*)'?\s*$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _metadata(key: str) -> str:
    """An attribute of this machine as the metadata server of Google Cloud has it; "" if it has none.

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
