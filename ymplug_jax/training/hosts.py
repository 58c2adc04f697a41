"""Connect the processes of a run and detect lost ones: a roll call before JAX starts, then a heartbeat.

All processes connect to the coordinator's address, which belongs to process 0. If a process does not join within the time limit,
process 0 reports its index and host to all processes that did, and they exit with code LOST. The connections stay open as a
heartbeat: if a process dies, exits early or stops answering, all others log its index and host and exit with code LOST, because a
collective with a lost process would block forever. JAX has timeouts for both cases, but they do not name the host to look at.
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

LOST = 4  # exit code: another process is missing or lost; starting the same command on all hosts resumes the run
GRACE = 10  # seconds in which other processes that hit the same error may log it and exit by themselves
PORT_WAIT = 20  # seconds to wait for the previous run to release the port


def without_accelerator() -> None:
    """Select the CPU backend on a host without TPU or GPU device files, unless JAX_PLATFORMS is set.

    With libtpu installed for ahead-of-time compilation, JAX would otherwise first search the network for a TPU. Call this before
    JAX is imported.
    """
    files = [
        *Path("/dev").glob("accel*"),
        *Path("/dev").glob("vfio/*"),
        *Path("/dev").glob("nvidia*"),
        *Path("/dev").glob("kfd"),
    ]
    if sys.platform == "linux" and not files and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def join(meeting: Meeting, timeout: float, heartbeat: float) -> None:
    """Wait for all processes, start JAX's distributed runtime and start the heartbeat.

    Args:
      meeting: result of `cluster.find`.
      timeout: seconds within which all processes must join, counted from the first one.
      heartbeat: seconds without a message after which a process counts as lost.

    Raises:
      HostsError: a process did not join in time.
    """
    global _watch
    import jax

    begin = time.monotonic()
    logging.info(
        "process %d of %d: waiting for the other processes at %s", meeting.number, meeting.count, meeting.address
    )
    peers = _RollCall(meeting, timeout).hear() if meeting.number == 0 else [_answer(meeting, timeout)]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    left = max(30, timeout - (time.monotonic() - begin))
    jax.distributed.initialize(
        meeting.address,
        meeting.count,
        meeting.number,
        meeting.devices,
        cluster_detection_method="deactivate",  # `cluster.find` has done it
        initialization_timeout=int(left),
        heartbeat_timeout_seconds=int(heartbeat) + 30,  # longer than ours: `_Watch` knows the host names
    )
    _watch = _Watch(peers, meeting, heartbeat)


@dataclasses.dataclass
class _Peer:
    """The process at the other end of a connection."""

    number: int
    host: str
    socket: socket.socket
    heard: float = 0.0  # time.monotonic() of its last message
    rest: bytes = b""  # start of a line that is still incomplete
    done: bool = False  # whether it announced its exit

    def __str__(self) -> str:
        return f"process {self.number} ({self.host})"

    def say(self, **words: object) -> None:
        """Send one line of JSON. Errors are ignored: a lost peer is detected by reading."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(words).encode() + b"\n")

    def lines(self) -> list[dict[str, Any]] | None:
        """Return the messages received since the last call; None if the connection has closed. The socket must be readable."""
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
            return None  # not a process of this run


class _RollCall:
    """Process 0's side: collects a connection from every other process, or sends the error to those that connected."""

    def __init__(self, meeting: Meeting, timeout: float):
        self._meeting = meeting
        self._begin = time.monotonic()
        self._deadline = self._begin + timeout
        self._callers: list[_Peer] = []  # all connections; number is -1 until the caller identifies itself
        self._here: dict[int, _Peer] = {}
        self._problem = ""

    def hear(self) -> list[_Peer]:
        """Wait for all processes and return the connections.

        Raises:
          HostsError: a process did not join in time, or the processes disagree about their indices or count.
        """
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
        """Read the index, host and process count that a caller sends."""
        lines = peer.lines()
        if lines is None:  # a port scan, or a process that exited while waiting
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
                self._problem = (
                    f"--processes: {peer} was started with {line['count']}, process 0 with {self._meeting.count}; give the same "
                    "number on all hosts"
                )
            elif other is not peer:
                self._problem = (
                    f"--process_id {peer.number}: used by two processes, on {other.host} and on {peer.host}; give each process "
                    "its own index"
                )


