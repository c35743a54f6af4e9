import http.client
import ssl
import urllib.request
from pathlib import Path

import pytest

from quern.embedded.certificate import issue_certificate
from quern.embedded.receiver import Answer, Receiver


def post(
    receiver: Receiver, path: str, body: bytes = b"{}", headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=60)
    connection.request("POST", path, body, headers or {})
    response = connection.getresponse()
    response.read()
    return response


def test_every_request_is_kept_as_it_came(receiver: Receiver) -> None:
    post(receiver, "/hook?a=1", b"\x00\xff{}", {"Webhook-Id": "msg_1"})
    request = receiver.wait_for(lambda r: r.path == "/hook?a=1")
    assert (request.method, request.body) == ("POST", b"\x00\xff{}")
    assert request.headers["webhook-id"] == "msg_1"
    assert request.received_at.utcoffset() is not None


def test_a_chunked_body_is_put_together(receiver: Receiver) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=60)
    connection.request("POST", "/", iter([b"one, ", b"two"]), {}, encode_chunked=True)
    connection.getresponse().read()
    assert receiver.requests[0].body == b"one, two"


def test_scripted_answers_are_used_up_in_order_and_then_the_default_answers(receiver: Receiver) -> None:
    receiver.script(Answer(503, {"Retry-After": "7"}), Answer(410))
    answers = [post(receiver, "/hook") for _ in range(4)]
    assert [answer.status for answer in answers] == [503, 410, 200, 200]
    assert answers[0].headers["Retry-After"] == "7"
    assert [request.answered.status for request in receiver.requests] == [503, 410, 200, 200]


def test_a_script_for_a_path_leaves_the_other_paths_alone(receiver: Receiver) -> None:
    receiver.script(Answer(500), path="/broken")
    assert post(receiver, "/fine").status == 200
    assert post(receiver, "/broken").status == 500


def test_a_redirect_can_be_scripted(receiver: Receiver) -> None:
    receiver.script(Answer(302, {"Location": f"{receiver.url}/elsewhere"}))
    answer = post(receiver, "/hook")
    assert (answer.status, answer.headers["Location"]) == (302, f"{receiver.url}/elsewhere")


def test_a_connection_can_be_closed_without_an_answer(receiver: Receiver) -> None:
    receiver.script(Answer(hang_up=True))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        post(receiver, "/hook")
    assert len(receiver.requests) == 1


def test_waiting_for_what_does_not_come_says_what_came(receiver: Receiver) -> None:
    post(receiver, "/hook")
    with pytest.raises(TimeoutError, match=r"expected 2 matching in 0\.1 s, found 1 among 1 received"):
        receiver.wait_for_count(2, timeout=0.1)


def test_after_a_restart_it_is_found_at_the_same_url(receiver: Receiver) -> None:
    url = receiver.url
    receiver.stop()
    with pytest.raises(ConnectionRefusedError):
        post(receiver, "/hook")
    receiver.start()
    assert receiver.url == url
    assert post(receiver, "/hook").status == 200


def test_over_tls_it_is_trusted_only_through_its_own_authority(run_directory: Path) -> None:
    certificate = issue_certificate(run_directory)
    with Receiver(certificate=certificate) as receiver:
        with urllib.request.urlopen(receiver.url, b"{}", context=certificate.client_context()) as answer:
            assert answer.status == 200
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(receiver.url, b"{}", context=ssl.create_default_context())
