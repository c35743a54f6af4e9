"""Connections that are kept: a thread stays with one while requests come, and lets go of it when others wait."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpcore2
import pytest

from tests.app.api.client import House

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: %d\r\n\r\n"


def _connect(path: Path, stack: ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
    connection.settimeout(60)
    connection.connect(str(path))
    return connection


def _answers(connection: socket.socket, count: int) -> Iterator[bytes]:
    """The heads of `count` answers, all of one length of body, in the order in which they came."""
    found = b""
    while found.count(b"HTTP/1.1 200") < count or not found.endswith(b"}\n"):
        part = connection.recv(65536)
        assert part, f"the connection ended after {found!r}"
        found += part
    yield from found.split(b"HTTP/1.1 ")[1:]


@pytest.fixture
def door(house: House) -> Path:
    return house.stack.directory / "api.sock"


def test_requests_on_one_connection_are_answered_in_their_order(door: Path) -> None:
    with ExitStack() as stack:
        connection = _connect(door, stack)
        for number in range(50):
            connection.sendall(REQUEST % number)
            [answer] = _answers(connection, 1)
            assert b"X-Request-ID: %d\r\n" % number in answer


def test_requests_that_were_sent_ahead_are_all_answered(door: Path) -> None:
    with ExitStack() as stack:
        connection = _connect(door, stack)
        connection.sendall(b"".join(REQUEST % number for number in range(20)))
        answers = list(_answers(connection, 20))
    for number, answer in enumerate(answers):
        assert b"X-Request-ID: %d\r\n" % number in answer


def test_a_request_split_at_any_place_is_answered(door: Path) -> None:
    with ExitStack() as stack:
        connection = _connect(door, stack)
        whole = REQUEST % 7
        for place in range(1, len(whole), 5):
            connection.sendall(whole[:place])
            connection.sendall(whole[place:])
            [answer] = _answers(connection, 1)
            assert answer.startswith(b"200")


def test_clients_that_keep_busy_connections_do_not_starve_others(house: House, door: Path) -> None:
    """More of them than there are threads, each with its next request on its way before it reads."""
    with ExitStack() as stack:
        busy = [_connect(door, stack) for _ in range(40)]
        for connection in busy:
            connection.sendall(REQUEST % 1)
        for _ in range(20):
            with httpcore2.ConnectionPool(uds=str(door)) as pool:
                answer = pool.request("GET", "http://localhost/healthz", extensions={"timeout": {"read": 60.0}})
                assert answer.status == 200
            for connection in busy:
                list(_answers(connection, 1))
                connection.sendall(REQUEST % 1)
        for connection in busy:
            list(_answers(connection, 1))
