import http.client
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from quern.embedded.nginx import Nginx


class Upstream(BaseHTTPRequestHandler):
    """Tells what it was asked, except that a path ending in /events streams: one event, then one more when released."""

    protocol_version = "HTTP/1.1"
    name = ""
    release = threading.Event()

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/events"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("X-Upstream", self.name)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"data: first\n\n")
            self.wfile.flush()
            self.release.wait(600)
            self.wfile.write(b"data: second\n\n")
            return
        said = json.dumps({"upstream": self.name, "path": self.path, "headers": dict(self.headers)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None: ...


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def upstream(socket: Path, name: str) -> Iterator[type[Upstream]]:
    handler = type("NamedUpstream", (Upstream,), {"name": name, "release": threading.Event()})
    with UnixServer(str(socket), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield handler
        server.shutdown()
        thread.join()
    socket.unlink()


@pytest.fixture
def front(run_directory: Path) -> Iterator[Nginx]:
    nginx = Nginx(
        run_directory / "nginx",
        api_socket=run_directory / "api.sock",
        events_socket=run_directory / "events.sock",
    )
    with nginx:
        yield nginx


@pytest.fixture
def api(run_directory: Path) -> Iterator[type[Upstream]]:
    with upstream(run_directory / "api.sock", "api") as handler:
        yield handler


@pytest.fixture
def events(run_directory: Path) -> Iterator[type[Upstream]]:
    with upstream(run_directory / "events.sock", "events") as handler:
        yield handler


def ask(
    front: Nginx, path: str, body: bytes | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
    method = "GET" if body is None else "POST"
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response, json.loads(response.read())


@pytest.mark.usefixtures("events", "api")
@pytest.mark.parametrize("path", ["/api/v1/forms", "/api/v1/jobs/job_1", "/", "/api/v1/jobs/a/b/events/c"])
def test_everything_but_event_streams_goes_to_the_api(front: Nginx, path: str) -> None:
    _, said = ask(front, path)
    assert (said["upstream"], said["path"]) == ("api", path)


@pytest.mark.usefixtures("api")
def test_an_event_reaches_the_client_while_the_stream_is_still_open(front: Nginx, events: type[Upstream]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
    connection.request("GET", "/api/v1/jobs/job_1/events")
    response = connection.getresponse()
    assert response.headers["X-Upstream"] == "events"
    assert response.readline() == b"data: first\n"
    events.release.set()
    assert response.read() == b"\ndata: second\n\n"


@pytest.mark.usefixtures("api")
def test_a_clients_request_identifier_travels_on(front: Nginx) -> None:
    _, said = ask(front, "/", X_Request_ID="order-4711")
    assert said["headers"]["X-Request-ID"] == "order-4711"


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("claimed", ["two words", 'quote"', "x" * 129, ""])
def test_a_missing_or_harmful_request_identifier_is_replaced(front: Nginx, claimed: str) -> None:
    _, said = ask(front, "/", X_Request_ID=claimed)
    assert len(said["headers"]["X-Request-ID"]) == 32
    assert said["headers"]["X-Request-ID"] != claimed


@pytest.mark.usefixtures("api")
def test_a_clients_claims_about_its_address_are_overwritten(front: Nginx) -> None:
    _, said = ask(front, "/", X_Forwarded_For="10.9.8.7", X_Forwarded_Proto="https")
    assert said["headers"]["X-Forwarded-For"] == "127.0.0.1"
    assert said["headers"]["X-Forwarded-Proto"] == "http"


@pytest.mark.usefixtures("api")
def test_a_body_up_to_the_limit_passes_and_one_over_it_is_a_problem_document(front: Nginx) -> None:
    limit = 2 * 1024 * 1024
    accepted, said = ask(front, "/", b"x" * limit)
    assert (accepted.status, said["upstream"]) == (200, "api")
    refused, problem = ask(front, "/", b"x" * (limit + 1))
    assert refused.status == 413
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert (problem["status"], problem["title"]) == (413, "Content Too Large")


@pytest.mark.parametrize("path", ["/api/v1/forms", "/api/v1/jobs/job_1/events"])
def test_while_an_upstream_is_away_clients_are_told_to_come_back(front: Nginx, path: str) -> None:
    response, problem = ask(front, path, X_Request_ID="order-4711")
    assert (response.status, problem["status"]) == (503, 503)
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Retry-After"] == "2"
    assert response.headers["X-Request-ID"] == "order-4711"


@pytest.mark.usefixtures("api")
def test_it_comes_back_on_its_port_after_sigkill(front: Nginx) -> None:
    port = front.port
    front.kill()
    front.start()
    assert front.port == port
    assert ask(front, "/")[0].status == 200


def test_a_pattern_that_could_change_the_configuration_is_refused(run_directory: Path) -> None:
    with pytest.raises(ValueError, match="expected a pattern"):
        Nginx(run_directory, api_socket=run_directory / "a", events_socket=run_directory / "e", event_streams=['^/" {'])
