"""nginx as the role configures it: streams, failover, repeats, caching, refusals, limits."""

import http.client
import json
import socket
import socketserver
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx2
import pytest

from quern.embedded import demo
from tests.waf.attacks import RESPONSES
from tests.waf.conftest import UnixServer
from tests.waf.front_door import FrontDoor

ATTACK = b'{"answers": {"comment": "1\' UNION SELECT password FROM users -- "}}'
HARMLESS = b'{"answers": {"comment": "All is well."}}'


class Upstream(BaseHTTPRequestHandler):
    """Counts what reaches it; may stream, or hang up as soon as a request has arrived."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str]]
    hang_up = False
    release: threading.Event

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path))
        if self.hang_up:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("X-Request-ID", self.headers["X-Request-ID"])
        # A connection that nginx keeps would outlive this upstream's test.
        self.send_header("Connection", "close")
        self.close_connection = True
        if self.path == "/api/openapi.json":
            self.send_header("Cache-Control", "public, max-age=300")
        if self.path.endswith(("/events", "/completions")):
            self.end_headers()
            self.wfile.write(b"data: first\n\n")
            self.wfile.flush()
            self.release.wait(600)
            self.wfile.write(b"data: second\n\n")
            return
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def upstream(socket: Path) -> Iterator[type[Upstream]]:
    handler: type[Upstream] = type("OneUpstream", (Upstream,), {"seen": [], "release": threading.Event()})
    server: socketserver.BaseServer = UnixServer(str(socket), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield handler
    handler.release.set()
    server.shutdown()
    server.server_close()
    thread.join()
    socket.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """A front door of this module's own, whose upstreams come and go."""
    with (
        tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder,
        FrontDoor(Path(folder), nginx_requests_per_second=20, nginx_burst=100) as running,
    ):
        yield running


def wait_until_asked(door: FrontDoor, handler: type[Upstream]) -> None:
    """An instance that failed in the test before is asked again after two seconds."""
    deadline = time.monotonic() + 60
    while not handler.seen:
        assert time.monotonic() < deadline
        ask(door, "GET", "/healthz")
        time.sleep(0.05)
    handler.seen.clear()


@pytest.fixture
def first(door: FrontDoor) -> Iterator[type[Upstream]]:
    with upstream(door.directory / "api-1.sock") as handler:
        wait_until_asked(door, handler)
        yield handler


@pytest.fixture
def second(door: FrontDoor) -> Iterator[type[Upstream]]:
    with upstream(door.directory / "api-2.sock") as handler:
        wait_until_asked(door, handler)
        yield handler


