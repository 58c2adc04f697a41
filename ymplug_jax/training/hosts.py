"""Several processes become one run: where they meet, a roll call before JAX starts, and word of one that is gone.

The processes meet at the coordinator's address, which is process 0's. Before JAX binds that port, process 0 hears the roll there:
whoever is missing after the time limit is named, to all that came. The connections of the roll call stay open, and a process that
dies, ends early or falls silent is named to all others, which then end with exit code LOST: a collective with a process that
is gone would wait for ever. JAX has timeouts for both, but they end the process without saying which host to look at.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait  # as select, for any number of sockets
from pathlib import Path

LOST = 4  # exit code: another process is missing or gone; the same command on all hosts goes on
GRACE = 10  # seconds for the others to end by the same mistake and say so themselves
PORT_WAIT = 20  # seconds until the last run must have let go of the port


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


def without_accelerator() -> None:
    """Tell JAX to take the CPU where this host has no device file of a TPU or GPU and the user says nothing: with the extra `tpu`
    installed for its compiler, JAX would look for a TPU over the network first. Call it before JAX is imported."""
    files = [
        *Path("/dev").glob("accel*"),
        *Path("/dev").glob("vfio/*"),
        *Path("/dev").glob("nvidia*"),
        *Path("/dev").glob("kfd"),
    ]
    if sys.platform == "linux" and not files and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def find(coordinator: str | None, processes: int | None, process_id: int | None, timeout: float) -> Meeting | None:
    """The meeting that the flags name; without them the one that SLURM or a TPU slice knows; None for a process alone.

    Raises:
      ValueError: some of the three flags without the others, or numbers that cannot be.
      HostsError: the platform does not know process 0's address within `timeout` seconds.
    """
    given = (coordinator, processes, process_id)
    if given != (None, None, None):
        if None in given:
            raise ValueError("--coordinator, --processes and --process_id belong together; give all three or none")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"--coordinator {coordinator!r}: write host:port of process 0")
        if not 0 <= process_id < processes:
            raise ValueError(f"--process_id {process_id} is not in 0 to {processes - 1} of --processes {processes}")
        return Meeting(coordinator, processes, process_id)
    # What JAX itself asks for the platform; its own start would hide who is missing.
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

    try:
        platform = next((c for c in (SlurmCluster, GkeTpuCluster, GceTpuCluster) if c.is_env_present()), None)
        if platform is None or (count := platform.get_process_count()) == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = platform.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)
        number = platform.get_process_id()
        workers = (
            _nodes(os.environ["SLURM_STEP_NODELIST"])
            if platform is SlurmCluster
            else platform._get_worker_list_in_slice()
        )
    except OSError as error:  # a machine with TPU chips that no metadata server speaks for
        logging.warning("no word from the platform about other hosts (%s); this process goes on alone", error)
        return None
    except RuntimeError as error:
        raise HostsError(f"{error} within {timeout:.0f} s; look whether that host has started") from None
    names = tuple(workers) if len(workers) == count else ()
    return Meeting(address, count, number, names, _own_devices() if platform is SlurmCluster else None)


def _nodes(text: str) -> list[str]:
    """SLURM's list of nodes, "a[1,03-05],b" -> a1 a03 a04 a05 b; one level of brackets."""
    nodes = []
    for prefix, inside, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        for part in inside.split(",") if inside else [""]:
            low, _, high = part.partition("-")
            numbers = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] if high else [low]
            nodes += [prefix + number + suffix for number in numbers]
    return nodes


