"""One attempt to deliver, against real receivers."""

import os
import socket
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from quern.embedded.certificate import ServerCertificate, issue_certificate
from quern.embedded.receiver import Answer, Receiver
from quern.webhooks.deliver import USER_AGENT, client_tls, deliver
from quern.webhooks.guard import Resolver as AnyResolver
from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.settings import WebhookSettings
from quern.webhooks.sign import new_secret

from .conftest import HOST, RawServer, Resolver, loopback_settings, trickle

SECRET = new_secret()
PAYLOAD = b'{"type":"response.completed"}'
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def attempt(
    url: str, settings: WebhookSettings, resolver: AnyResolver | None = None, **changes: Any
) -> DeliveryOutcome:
    values: dict[str, Any] = {
        "message_id": "job_1",
        "payload": PAYLOAD,
        "settings": settings,
        "tls": client_tls(settings),
        "now": datetime.now(UTC),
        "resolver": resolver or Resolver(["127.0.0.1"]),
    }
    return deliver(url, [SECRET], **(values | changes))


def plain(**changes: Any) -> WebhookSettings:
    return loopback_settings(allow_http=True, **changes)


def test_a_signed_message_arrives_over_verified_tls(certificate: ServerCertificate, https_receiver: Receiver) -> None:
    outcome = attempt(
        f"https://{HOST}:{https_receiver.port}/quern?x=1",
        loopback_settings(certificate),
        request_id="req-1",
        traceparent=TRACEPARENT,
    )
    assert (outcome.delivered, outcome.status, outcome.failure) == (True, 200, None)
    assert outcome.address == "127.0.0.1"
    [request] = https_receiver.requests
    assert (request.method, request.path, request.body) == ("POST", "/quern?x=1", PAYLOAD)
    assert Webhook(SECRET).verify(request.body, dict(request.headers))["type"] == "response.completed"
    assert request.headers["webhook-id"] == "job_1"
    assert request.headers["x-request-id"] == "req-1"
    assert request.headers["traceparent"] == TRACEPARENT
    assert request.headers["user-agent"] == USER_AGENT
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] == f"{HOST}:{https_receiver.port}"


def test_a_second_attempt_keeps_the_id_and_signs_its_own_time(receiver: Receiver) -> None:
    url = f"http://{HOST}:{receiver.port}/"
    for second in (0, 30):
        assert attempt(url, plain(), now=datetime(2026, 3, 1, 12, 0, second, tzinfo=UTC)).delivered
    first, again = receiver.requests
    assert first.headers["webhook-id"] == again.headers["webhook-id"]
    assert int(again.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) == 30
    assert first.headers["webhook-signature"] != again.headers["webhook-signature"]


def test_the_log_of_an_attempt_holds_neither_signature_nor_payload(receiver: Receiver) -> None:
    receiver.script(Answer(500, body=b"no"))
    outcome = attempt(f"http://{HOST}:{receiver.port}/", plain(), request_id="req-1")
    assert outcome.request_headers["webhook-id"] == "job_1"
    assert outcome.request_headers["x-request-id"] == "req-1"
    assert "webhook-signature" not in outcome.request_headers
    sent = receiver.requests[0].headers["webhook-signature"]
    assert sent.partition(",")[2] not in repr(outcome)
    assert PAYLOAD.decode() not in repr(outcome)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused(receiver: Receiver, status: int) -> None:
    receiver.script(Answer(status, {"Location": f"http://{HOST}:{receiver.port}/elsewhere"}), path="/")
    outcome = attempt(f"http://{HOST}:{receiver.port}/", plain())
    assert (outcome.delivered, outcome.status) == (False, status)
    assert [request.path for request in receiver.requests] == ["/"]


def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    other = issue_certificate(tmp_path, ("other.example.com", "127.0.0.1"))
    with Receiver(certificate=other) as server:
        outcome = attempt(f"https://{HOST}:{server.port}/", loopback_settings(other))
        assert outcome.failure is Failure.TLS
        assert HOST in outcome.detail
        assert server.requests == []


def test_a_certificate_of_an_unknown_authority_is_refused(https_receiver: Receiver) -> None:
    outcome = attempt(f"https://{HOST}:{https_receiver.port}/", loopback_settings())
    assert outcome.failure is Failure.TLS
    assert https_receiver.requests == []


