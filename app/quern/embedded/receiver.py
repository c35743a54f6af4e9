"""An HTTP server on loopback that records every request and answers by script: the far end of webhooks."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from quern.embedded.certificate import ServerCertificate
from quern.embedded.recorder import Recorder


@dataclass(frozen=True)
class Answer:
    """What to say to one request: after `delay` seconds this status, or with `hang_up` a closed connection."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0
    hang_up: bool = False


@dataclass(frozen=True)
class ReceivedRequest:
    """One request as it came in; `headers` is looked up without regard to case."""

    method: str
    path: str
    headers: Message
    body: bytes
    answered: Answer
    received_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Receiver:
    """Serves between `start` and `stop` (or as a context manager), one thread per connection.

    Scripted answers are used up one by one, those for the very path first, then those for any path; afterwards, and
    without a script, `default` answers.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: ServerCertificate | None = None,
        default: Answer | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.default = default or Answer()
        self._certificate = certificate
        self._requests = Recorder[ReceivedRequest]("webhook receiver")
        self._scripts: dict[str | None, deque[Answer]] = {}
        self._script_lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"{'https' if self._certificate else 'http'}://{self.host}:{self.port}"

    @property
    def requests(self) -> list[ReceivedRequest]:
        """All requests, in order of arrival."""
        return self._requests.items()

    def start(self) -> None:
        """Listen; from here on `port` is the real one, and stays the same over `stop` and `start`."""
        self._server = _Server(self, self.port, self._certificate)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="receiver", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the listener. The requests stay readable."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    def script(self, *answers: Answer, path: str | None = None) -> None:
        """Queue answers for the next requests, to `path` (query included) or to any."""
        with self._script_lock:
            self._scripts.setdefault(path, deque()).extend(answers)

    def clear(self) -> None:
        """Forget the requests and the scripts."""
        self._requests.clear()
        with self._script_lock:
            self._scripts.clear()

    def wait_for(self, predicate: Callable[[ReceivedRequest], bool], timeout: float = 60.0) -> ReceivedRequest:
        """The first request for which `predicate` holds. Raises TimeoutError after `timeout` seconds."""
        return self._requests.wait_for(predicate, timeout)

    def wait_for_count(
        self, count: int, predicate: Callable[[ReceivedRequest], bool] = lambda _: True, timeout: float = 60.0
    ) -> list[ReceivedRequest]:
        """At least `count` requests for which `predicate` holds. Raises TimeoutError after `timeout` seconds."""
        return self._requests.wait_for_count(count, predicate, timeout)

    def handle(self, method: str, path: str, headers: Message, body: bytes) -> Answer:
        """Record one request and choose its answer."""
        with self._script_lock:
            script = next((s for key in (path, None) if (s := self._scripts.get(key))), None)
            answer = script.popleft() if script else self.default
        self._requests.record(ReceivedRequest(method, path, headers, body, answer))
        return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # socketserver's default of 5 refuses a burst of deliveries.
    request_queue_size = 256

    def __init__(self, receiver: Receiver, port: int, certificate: ServerCertificate | None) -> None:
        self.receiver = receiver
        self.tls = certificate.server_context() if certificate else None
        super().__init__((receiver.host, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "quern-receiver"
    sys_version = ""
    timeout = 120
    server: _Server

    def setup(self) -> None:
        # The handshake belongs to the connection's thread: in the accepting one a slow client would stop everybody.
        if self.server.tls is not None:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def _answer(self) -> None:
        answer = self.server.receiver.handle(self.command, self.path, self.headers, self._body())
        if answer.delay:
            time.sleep(answer.delay)
        if answer.hang_up:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    # The names are http.server's: it looks for do_ and the method.
    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size)
            if len(body) < size:
                # Its sender was killed in the middle of it: no request arrived.
                raise ConnectionResetError(f"expected {size} bytes, found {len(body)}")
            return body
        chunks = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(chunks)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: the record is the log."""
