"""An SMTP server on loopback that keeps every message it is given: plain, STARTTLS or TLS from the first byte."""

import asyncio
import email.policy
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from quern.embedded.certificate import ServerCertificate
from quern.embedded.recorder import Recorder

Tls = Literal["none", "starttls", "implicit"]


class _Relay(SMTP):
    """Asks in a login as relays in use do: Alertmanager, for one, answers to these words and to no others."""

    AuthLoginUsernameChallenge = "Username:"
    AuthLoginPasswordChallenge = "Password:"


@dataclass(frozen=True)
class ReceivedMessage:
    """One accepted message: its envelope, its bytes as sent, and whether TLS protected it."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    encrypted: bool
    received_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def message(self) -> EmailMessage:
        """The parsed message."""
        return message_from_bytes(self.content, _class=EmailMessage, policy=email.policy.default)


class SmtpSink:
    """Runs on a thread of its own between `start` and `stop` (or as a context manager).

    With `credentials` (user, password) a client must log in, which it can do only over TLS. `starttls` and `implicit`
    need a `certificate`.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls = "none",
        certificate: ServerCertificate | None = None,
        credentials: tuple[str, str] | None = None,
    ) -> None:
        if tls != "none" and certificate is None:
            raise ValueError(f"SMTP sink: tls={tls!r} expects a certificate, found none; call issue_certificate")
        if tls == "none" and credentials is not None:
            raise ValueError("SMTP sink: credentials expect tls='starttls' or tls='implicit', found tls='none'")
        self.host = host
        self.port = port
        self.authority: Path | None = certificate.authority if certificate else None
        self._tls = tls
        self._certificate = certificate
        self._credentials = credentials
        self._messages = Recorder[ReceivedMessage]("SMTP sink")
        self._refusals: deque[str] = deque()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; from here on `port` is the real one, and stays the same over `stop` and `start`."""
        listener = socket.create_server((self.host, self.port))
        self.port = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        serving = threading.Event()
        arguments = (self._loop, listener, serving)
        self._thread = threading.Thread(target=self._serve, args=arguments, name="smtp-sink", daemon=True)
        self._thread.start()
        # A `stop` that came before the loop serves would end its thread and leave the port open.
        serving.wait()

    def stop(self) -> None:
        """Close the listener and all connections. The messages stay readable."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None

    @property
    def messages(self) -> list[ReceivedMessage]:
        """All accepted messages, in order."""
        return self._messages.items()

    def clear(self) -> None:
        """Forget the messages and the scripted refusals."""
        self._messages.clear()
        self._refusals.clear()

    def refuse_next(self, *answers: str) -> None:
        """Answer the next messages so, one each, before accepting again: `451 4.3.0 Try later`, `550 5.1.1 Unknown`."""
        self._refusals.extend(answers)

    def wait_for(self, predicate: Callable[[ReceivedMessage], bool], timeout: float = 60.0) -> ReceivedMessage:
        """The first message for which `predicate` holds. Raises TimeoutError after `timeout` seconds."""
        return self._messages.wait_for(predicate, timeout)

    def wait_for_count(self, count: int, timeout: float = 60.0) -> list[ReceivedMessage]:
        """At least `count` messages. Raises TimeoutError after `timeout` seconds."""
        return self._messages.wait_for_count(count, timeout=timeout)

    # The name is aiosmtpd's: it looks for it on the handler.
    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Refuse as scripted, else record."""
        if self._refusals:
            return self._refusals.popleft()
        content = envelope.content
        if not isinstance(content, bytes):
            raise TypeError(f"SMTP sink: expected bytes from aiosmtpd, found {type(content).__name__}")
        self._messages.record(
            ReceivedMessage(
                sender=envelope.mail_from or "",
                recipients=tuple(envelope.rcpt_tos),
                content=content,
                encrypted=self._tls == "implicit" or session.ssl is not None,
            )
        )
        return "250 2.0.0 Recorded"

    def _serve(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, serving: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        context = self._certificate.server_context() if self._certificate else None
        try:
            server = loop.run_until_complete(
                loop.create_server(
                    self._connection, sock=listener, ssl=context if self._tls == "implicit" else None, backlog=128
                )
            )
        finally:
            serving.set()
        try:
            loop.run_forever()
        finally:
            server.close()
            waiting = asyncio.all_tasks(loop)
            for task in waiting:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*waiting, return_exceptions=True))
            loop.close()

    def _connection(self) -> SMTP:
        starttls = self._certificate.server_context() if self._certificate and self._tls == "starttls" else None
        return _Relay(
            self,
            hostname="smtp-sink.localhost",
            enable_SMTPUTF8=True,
            tls_context=starttls,
            require_starttls=starttls is not None,
            authenticator=self._authenticate if self._credentials else None,
            auth_required=self._credentials is not None,
            # aiosmtpd counts only STARTTLS as TLS; with implicit TLS the connection is protected all the same.
            auth_require_tls=self._tls == "starttls",
            timeout=60,
            loop=self._loop,
        )

    def _authenticate(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, login: object
    ) -> AuthResult:
        user, password = self._credentials or ("", "")
        known = isinstance(login, LoginPassword) and login == LoginPassword(user.encode(), password.encode())
        # "handled" would mean that the answer is already sent, and leave the client waiting for it.
        return AuthResult(success=known, handled=False)