def test_old_tls_is_refused(certificate: ServerCertificate) -> None:
    context = certificate.server_context()
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with RawServer(lambda connection: context.wrap_socket(connection, server_side=True).close()) as server:
        outcome = attempt(f"https://{HOST}:{server.port}/", loopback_settings(certificate))
    assert outcome.failure is Failure.TLS


def test_the_connection_goes_to_the_address_that_was_checked(
    certificate: ServerCertificate, https_receiver: Receiver
) -> None:
    with RawServer(lambda connection: None, "127.0.0.2", https_receiver.port) as internal:
        rebinding = Resolver(["127.0.0.1"], ["127.0.0.2"])
        outcome = attempt(f"https://{HOST}:{https_receiver.port}/", loopback_settings(certificate), rebinding)
        assert outcome.delivered
        assert outcome.address == "127.0.0.1"
        assert rebinding.questions == [(HOST, https_receiver.port)]
        assert internal.connections == 0


def test_a_name_that_turns_internal_is_refused_before_any_connection(https_receiver: Receiver) -> None:
    with RawServer(lambda connection: None, "127.0.0.2", https_receiver.port) as internal:
        rebinding = Resolver(["127.0.0.1"], ["127.0.0.2"])
        url = f"http://{HOST}:{https_receiver.port}/"
        attempt(url, plain(), rebinding)
        outcome = attempt(url, plain(), rebinding)
        assert outcome.failure is Failure.FORBIDDEN_ADDRESS
        assert internal.connections == 0


def test_one_internal_address_among_many_stops_the_attempt(receiver: Receiver) -> None:
    outcome = attempt(f"http://{HOST}:{receiver.port}/", plain(), Resolver(["127.0.0.1", "127.0.0.2"]))
    assert outcome.failure is Failure.FORBIDDEN_ADDRESS
    assert receiver.requests == []


def test_the_real_resolver_and_a_stock_policy_keep_loopback_closed(receiver: Receiver) -> None:
    strict = WebhookSettings.model_validate({"allow_http": True, "allow_ports": ["1-65535"]})
    for host in ("127.0.0.1", "localhost", "[::1]"):
        outcome = deliver(
            f"http://{host}:{receiver.port}/",
            [SECRET],
            message_id="job_1",
            payload=PAYLOAD,
            settings=strict,
            tls=client_tls(strict),
            now=datetime.now(UTC),
        )
        assert outcome.failure is Failure.FORBIDDEN_URL
    assert receiver.requests == []


def test_the_next_address_is_tried_when_one_does_not_answer(receiver: Receiver) -> None:
    settings = plain(allow_networks=["127.0.0.0/8"])
    outcome = attempt(f"http://{HOST}:{receiver.port}/", settings, Resolver(["127.0.0.9", "127.0.0.1"]))
    assert outcome.delivered
    assert outcome.address == "127.0.0.1"


def test_proxies_of_the_environment_are_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(lambda connection: None) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setitem(os.environ, name, f"http://127.0.0.1:{proxy.port}")
        assert attempt(f"http://{HOST}:{receiver.port}/", plain()).delivered
        assert proxy.connections == 0


def test_a_refused_connection_is_told_from_a_name_that_does_not_resolve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert attempt(f"http://{HOST}:{port}/", plain()).failure is Failure.CONNECT

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    assert attempt(f"http://{HOST}:{port}/", plain(), resolver=unknown).failure is Failure.DNS


def _read_request(connection: socket.socket) -> None:
    while PAYLOAD not in connection.recv(65_536, socket.MSG_PEEK):
        time.sleep(0.01)
    connection.recv(65_536)


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, b"HTTP/1.1 200 OK\r\nX-Slow: "],
    ids=["silence", "100-continue", "endless-header"],
)
def test_a_receiver_that_trickles_its_head_is_cut_off_at_the_deadline(start: bytes) -> None:
    def loris(connection: socket.socket) -> None:
        _read_request(connection)
        connection.sendall(start)
        trickle(connection, b"a" * 3_000)

    with RawServer(loris) as server:
        started = time.monotonic()
        outcome = attempt(f"http://{HOST}:{server.port}/", plain(deadline_seconds=0.5))
        elapsed = time.monotonic() - started
    assert outcome.status is None
    assert outcome.failure in (Failure.TIMEOUT, Failure.PROTOCOL)
    # The receiver would go on for a minute; the deadline is half a second.
    assert elapsed < 30


