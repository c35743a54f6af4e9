"""Bodies that are rubbish, too large, too deep or too slow: a clear 4xx, and a service that goes on."""

import base64
import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.app.api.client import PATIENCE_SECONDS, Client, House, Json

CORPUS = Path(__file__).parent.parent / "forms" / "corpus" / "rubbish_bodies.json"
ENTRIES: list[Json] = json.loads(CORPUS.read_text())
LIMIT = 1_048_576


def _options(*values: str) -> list[Json]:
    return [{"value": value} for value in values]


SURVEY: list[Json] = [
    {"name": "name", "type": "text", "max_length": 200},
    {"name": "email", "type": "email"},
    {"name": "sector", "type": "choice", "options": _options("retail", "health", "energy"), "required": True},
    {"name": "visit_date", "type": "date"},
    {"name": "rating", "type": "rating", "scale": 5, "required": True},
    {"name": "topics", "type": "multiple_choice", "options": _options("staff", "price", "waiting")},
    {"name": "comment", "type": "long_text", "max_length": 10_000, "required": True},
    {"name": "consent", "type": "consent", "required": True},
]
GOOD: Json = {
    "name": "Maud Ellery",
    "email": "maud@example.org",
    "sector": "retail",
    "visit_date": "2026-03-02",
    "rating": 4,
    "topics": ["staff"],
    "comment": "The queue was short and the clerk was kind.",
    "consent": True,
}


@pytest.fixture(scope="module")
def client(house: House) -> Client:
    return house.client()


@pytest.fixture(scope="module")
def form(client: Client) -> str:
    return client.form(SURVEY)


