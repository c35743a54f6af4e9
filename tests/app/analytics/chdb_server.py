"""A ClickHouse over HTTP: its real engine, loaded into this process by `chdb`, behind a small server of our own.

It speaks what `clickhouse_engine.Server` uses of ClickHouse's HTTP interface: user and key in headers, settings and
parameters in the URL, the statement as the body, an exception as a status that is not 200 with its text.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import chdb

USER: Final = "quern"
PASSWORD: Final = "correct-horse"
#: One database a process, and it is not made for several threads.
_one_at_a_time = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sql = self.rfile.read(int(self.headers["Content-Length"])).decode()
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        if (self.headers["X-ClickHouse-User"], self.headers["X-ClickHouse-Key"]) != (USER, PASSWORD):
            self._send(403, b"Code: 516. DB::Exception: Authentication failed. (AUTHENTICATION_FAILED)")
            return
        form = query.pop("default_format")
        parameters = {name[6:]: query.pop(name) for name in list(query) if name.startswith("param_")}
        settings = ", ".join(f"{name} = '{value}'" for name, value in query.items())
        try:
            with _one_at_a_time:
                found = chdb.query(f"{sql} SETTINGS {settings}", form, params=parameters)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self._send(500, str(error).encode())
        else:
            self._send(200, found.bytes())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is written to the tests' output."""


@contextmanager
def serve() -> Iterator[str]:
    """The server's URL, as long as it runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
