"""One front door for the session, in front of upstreams that say which they are, and a client that sends bytes."""

import shutil
import socket
import socketserver
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.waf.front_door import FrontDoor

#: Answers: status and whether an upstream gave it.
Verdict = tuple[int, bool]
Send = Callable[[bytes], Verdict]
#: Answers with an answer's status line and headers, empty where the connection was closed without one.
Ask = Callable[[bytes], str]


class _Upstream(BaseHTTPRequestHandler):
    """Takes everything and says who it is."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("X-Upstream", Path(str(self.server.server_address)).stem)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None: ...


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


@pytest.fixture(scope="session")
def waf_directory() -> Iterator[Path]:
    """A folder with a path short enough for UNIX sockets."""
    directory = Path(tempfile.mkdtemp(prefix="q-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def front_door(waf_directory: Path) -> Iterator[FrontDoor]:
    """The role's nginx, without the limits for each address: all these requests come from one."""
    servers = [UnixServer(str(waf_directory / f"{name}.sock"), _Upstream) for name in ("api-1", "api-2", "events")]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    limits: dict[str, Any] = {"nginx_requests_per_second": 100_000, "nginx_burst": 100_000, "nginx_connections": 10_000}
    with FrontDoor(waf_directory, nginx_waf_code_forms=["frm_C0DE456789ABCDEFGHJKMNPQRS"], **limits) as running:
        yield running
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def ask(front_door: FrontDoor) -> Ask:
    """Send one request on a connection of its own."""
    context = front_door.certificate.client_context()

    def exchange(request: bytes) -> str:
        with (
            socket.create_connection(("127.0.0.1", front_door.port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            # nginx may answer, and close, before it has read all of a request that it refuses.
            try:
                tls.sendall(request)
            except (ssl.SSLError, OSError):
                pass
            answer = b""
            try:
                while b"\r\n\r\n" not in answer and (more := tls.recv(65536)):
                    answer += more
            except (ssl.SSLError, OSError):
                pass
        return answer.partition(b"\r\n\r\n")[0].decode("latin-1")

    return exchange


def verdict_of(head: str) -> Verdict:
    """Of an answer's head; a connection closed without an answer is status 0."""
    return (int(head.split()[1]) if head.startswith("HTTP/") else 0), "\r\nX-Upstream: " in head


@pytest.fixture(scope="session")
def send(ask: Ask) -> Send:
    return lambda request: verdict_of(ask(request))


@pytest.fixture(scope="session")
def ask_all(ask: Ask) -> Callable[[Sequence[bytes]], list[str]]:
    """Many requests, a few at once, heads of the answers in order."""

    def exchange(requests: Sequence[bytes]) -> list[str]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(ask, requests))

    return exchange