def _bytes(entry: Json) -> bytes:
    return b"".join(base64.b64decode(part["base64"]) * part["times"] for part in entry["body"])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_rubbish_is_refused_and_nothing_of_it_is_kept(client: Client, form: str, entry: Json) -> None:
    before = client.call("GET", f"/forms/{form}/responses?limit=1")["items"]
    headers = {"Content-Type": entry["content_type"] or ""}
    headers |= entry.get("headers", {})
    answer = client.send("POST", f"/forms/{form}/responses", raw=_bytes(entry), headers=headers)
    assert answer.status in entry["expected"], answer.content[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status
    assert problem["detail"]
    if answer.status == 422:
        assert problem["errors"]
        assert all(len(fault["detail"]) <= 300 for fault in problem["errors"])
    assert client.call("GET", f"/forms/{form}/responses?limit=1")["items"] == before


def test_the_good_body_that_the_rubbish_was_made_of_is_accepted(client: Client, form: str) -> None:
    assert client.submit(form, GOOD)


@pytest.mark.parametrize(
    ("change", "places"),
    [
        ({"sector": "finance"}, ["/answers/sector"]),
        ({"rating": 6, "email": "maud@"}, ["/answers/email", "/answers/rating"]),
        ({"topics": ["staff", "nonsense"]}, ["/answers/topics/1"]),
        ({"a/b~c": 1}, ["/answers/a~1b~0c"]),
        ({"$where": "sleep(1)"}, ["/answers/$where"]),
        ({"name.first": "x"}, ["/answers/name.first"]),
        ({"": 1}, ["/answers/"]),
    ],
)
def test_a_json_pointer_leads_to_each_fault(client: Client, form: str, change: Json, places: list[str]) -> None:
    answer = client.send("POST", f"/forms/{form}/responses", {"answers": {**GOOD, **change}})
    assert answer.status == 422
    assert sorted(answer.pointers) == places


def test_a_missing_field_is_pointed_to(client: Client, form: str) -> None:
    answers = {name: value for name, value in GOOD.items() if name != "comment"}
    assert client.send("POST", f"/forms/{form}/responses", {"answers": answers}).pointers == ["/answers/comment"]
    assert client.send("POST", f"/forms/{form}/responses", {}).pointers == ["/answers"]


def test_pointers_reach_into_groups(client: Client) -> None:
    rows = {"name": "rows", "type": "group", "repeated": True, "fields": [{"name": "n", "type": "number"}]}
    form = client.form([rows])
    answer = client.send("POST", f"/forms/{form}/responses", {"answers": {"rows": [{"n": 1}, {"n": "x", "m": 1}]}})
    assert sorted(answer.pointers) == ["/answers/rows/1/m", "/answers/rows/1/n"]


def test_of_very_many_faults_some_are_told(client: Client, form: str) -> None:
    answer = client.send("POST", f"/forms/{form}/responses", {"answers": {f"x{n}": 1 for n in range(80_000)}})
    assert answer.status == 422
    assert 1 <= len(answer.pointers) <= 50
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("door", ["nginx", "gunicorn"])
@pytest.mark.parametrize("size", [LIMIT + 1, 8 * LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_is_413(house: House, client: Client, form: str, door: str, size: int, chunked: bool) -> None:
    head = f"POST /api/v1/forms/{form}/responses HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n"
    body = b"[" + b" " * (size - 2) + b"]"
    if chunked:
        head += "Transfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        head += f"Content-Length: {size}\r\n\r\n"
    with _door(house, door) as connection:
        try:
            connection.sendall(head.encode() + body)
        except OSError:
            # It answered, and closed before it had read everything, which it may.
            pass
        answer = _read(connection)
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:300]
    assert b"application/problem+json" in answer


@pytest.mark.parametrize("door", ["nginx", "gunicorn"])
def test_a_client_that_still_sends_sees_why_it_was_refused(house: House, client: Client, form: str, door: str) -> None:
    body = b'{"answers": "' + b"x" * (LIMIT - 100) + b'"}'
    nobody = client.with_key(None) if door == "nginx" else house.direct()
    for _ in range(10):
        assert nobody.send("POST", f"/forms/{form}/responses", raw=body).status == 401


def _door(house: House, door: str) -> socket.socket:
    if door == "nginx":
        host, port = house.stack.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=90)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(90)
    connection.connect(str(house.stack.directory / "api.sock"))
    return connection


def _read(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("media", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_media_type_is_415(client: Client, form: str, media: str | None) -> None:
    headers = {"Content-Type": media or ""}
    answer = client.send("POST", f"/forms/{form}/responses", {"answers": GOOD}, headers=headers)
    assert answer.status == 415


def test_a_compressed_body_is_415(client: Client, form: str) -> None:
    answer = client.send("POST", f"/forms/{form}/responses", {"answers": GOOD}, headers={"Content-Encoding": "gzip"})
    assert answer.status == 415


def _slow(house: House, client: Client, form: str, door: str, part: str, stack: ExitStack) -> list[socket.socket]:
    """More clients than there are threads, none of which has sent its whole request."""
    line = f"POST /api/v1/forms/{form}/responses HTTP/1.1\r\nHost: x\r\n"
    head = line + f"Authorization: Bearer {client.key}\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    slow = [stack.enter_context(_door(house, door)) for _ in range(40)]
    for connection in slow:
        connection.sendall((line if part == "head" else head).encode())
        connection.setblocking(False)
    return slow


@pytest.mark.parametrize("part", ["head", "body"])
def test_behind_nginx_slow_clients_keep_nobody_waiting(house: House, client: Client, form: str, part: str) -> None:
    with ExitStack() as stack:
        slow = _slow(house, client, form, "nginx", part, stack)
        for _ in range(10):
            assert client.send("GET", "/forms").status == 200
            assert all(_drip(connection, b"x" if part == "head" else b" ") for connection in slow)


@pytest.mark.parametrize("part", ["head", "body"])
def test_without_nginx_slow_clients_are_cut_off(house: House, client: Client, form: str, part: str) -> None:
    """Each sends one byte now and then, which alone would hold its thread for hours."""
    with ExitStack() as stack:
        left = set(_slow(house, client, form, "gunicorn", part, stack))
        limit = time.monotonic() + PATIENCE_SECONDS
        while left:
            assert time.monotonic() < limit, f"{len(left)} slow clients are still there"
            left = {connection for connection in left if _drip(connection, b"x" if part == "head" else b" ")}
            time.sleep(0.2)
    assert house.direct(client.key).send("GET", "/forms").status == 200


def _drip(connection: socket.socket, byte: bytes) -> bool:
    """Send one byte more; False once the other side has hung up or answered."""
    try:
        connection.send(byte)
        return connection.recv(1000) == b"never"
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_a_form_with_five_hundred_choices_answers_shortly(client: Client) -> None:
    options = _options(*(f"{'x' * 150}{n}" for n in range(500)))
    inner = [{"name": "c", "type": "choice", "options": options}]
    form = client.form([{"name": "rows", "type": "group", "repeated": True, "max_items": 200, "fields": inner}])
    answer = client.send("POST", f"/forms/{form}/responses", {"answers": {"rows": [{"c": "no"}] * 200}})
    assert answer.status == 422
    assert len(answer.content) < 25_000


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/forms/x",
        "/forms/frm_" + "0" * 25,
        "/forms/%00",
        "/forms/%ff",
        "/forms/..%2f..",
        "/nonsense",
        "//api//v1/forms",
    ],
)
def test_paths_that_lead_nowhere_are_404_or_405(client: Client, method: str, path: str) -> None:
    answer = client.send(method, path, {} if method != "GET" else None)
    # nginx itself refuses a NUL.
    assert answer.status in ((400,) if "%00" in path else (404, 405))
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "limit=1&limit=2",
        "cursor=nonsense",
        "cursor=%ff%fe",
        "cursor=" + "x" * 501,
        "cursor=W10",
        "cursor=" + base64.urlsafe_b64encode(b'["9999-12-31T23:59:59-23:59","a"]').decode().rstrip("="),
        "cursor=" + base64.urlsafe_b64encode('["²","a"]'.encode()).decode().rstrip("="),
        "created_from=yesterday",
        "created_from=2026-01-01",
        "created_from=2026-01-01T00:00:00",
        "created_from=0001-01-01T00:00:00%2B14:00",
        "created_from=5",
        "where=rating",
        "where=nonsense:1",
        "where=rating:x",
        "where=consent:yes",
        "where=$where:1",
        "status=erased",
        "odd=1",
    ],
)
def test_query_parameters_that_mean_nothing_are_refused(client: Client, form: str, query: str) -> None:
    answer = client.send("GET", f"/forms/{form}/responses?{query}")
    assert answer.status == 422, answer.content
    assert answer.pointers == ["?" + query.split("=")[0]]