def _listen(port: int, deadline: float) -> socket.socket:
    deadline = min(deadline, time.monotonic() + PORT_WAIT)
    while True:
        try:
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
            except (OSError, ValueError):  # no IPv6 on this host
                return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"port {port} on {socket.gethostname()}: {error.strerror}; choose another port in --coordinator"
                ) from None
            time.sleep(0.5)


def _missing(meeting: Meeting, here: dict[int, _Peer], waited: float) -> str:
    def some(items: Sequence[str], most: int = 16) -> str:
        return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

    names = [f" ({name})" for name in meeting.names] or [""] * meeting.count
    gone = [f"process {i}{names[i]}" for i in range(1, meeting.count) if i not in here]
    came = [f"process 0 ({socket.gethostname()})", *(str(here[i]) for i in sorted(here))]
    return (
        f"{len(gone)} of {meeting.count} processes did not join at {meeting.address} within {waited:.0f} s: {some(gone)}; joined: "
        f"{some(came)}; start the same command on the missing hosts, check that they can reach this address, or increase "
        "--start_timeout"
    )


def _answer(meeting: Meeting, timeout: float) -> _Peer:
    """All processes but 0: connect to process 0 and return the connection once all processes have joined."""
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
        # A TCP self-connection: nobody listens, and the system chose this very port for our own end.
        if connection.getsockname() == connection.getpeername():
            connection.close()
            continue
        peer.say(number=meeting.number, count=meeting.count, host=socket.gethostname(), left=left)
        connection.settimeout(1)
        while time.monotonic() < deadline + GRACE:  # wait longer than process 0, which knows who is missing
            lines = peer.lines()
            if lines is None:  # the previous run or process 0 exited: connect again
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
        f"process {meeting.number} ({socket.gethostname()}): no answer from process 0 at {meeting.address} within "
        f"{timeout:.0f} s ({trouble}); start process 0 on that host, open the port to this host, or increase --start_timeout"
    )


class _Watch:
    """A heartbeat thread. Every process exchanges messages with process 0, which tells all others about a lost one."""

    def __init__(self, peers: list[_Peer], meeting: Meeting, heartbeat: float):
        self._peers, self._first, self._heartbeat = peers, meeting.number == 0, heartbeat
        self._failed, self._ends = "", float("inf")  # another process's error; when to exit because of it
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
                        self._end(f"{peer} is lost: no message for {self._heartbeat:.0f} s")
                if time.monotonic() > self._ends:
                    self._end(self._failed)

    def _hear(self, peer: _Peer) -> bool:
        """Handle the peer's messages; return whether the connection is still open."""
        lines = peer.lines()
        peer.heard = time.monotonic()
        for line in lines or []:
            if "gone" in line:
                self._end(line["gone"])
            if "done" in line:
                peer.done = True
                if line["done"] and not self._failed:
                    self._failed = f"{peer} exited with code {line['done']}; see the output of that process"
                    self._ends = time.monotonic() + GRACE
        if lines is None and not peer.done:
            self._end(f"{peer} is lost: its connection closed")
        return lines is not None

    def _end(self, reason: str) -> None:
        if self._first:
            for peer in self._peers:
                peer.say(gone=reason)
        logging.error("error: %s", reason)
        logging.error("exiting; start the same command on all hosts to resume from the newest checkpoint")
        _exit(LOST)

    def leave(self, code: int) -> None:
        """Tell the other processes that this one is done; with a non-zero code, exit here."""
        for peer in self._peers:
            peer.say(done=code)
        if code:
            end = time.monotonic() + GRACE
            while self._first and time.monotonic() < end and not all(peer.done for peer in self._peers):
                time.sleep(0.1)  # if process 0 exits first, JAX aborts the others before they log their error
            _exit(code)


_watch: _Watch | None = None


def announced(program: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Wrap `program` so that it announces its exit code to the other processes; an uncaught exception becomes code 1."""

    def run(argv: list[str]) -> int:
        try:
            code = program(argv)
        except Exception as error:
            if _watch is None:
                raise
            if type(error).__name__ == "JaxRuntimeError":
                time.sleep(GRACE / 2)  # a failed transfer: give `_Watch` time to name the lost process
            traceback.print_exc()
            code = 1
        if _watch is not None:
            _watch.leave(code)
        return code

    return run


def _exit(code: int) -> None:
    """Exit immediately: JAX's normal shutdown waits for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