def _own_devices() -> tuple[int, ...] | None:
    """The GPU of this task where SLURM runs several on a node and each sees all GPUs; else all that are seen."""
    per_node = int(re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return (int(os.environ["SLURM_LOCALID"]),) if per_node > 1 and len(seen) > 1 else None


def join(meeting: Meeting, timeout: float, heartbeat: float) -> None:
    """Wait for all processes, start JAX's distributed runtime, and watch over the others from then on.

    Args:
      meeting: from `find`.
      timeout: seconds until all must have come, counted from the first.
      heartbeat: seconds of silence after which a process counts as gone.

    Raises:
      HostsError: some process did not come.
    """
    global _watch
    import jax

    begin = time.monotonic()
    logging.info("process %d of %d waits for the others at %s", meeting.number, meeting.count, meeting.address)
    peers = _hear(meeting, timeout) if meeting.number == 0 else [_answer(meeting, timeout)]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    left = max(30, timeout - (time.monotonic() - begin))
    jax.distributed.initialize(
        meeting.address,
        meeting.count,
        meeting.number,
        meeting.devices,
        cluster_detection_method="deactivate",  # `find` has asked
        initialization_timeout=int(left),
        heartbeat_timeout_seconds=int(heartbeat) + 30,  # the watch speaks first: it knows the names
    )
    _watch = _Watch(peers, meeting, heartbeat)


@dataclasses.dataclass
class _Peer:
    """A process at the other end of a connection."""

    number: int
    host: str
    socket: socket.socket
    heard: float = 0.0  # clock of its last word
    rest: bytes = b""  # of a line that has not ended
    done: bool = False

    def __str__(self) -> str:
        return f"process {self.number} ({self.host})"

    def say(self, **words) -> None:
        """One line of JSON; a peer that is gone is noticed by reading."""
        try:
            self.socket.sendall(json.dumps(words).encode() + b"\n")
        except OSError:
            pass

    def lines(self) -> list[dict] | None:
        """What has come since the last call; None: the connection has ended. For a socket that is ready to read."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        try:
            return [json.loads(line) for line in whole]
        except ValueError:
            return None  # not one of us


def _hear(meeting: Meeting, timeout: float) -> list[_Peer]:
    """Process 0: one connection of every other process, or an error to all that came."""
    begin = time.monotonic()
    deadline = begin + timeout
    callers: list[_Peer] = []  # all that called; number -1 until one has said who it is
    here: dict[int, _Peer] = {}
    problem = ""
    with _listen(int(meeting.address.rsplit(":", 1)[1]), deadline) as server:
        while len(here) < meeting.count - 1 and not problem:
            if (left := deadline - time.monotonic()) <= 0:
                problem = _missing(meeting, here, time.monotonic() - begin)
                break
            known = {peer.socket: peer for peer in callers}
            for ready in wait([server, *known], min(left, 1.0)):
                if ready is server:
                    connection, place = server.accept()
                    connection.settimeout(5)
                    callers.append(_Peer(-1, place[0], connection))
                    continue
                peer = known[ready]
                if (lines := peer.lines()) is None:  # a port scan, or a process that ended while it waited
                    ready.close()
                    callers.remove(peer)
                    if here.get(peer.number) is peer:
                        del here[peer.number]
                for line in lines or []:
                    peer.number, peer.host = line["number"], line["host"]
                    deadline = min(deadline, time.monotonic() + line["left"])
                    other = here.setdefault(peer.number, peer)
                    if line["count"] != meeting.count:
                        problem = f"{peer} was started for {line['count']} processes, process 0 for {meeting.count}"
                    elif other is not peer:
                        problem = f"--process_id {peer.number} was given twice, on {other.host} and on {peer.host}"
        for peer in callers:
            peer.say(**({"error": problem} if problem else {"welcome": socket.gethostname()}))
    for peer in callers:
        if problem or peer.number < 0:
            peer.socket.close()
    if problem:
        raise HostsError(problem)
    return list(here.values())


def _listen(port: int, deadline: float) -> socket.socket:
    deadline = min(deadline, time.monotonic() + PORT_WAIT)
    while True:
        try:
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
            except (OSError, ValueError):  # no IPv6 here
                return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"port {port} on {socket.gethostname()}: {error.strerror}; give --coordinator another"
                ) from None
            time.sleep(0.5)


def _missing(meeting: Meeting, here: dict[int, _Peer], waited: float) -> str:
    def some(items: Sequence[str], most: int = 16) -> str:
        return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

    names = [f" ({name})" for name in meeting.names] or [""] * meeting.count
    gone = [f"process {i}{names[i]}" for i in range(1, meeting.count) if i not in here]
    came = [f"process 0 ({socket.gethostname()})", *(str(here[i]) for i in sorted(here))]
    return (
        f"after {waited:.0f} s {len(gone)} of {meeting.count} processes have not come to {meeting.address}: {some(gone)}. "
        f"Here are {some(came)}. Start the same command on the missing hosts, look whether they reach that address, or wait "
        "longer with --start_timeout"
    )


def _answer(meeting: Meeting, timeout: float) -> _Peer:
    """Every other process: the connection to process 0, once all have come."""
    host, port = meeting.address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    trouble = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(5, left))
        except OSError as error:
            trouble = error.strerror or str(error) or trouble
            time.sleep(0.3)
            continue
        peer = _Peer(0, host, connection)
        if (
            connection.getsockname() == connection.getpeername()
        ):  # nobody listens, and the system's own port was just that
            connection.close()
            continue
        peer.say(number=meeting.number, count=meeting.count, host=socket.gethostname(), left=left)
        connection.settimeout(1)
        while time.monotonic() < deadline + GRACE:  # process 0 knows who is missing: let it say so
            lines = peer.lines()
            if lines is None:  # a run before this one, or process 0 ended: call again
                break
            for line in lines:
                if "error" in line:
                    raise HostsError(line["error"])
                peer.host = line["welcome"]
                connection.settimeout(5)
                return peer
        connection.close()
        time.sleep(0.3)
    raise HostsError(
        f"process 0 did not answer at {meeting.address} for {timeout:.0f} s ({trouble}); this is process {meeting.number} on "
        f"{socket.gethostname()}. Start process 0 there, open the port to this host, or wait longer with --start_timeout"
    )


class _Watch:
    """A thread that talks to the others. All talk to process 0; process 0 tells the others who is gone."""

    def __init__(self, peers: list[_Peer], meeting: Meeting, heartbeat: float):
        self._peers, self._first, self._heartbeat = peers, meeting.number == 0, heartbeat
        for peer in peers:
            peer.heard = time.monotonic()
        threading.Thread(target=self._run, daemon=True, name="hosts").start()

    def _run(self) -> None:
        pause = max(0.5, self._heartbeat / 5)
        spoken, failed, ends = 0.0, "", float("inf")
        open_ = list(self._peers)
        while open_:
            now = time.monotonic()
            if now - spoken >= pause:
                spoken = now
                for peer in open_:
                    peer.say()
            for ready in wait([peer.socket for peer in open_], min(pause, 1.0)):
                peer = next(peer for peer in open_ if peer.socket is ready)
                lines = peer.lines()
                peer.heard = time.monotonic()
                for line in lines or []:
                    if "gone" in line:
                        self._end(line["gone"])
                    if "done" in line:
                        peer.done = True
                        if line["done"] and not failed:
                            failed, ends = (
                                f"{peer} ended with exit code {line['done']}; its own output says why",
                                now + GRACE,
                            )
                if lines is None:
                    open_.remove(peer)
                    if not peer.done:
                        self._end(f"{peer} is gone: its connection has ended")
            silent = [peer for peer in open_ if not peer.done and time.monotonic() - peer.heard > self._heartbeat]
            if silent:
                self._end(f"{silent[0]} is gone: no sign of life for {self._heartbeat:.0f} s")
            if time.monotonic() > ends:
                self._end(failed)

    def _end(self, reason: str) -> None:
        if self._first:
            for peer in self._peers:
                peer.say(gone=reason)
        logging.error("error: %s", reason)
        logging.error("this process ends with it; the same command on all hosts goes on from the newest checkpoint")
        _exit(LOST)

    def leave(self, code: int) -> None:
        """Tell the others that this process is through; with a code other than 0 it ends here."""
        for peer in self._peers:
            peer.say(done=code)
        if code:
            end = time.monotonic() + GRACE
            while self._first and time.monotonic() < end and not all(peer.done for peer in self._peers):
                time.sleep(0.1)  # without process 0 JAX ends the others before they can say what is wrong
            _exit(code)


_watch: _Watch | None = None


def announced(program: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """The program, which tells the other processes how it ended: with an exit code, or with an error that nobody expects."""

    def run(argv: list[str]) -> int:
        try:
            code = program(argv)
        except Exception as error:
            if _watch is None:
                raise
            if type(error).__name__ == "JaxRuntimeError":
                time.sleep(GRACE / 2)  # where a transfer has failed, the watch is about to say whose fault it is
            traceback.print_exc()
            code = 1
        if _watch is not None:
            _watch.leave(code)
        return code

    return run


def _exit(code: int) -> None:
    """At once: an orderly end of JAX waits for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