@pytest.mark.parametrize("position", ["²", "9" * 400, "-1", "1e3", ""])
def test_a_forged_cursor_of_versions_is_refused(client: Client, form: str, position: str) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps([position]).encode()).decode().rstrip("=")
    answer = client.send("GET", f"/forms/{form}/versions?cursor={cursor}")
    assert (answer.status, answer.pointers) == (422, ["?cursor"])


def test_a_client_chooses_neither_address_nor_host(client: Client, house: House) -> None:
    """No answer is built from what a client says the host is, and nothing is redirected there."""
    evil = {"X-Forwarded-Host": "evil.example", "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "ftp"}
    for path in ("/forms", "/forms/", "//api/v1//forms", "//api/docs"):
        answer = client.send("GET", path, headers=evil)
        seen: Any = repr(answer)
        assert "evil.example" not in seen


def test_a_request_id_comes_back_when_it_is_harmless_and_else_a_fresh_one(client: Client) -> None:
    given = client.send("GET", "/forms", headers={"X-Request-ID": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    problem = client.send("GET", "/nonsense", headers={"X-Request-ID": "abc-123"})
    assert problem.json()["request_id"] == problem.headers["x-request-id"] == "abc-123"
    for odd in ('"><script>', "x" * 129, "a b"):
        fresh = client.send("GET", "/forms", headers={"X-Request-ID": odd}).headers["x-request-id"]
        assert fresh != odd
        assert fresh