def ask(door: FrontDoor, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[Any, bytes]:
    connection = http.client.HTTPSConnection(
        "127.0.0.1", door.port, timeout=60, context=door.certificate.client_context()
    )
    given = {"Host": "quern.test", **({"Content-Type": "application/json"} if body else {})}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    response = connection.getresponse()
    return response, response.read()


@pytest.mark.parametrize("path", ["/api/v1/jobs/job_1/events", "/v1/chat/completions"])
def test_the_first_byte_of_a_stream_arrives_while_it_is_open(door: FrontDoor, path: str) -> None:
    method, body = ("GET", None) if path.endswith("/events") else ("POST", b'{"stream": true}')
    with upstream(door.directory / "events.sock") as handler:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", door.port, timeout=60, context=door.certificate.client_context()
        )
        connection.request(method, path, body, {"Host": "quern.test", "Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline() == b"data: first\n"
        assert not handler.release.is_set()
        handler.release.set()
        assert response.read() == b"\ndata: second\n\n"


@pytest.mark.usefixtures("second")
def test_a_request_that_finds_no_instance_goes_to_the_other(door: FrontDoor) -> None:
    # Only the second one's socket is there.
    assert {ask(door, "POST", "/api/v1/forms", HARMLESS)[0].status for _ in range(4)} == {200}


@pytest.mark.parametrize(
    ("method", "headers", "repeated"),
    [
        ("PUT", {}, True),
        ("POST", {}, False),
        ("POST", {"Idempotency_Key": "order-4711"}, True),
    ],
)
def test_what_an_instance_died_under_is_repeated_only_if_that_is_harmless(
    door: FrontDoor,
    first: type[Upstream],
    second: type[Upstream],
    method: str,
    headers: dict[str, str],
    repeated: bool,
) -> None:
    first.seen.clear()
    first.hang_up = second.hang_up = True
    response, body = ask(door, method, "/api/v1/forms", HARMLESS, **headers)
    assert response.status == 503
    assert json.loads(body)["status"] == 503
    assert len(first.seen) + len(second.seen) == (2 if repeated else 1)


def test_a_repeatable_request_is_inspected_like_any_other(door: FrontDoor, first: type[Upstream]) -> None:
    refused, _ = ask(door, "POST", RESPONSES, ATTACK, Idempotency_Key="order-4711")
    accepted, _ = ask(door, "POST", RESPONSES, HARMLESS, Idempotency_Key="order-4712")
    assert (refused.status, accepted.status) == (403, 200)
    assert len(first.seen) == 1


def test_what_is_the_same_for_everybody_comes_from_the_cache(door: FrontDoor, first: type[Upstream]) -> None:
    for path in ("/api/openapi.json", "/api/docs/swagger-ui.css"):
        answers = [ask(door, "GET", path, X_Request_ID=f"cached-{number}")[0] for number in range(3)]
        assert [answer.headers["X-Cache"] for answer in answers] == ["MISS", "HIT", "HIT"]
        assert [answer.headers["X-Request-ID"] for answer in answers] == ["cached-0", "cached-1", "cached-2"]
        assert first.seen.count(("GET", path)) == 1


def test_what_is_asked_for_with_a_key_never_comes_from_the_cache(door: FrontDoor, first: type[Upstream]) -> None:
    for _ in range(2):
        ask(door, "GET", "/api/openapi.json", Authorization="Bearer qk_x")
        ask(door, "GET", "/api/v1/forms", Authorization="Bearer qk_x")
    assert first.seen.count(("GET", "/api/openapi.json")) == 2
    assert first.seen.count(("GET", "/api/v1/forms")) == 2


def test_a_refusal_is_a_problem_document_whose_identifier_leads_to_its_reason(door: FrontDoor) -> None:
    response, body = ask(door, "POST", RESPONSES, ATTACK, X_Request_ID="refused-1")
    assert response.status == 403
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["X-Request-ID"] == "refused-1"
    assert json.loads(body)["title"] == "Forbidden"
    reasons = door.findings("refused-1")
    assert ("942270", "json.answers.comment") in {(reason.rule, reason.place) for reason in reasons}


def test_under_v1_a_refusal_has_the_shape_that_clients_of_it_know(door: FrontDoor) -> None:
    response, body = ask(door, "GET", "/v1/models?x=%3Cscript%3Ealert(1)%3C/script%3E")
    assert response.status == 403
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_prompt_may_hold_code_and_a_file_any_number_of_them(door: FrontDoor) -> None:
    prompt = b'{"messages": [{"role": "user", "content": "Mend: SELECT * FROM t WHERE 1=1 -- <script>x</script>"}]}'
    upload = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        + prompt * 40_000
        + b"\r\n--x--\r\n"
    )
    with upstream(door.directory / "events.sock") as handler:
        handler.release.set()
        assert ask(door, "POST", "/v1/chat/completions", prompt)[0].status == 200
        assert ask(door, "POST", "/v1/files", upload, Content_Type="multipart/form-data; boundary=x")[0].status == 200


def test_a_body_that_is_too_large_is_a_problem_document(door: FrontDoor) -> None:
    for path, limit in (("/api/v1/forms", 3 << 20), ("/v1/files", 40 << 20)):
        response, body = ask(door, "POST", path, b'"' + b"x" * limit + b'"')
        assert response.status == 413
        assert ("error" if path.startswith("/v1") else "status") in json.loads(body)


def test_the_demos_form_is_accepted(door: FrontDoor, first: type[Upstream]) -> None:
    form = json.dumps(demo._form("whe_0123456789ABCDEFGHJKMNPQRS")).encode()  # the very one that `make demo` sends
    assert ask(door, "POST", "/api/v1/forms", form)[0].status == 200
    assert first.seen


@pytest.mark.parametrize(
    "text", ["more", "less", "at", "start", "Good food & more", "I'd like less; more or less", "net\nip"]
)
def test_an_answer_that_is_also_a_commands_name_passes(door: FrontDoor, first: type[Upstream], text: str) -> None:
    assert ask(door, "POST", RESPONSES, json.dumps({"answers": {"comment": text}}).encode())[0].status == 200
    assert first.seen


def test_sql_is_accepted_where_it_is_asked_for_and_nowhere_else(door: FrontDoor, first: type[Upstream]) -> None:
    sql = b'{"sql": "SELECT count(*) FROM fact_response WHERE 1 = 1 UNION SELECT 2 -- all"}'
    assert ask(door, "POST", "/api/v1/analytics/sql", sql)[0].status == 200
    assert ask(door, "POST", "/api/v1/analytics/questions", sql)[0].status == 403
    assert first.seen == [("POST", "/api/v1/analytics/sql")]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"])
def test_a_body_that_is_not_json_is_refused_as_such(door: FrontDoor, kind: str) -> None:
    response, body = ask(door, "POST", "/api/v1/forms", b"a=1", Content_Type=kind)
    assert (response.status, json.loads(body)["title"]) == (415, "Unsupported Media Type")


def test_a_target_that_cannot_be_read_is_a_problem_document_too(door: FrontDoor) -> None:
    response, body = ask(door, "GET", "/../../etc/passwd")
    assert (response.status, json.loads(body)["status"]) == (400, 400)


def test_http_2_is_spoken_with_who_offers_it_and_http_1_with_everybody_else(door: FrontDoor) -> None:
    for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1"), ([], None)):
        context = ssl.create_default_context(cafile=str(door.certificate.authority))
        if offered:
            context.set_alpn_protocols(offered)
        with (
            socket.create_connection(("127.0.0.1", door.port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as spoken,
        ):
            assert spoken.selected_alpn_protocol() == chosen
            if chosen == "h2":
                # The preface and empty SETTINGS (RFC 9113, section 3.4); the server's first frame is its own SETTINGS.
                spoken.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
                assert spoken.recv(9)[3] == 4


@pytest.mark.parametrize("http_2", [True, False])
def test_a_body_of_unsaid_length_is_inspected_like_any_other(
    door: FrontDoor, first: type[Upstream], http_2: bool
) -> None:
    with httpx2.Client(http1=not http_2, http2=http_2, verify=door.certificate.client_context(), timeout=60) as client:
        place, kind = f"https://127.0.0.1:{door.port}/api/v1/forms/f/responses", {"Content-Type": "application/json"}
        passed, refused = (
            client.post(place, content=iter([body]), headers={"Host": "quern.test", **kind})
            for body in (HARMLESS, b'{"answers": {"comment": {"$ne": "0"}}}')
        )
    assert "content-length" not in passed.request.headers
    assert passed.http_version == ("HTTP/2" if http_2 else "HTTP/1.1")
    assert (passed.status_code, refused.status_code) == (200, 403)
    assert len(first.seen) == 1


def test_one_address_cannot_ask_without_end() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder,
        FrontDoor(Path(folder), nginx_requests_per_second=1, nginx_burst=2) as strict,
        upstream(Path(folder) / "api-1.sock"),
    ):
        statuses: list[int] = []
        while 429 not in statuses and len(statuses) < 600:
            statuses.append(ask(strict, "GET", "/healthz")[0].status)
    assert statuses[0] == 200
    assert statuses[-1] == 429