def test_a_tls_handshake_that_trickles_is_cut_off_at_the_deadline(certificate: ServerCertificate) -> None:
    with RawServer(lambda connection: trickle(connection, b"\x16\x03\x03\x40\x00" + b"\x02" * 3_000)) as server:
        started = time.monotonic()
        outcome = attempt(f"https://{HOST}:{server.port}/", loopback_settings(certificate, deadline_seconds=0.5))
        elapsed = time.monotonic() - started
    assert outcome.failure in (Failure.TIMEOUT, Failure.TLS)
    assert elapsed < 30


def test_a_receiver_that_sips_is_cut_off_at_the_deadline_however_often_it_reads() -> None:
    payload = b" " * 8_388_608
    received = bytearray()

    def sip(connection: socket.socket) -> None:
        # Fast enough that every partial send of the sender is in time, slow enough that all of them together are not.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_048_576)
        while data := connection.recv(40_000):
            received.extend(data)
            time.sleep(0.01)

    with RawServer(sip) as server:
        outcome = attempt(
            f"http://{HOST}:{server.port}/",
            plain(deadline_seconds=0.5, max_payload_bytes=len(payload)),
            payload=payload,
        )
    assert outcome.failure is Failure.TIMEOUT
    assert len(received) < len(payload)


def test_a_delivered_message_stays_delivered_when_the_body_never_ends() -> None:
    def endless(connection: socket.socket) -> None:
        _read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n")
        trickle(connection, b"a" * 3_000)

    with RawServer(endless) as server:
        outcome = attempt(f"http://{HOST}:{server.port}/", plain(deadline_seconds=0.5))
    assert outcome.delivered


def test_an_endless_flood_is_bounded_in_bytes() -> None:
    def flood(connection: socket.socket) -> None:
        _read_request(connection)
        connection.sendall(b"HTTP/1.1 500 Oops\r\n\r\n")
        while True:
            connection.sendall(b"a" * 65_536)

    with RawServer(flood) as server:
        outcome = attempt(f"http://{HOST}:{server.port}/", plain(excerpt_bytes=100))
    assert (outcome.status, outcome.excerpt) == (500, "a" * 100)


def test_a_flood_of_interim_answers_is_bounded_in_bytes() -> None:
    def flood(connection: socket.socket) -> None:
        _read_request(connection)
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 500)

    with RawServer(flood) as server:
        assert attempt(f"http://{HOST}:{server.port}/", plain()).failure is Failure.PROTOCOL


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"\x00" * 200,
        b"HTTP/1.1 200 OK\r\nA: " * 9_000,
    ],
    ids=["nothing", "blank", "ssh", "no-status", "zeros", "huge-head"],
)
def test_what_is_not_http_is_a_failure_and_not_an_error(answer: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        _read_request(connection)
        connection.sendall(answer)

    with RawServer(talk) as server:
        assert attempt(f"http://{HOST}:{server.port}/", plain()).failure is Failure.PROTOCOL


def test_the_excerpt_of_a_refusal_is_printable_and_that_of_a_success_is_empty(receiver: Receiver) -> None:
    receiver.script(Answer(422, body="näh\x1b[31m\x00\r\nrest\xff".encode("latin-1")), Answer(200, body=b"echo"))
    url = f"http://{HOST}:{receiver.port}/"
    assert attempt(url, plain()).excerpt == "n\ufffdh [31m  \nrest\ufffd"
    assert attempt(url, plain()).excerpt == ""


def test_retry_after_comes_back_for_the_schedule(receiver: Receiver) -> None:
    receiver.script(Answer(503, {"Retry-After": "120"}))
    assert attempt(f"http://{HOST}:{receiver.port}/", plain()).retry_after == "120"


@pytest.mark.parametrize("bad", ["a\r\nX-Evil: 1", "a b", "", "x" * 129, "é"])
def test_request_ids_and_trace_contexts_cannot_add_headers(receiver: Receiver, bad: str) -> None:
    assert attempt(f"http://{HOST}:{receiver.port}/", plain(), request_id=bad, traceparent=bad).delivered
    headers = receiver.requests[0].headers
    assert headers["x-evil"] is None and headers["x-request-id"] is None and headers["traceparent"] is None


def test_a_payload_over_the_limit_is_a_wrong_call(receiver: Receiver) -> None:
    with pytest.raises(ValueError, match="at most 1024 bytes"):
        attempt(f"http://{HOST}:{receiver.port}/", plain(max_payload_bytes=1_024), payload=b" " * 1_025)
    assert receiver.requests == []
