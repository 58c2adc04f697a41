"""Several processes become one run: where they meet, a roll call before JAX starts, and word of one that is gone.

The processes meet at the coordinator's address, which is process 0's. Before JAX binds that port, process 0 hears the roll there:
whoever is missing after the time limit is named, to all that came. The connections of the roll call stay open, and a process that
dies, ends early or falls silent is named to all others, which then end with exit code LOST: a collective with a process that
is gone would wait for ever. JAX has timeouts for both, but they end the process without saying which host to look at.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ymplug_jax.training.cluster import HostsError, Meeting

LOST = 4  # exit code: another process is missing or gone; the same command on all hosts goes on
GRACE = 10  # seconds for the others to end by the same mistake and say so themselves
PORT_WAIT = 20  # seconds until the last run must have let go of the port


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


def join(meeting: Meeting, timeout: float, heartbeat: float) -> None:
    """Wait for all processes, start JAX's distributed runtime, and watch over the others from then on.

    Args:
      meeting: from `cluster.find`.
      timeout: seconds until all must have come, counted from the first.
      heartbeat: seconds of silence after which a process counts as gone.

    Raises:
      HostsError: some process did not come.
    """
    global _watch
    import jax

    begin = time.monotonic()
    logging.info("process %d of %d waits for the others at %s", meeting.number, meeting.count, meeting.address)
    peers = _RollCall(meeting, timeout).hear() if meeting.number == 0 else [_answer(meeting, timeout)]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    left = max(30, timeout - (time.monotonic() - begin))
    jax.distributed.initialize(
        meeting.address,
        meeting.count,
        meeting.number,
        meeting.devices,
        cluster_detection_method="deactivate",  # `cluster.find` has asked
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

    def say(self, **words: object) -> None:
        """One line of JSON; a peer that is gone is noticed by reading."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(words).encode() + b"\n")

    def lines(self) -> list[dict[str, Any]] | None:
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


class _RollCall:
    """Process 0: one connection of every other process, or an error to all that came."""

    def __init__(self, meeting: Meeting, timeout: float):
        self._meeting = meeting
        self._begin = time.monotonic()
        self._deadline = self._begin + timeout
        self._callers: list[_Peer] = []  # all that called; number -1 until one has said who it is
        self._here: dict[int, _Peer] = {}
        self._problem = ""

    def hear(self) -> list[_Peer]:
        """The connections, once all have come."""
        with (
            _listen(int(self._meeting.address.rsplit(":", 1)[1]), self._deadline) as server,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(server, selectors.EVENT_READ)
            while len(self._here) < self._meeting.count - 1 and not self._problem:
                if (left := self._deadline - time.monotonic()) <= 0:
                    self._problem = _missing(self._meeting, self._here, time.monotonic() - self._begin)
                    break
                for key, _ in selector.select(min(left, 1.0)):
                    if key.data is not None:
                        self._read(key.data, selector)
                        continue
                    connection, place = server.accept()
                    connection.settimeout(5)
                    self._callers.append(_Peer(-1, place[0], connection))
                    selector.register(connection, selectors.EVENT_READ, self._callers[-1])
            for peer in self._callers:
                peer.say(**({"error": self._problem} if self._problem else {"welcome": socket.gethostname()}))
        for peer in self._callers:
            if self._problem or peer.number < 0:
                peer.socket.close()
        if self._problem:
            raise HostsError(self._problem)
        return list(self._here.values())

    def _read(self, peer: _Peer, selector: selectors.BaseSelector) -> None:
        """What a caller says of itself."""
        lines = peer.lines()
        if lines is None:  # a port scan, or a process that ended while it waited
            selector.unregister(peer.socket)
            peer.socket.close()
            self._callers.remove(peer)
            if self._here.get(peer.number) is peer:
                del self._here[peer.number]
        for line in lines or []:
            peer.number, peer.host = line["number"], line["host"]
            self._deadline = min(self._deadline, time.monotonic() + line["left"])
            other = self._here.setdefault(peer.number, peer)
            if line["count"] != self._meeting.count:
                self._problem = f"{peer} was started for {line['count']} processes, process 0 for {self._meeting.count}"
            elif other is not peer:
                self._problem = f"--process_id {peer.number} was given twice, on {other.host} and on {peer.host}"


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
        self._failed, self._ends = "", float("inf")  # another process's error, and until when this one may say the same
        for peer in peers:
            peer.heard = time.monotonic()
        threading.Thread(target=self._look_after, daemon=True, name="hosts").start()

    def _look_after(self) -> None:
        pause = max(0.5, self._heartbeat / 5)
        spoken = 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.socket, selectors.EVENT_READ, peer)
            while open_ := [key.data for key in selector.get_map().values()]:
                if time.monotonic() - spoken >= pause:
                    spoken = time.monotonic()
                    for peer in open_:
                        peer.say()
                for key, _ in selector.select(min(pause, 1.0)):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                for peer in open_:
                    if not peer.done and time.monotonic() - peer.heard > self._heartbeat:
                        self._end(f"{peer} is gone: no sign of life for {self._heartbeat:.0f} s")
                if time.monotonic() > self._ends:
                    self._end(self._failed)

    def _hear(self, peer: _Peer) -> bool:
        """Whether the connection goes on."""
        lines = peer.lines()
        peer.heard = time.monotonic()
        for line in lines or []:
            if "gone" in line:
                self._end(line["gone"])
            if "done" in line:
                peer.done = True
                if line["done"] and not self._failed:
                    self._failed = f"{peer} ended with exit code {line['done']}; its own output says why"
                    self._ends = time.monotonic() + GRACE
        if lines is None and not peer.done:
            self._end(f"{peer} is gone: its connection has ended")
        return lines is not None

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
