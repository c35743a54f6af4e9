"""A certificate authority and receivers for deliveries over real TLS."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import pytest

from quern.embedded.certificate import ServerCertificate, issue_certificate
from quern.embedded.receiver import Receiver
from quern.webhooks.settings import WebhookSettings

HOST = "hooks.example.com"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ServerCertificate:
    """For hooks.example.com and nothing else."""
    return issue_certificate(tmp_path_factory.mktemp("webhook-tls"), (HOST,))


@pytest.fixture
def https_receiver(certificate: ServerCertificate) -> Iterator[Receiver]:
    """A receiver that is hooks.example.com for whoever resolves it to 127.0.0.1."""
    with Receiver(certificate=certificate) as server:
        yield server


class Resolver:
    """Answers from a script, the last answer again and again, and counts how often it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.questions: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.questions.append((host, port))
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class RawServer:
    """Runs `conversation` on each connection to 127.0.0.x: for answers that no honest HTTP server gives."""

    def __init__(
        self, conversation: Callable[[socket.socket], None], address: str = "127.0.0.1", port: int = 0
    ) -> None:
        self._conversation = conversation
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._threads.append(threading.Thread(target=self._accept, daemon=True))
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # close() alone leaves a blocked accept() alone.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(60)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._conversation(connection)
            except OSError:
                pass


def trickle(connection: socket.socket, data: bytes, seconds: float = 60.0) -> None:
    """Send a byte now and then until the peer hangs up, as a slow-loris receiver does."""
    end = time.monotonic() + seconds
    for byte in data:
        if time.monotonic() > end:
            return
        connection.sendall(bytes([byte]))
        time.sleep(0.02)


def loopback_settings(certificate: ServerCertificate | None = None, **changes: Any) -> WebhookSettings:
    """What a test needs to reach 127.0.0.1 alone, on any port."""
    values = {
        "allow_networks": ["127.0.0.1/32"],
        "allow_ports": ["1024-65535"],
        "ca_file": certificate.authority if certificate else None,
        "deadline_seconds": 60,
    }
    return WebhookSettings.model_validate(values | changes)
