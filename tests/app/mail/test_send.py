"""Handing a message to a relay, against a real SMTP server."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from quern.embedded.certificate import ServerCertificate, issue_certificate
from quern.embedded.smtp_sink import SmtpSink
from quern.mail.compose import MessageDraft, compose
from quern.mail.send import PermanentMailError, Receipt, TransientMailError, probe, send
from quern.mail.settings import MailSettings

ADA, BOB, EVE = "ada@example.com", "bob@example.com", "eve@example.com"
TEXT = "A private matter: Größe 🎉\n.\n..leading dots\n"


def settings(port: int, certificate: ServerCertificate | None = None, **changes: Any) -> MailSettings:
    values = {
        "host": "localhost",
        "port": port,
        "tls": "none",
        "from_address": "forms@quern.example.com",
        "ca_file": certificate.authority if certificate else None,
        "timeout_seconds": 30,
    }
    return MailSettings.model_validate(values | changes)


def deliver(chosen: MailSettings, *recipients: str) -> Receipt:
    to = recipients or (ADA,)
    draft = MessageDraft(to=to, subject="Hello", text=TEXT)
    message = compose(draft, job_id="job_1", date=datetime(2026, 3, 1, 12, 0, tzinfo=UTC), settings=chosen)
    return send(message, to, chosen)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ServerCertificate:
    return issue_certificate(tmp_path_factory.mktemp("smtp-tls"), ("localhost",))


def test_a_message_arrives_as_it_was_composed(smtp_sink: SmtpSink) -> None:
    assert deliver(settings(smtp_sink.port), ADA, BOB) == Receipt((ADA, BOB))
    received = smtp_sink.wait_for_count(1)[0]
    assert (received.sender, received.recipients) == ("forms@quern.example.com", (ADA, BOB))
    assert received.message["Message-ID"] == "<job_1@quern.example.com>"
    body = received.message.get_body()
    assert body is not None and body.get_content().replace("\r\n", "\n") == TEXT


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
def test_tls_and_the_log_in_protect_the_way_to_the_relay(certificate: ServerCertificate, mode: Any) -> None:
    with SmtpSink(tls=mode, certificate=certificate, credentials=("quern", "s3cret")) as sink:
        chosen = settings(sink.port, certificate, tls=mode, username="quern", password="s3cret")
        assert deliver(chosen).accepted == (ADA,)
        assert sink.wait_for_count(1)[0].encrypted


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
def test_a_wrong_password_is_transient_and_names_neither_user_nor_password(
    certificate: ServerCertificate, mode: Any
) -> None:
    with SmtpSink(tls=mode, certificate=certificate, credentials=("quern", "s3cret")) as sink:
        with pytest.raises(TransientMailError, match="535") as caught:
            deliver(settings(sink.port, certificate, tls=mode, username="mallory", password="hunter2"))
        assert "mallory" not in str(caught.value) and "hunter2" not in str(caught.value)
        assert sink.messages == []


def test_a_user_name_without_a_password_is_transient_and_never_sent_unsigned(certificate: ServerCertificate) -> None:
    with SmtpSink(tls="starttls", certificate=certificate) as sink:
        half = settings(sink.port, certificate, tls="starttls", username="quern")
        with pytest.raises(TransientMailError, match=r"expected a password .* QUERN_MAIL_PASSWORD"):
            deliver(half)
        with pytest.raises(TransientMailError, match="expected a password"):
            probe(half)
        assert sink.messages == []


def test_a_probe_finds_what_would_keep_mail_back_and_leaves_nothing(certificate: ServerCertificate) -> None:
    with SmtpSink(tls="starttls", certificate=certificate, credentials=("quern", "s3cret")) as sink:
        probe(settings(sink.port, certificate, tls="starttls", username="quern", password="s3cret"))
        with pytest.raises(TransientMailError, match="535"):
            probe(settings(sink.port, certificate, tls="starttls", username="quern", password="hunter2"))
        with pytest.raises(TransientMailError, match="certificate"):
            probe(settings(sink.port, tls="starttls", username="quern", password="s3cret"))
        assert sink.messages == []


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
def test_a_certificate_that_does_not_fit_gets_no_mail(
    tmp_path: Path, certificate: ServerCertificate, mode: Any
) -> None:
    other = issue_certificate(tmp_path, ("relay.example.com",))
    with SmtpSink(tls=mode, certificate=other) as sink:
        with pytest.raises(TransientMailError, match="certificate"):
            deliver(settings(sink.port, other, tls=mode))
        with pytest.raises(TransientMailError, match="certificate"):
            deliver(settings(sink.port, certificate, tls=mode))
        assert sink.messages == []


def test_a_relay_without_starttls_gets_no_mail(smtp_sink: SmtpSink) -> None:
    with pytest.raises(TransientMailError, match="offer STARTTLS"):
        deliver(settings(smtp_sink.port, tls="starttls"))
    assert smtp_sink.messages == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("451 4.3.0 Try later, ada@example.com", TransientMailError),
        ("452 Full", TransientMailError),
        ("550 5.1.1 No such user ada@example.com", PermanentMailError),
        ("554 5.7.1 Spam", PermanentMailError),
    ],
)
def test_4xx_is_transient_and_5xx_is_permanent(smtp_sink: SmtpSink, answer: str, kind: type[Exception]) -> None:
    smtp_sink.refuse_next(answer)
    with pytest.raises(kind) as caught:
        deliver(settings(smtp_sink.port))
    assert answer[:3] in str(caught.value)
    assert ADA not in str(caught.value)


def test_a_relay_that_is_away_is_transient() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(TransientMailError, match="ConnectionRefusedError"):
        deliver(settings(port, host="127.0.0.1"))


POLITE: dict[str, str | None] = {
    "": "220 relay",
    "EHLO": "250 relay",
    "MAIL": "250 ok",
    "RCPT": "250 ok",
    "DATA": "354 go",
    ".": "250 ok",
    "QUIT": "221 bye",
}


class ScriptedRelay:
    """An SMTP server that answers each command by its first word (None: hang up), and keeps what it was told."""

    def __init__(self, answers: dict[str, str | None]) -> None:
        self._answers = POLITE | answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.commands: list[str] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                self._talk(connection)
        except OSError:
            pass

    def _talk(self, connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        connection.sendall(f"{self._answers['']}\r\n".encode())
        in_data = False
        for line in lines:
            text = line.decode().rstrip("\r\n")
            word = "." if in_data and text == "." else text.partition(" ")[0].upper()
            if in_data and word != ".":
                continue
            in_data = word == "DATA"
            self.commands.append(text)
            answer = self._answers.get(f"{word} {text.partition(':')[2]}", self._answers.get(word, "500 what"))
            if answer is None:
                return
            connection.sendall(f"{answer}\r\n".encode())


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedRelay]]:
    started: list[ScriptedRelay] = []

    def start(**answers: str | None) -> ScriptedRelay:
        started.append(ScriptedRelay({name.replace("_", " "): answer for name, answer in answers.items()}))
        return started[-1]

    yield start
    for relay in started:
        relay.close()


def test_recipients_that_are_refused_are_told_apart_from_those_that_were_served(
    scripted: Callable[..., ScriptedRelay],
) -> None:
    relay = scripted(**{f"RCPT <{BOB}>": "451 4.7.1 greylisted", f"RCPT <{EVE}>": "550 5.1.1 unknown"})
    receipt = deliver(settings(relay.port, host="127.0.0.1"), ADA, BOB, EVE)
    assert receipt == Receipt((ADA,), deferred=(BOB,), rejected=(EVE,))


def test_when_all_are_refused_one_that_may_be_served_later_makes_it_transient(
    scripted: Callable[..., ScriptedRelay],
) -> None:
    relay = scripted(**{f"RCPT <{BOB}>": "451 4.7.1 greylisted", f"RCPT <{EVE}>": "550 5.1.1 unknown"})
    with pytest.raises(TransientMailError, match=r"every recipient \(451 4\.7\.1\)"):
        deliver(settings(relay.port, host="127.0.0.1"), EVE, BOB)
    assert "DATA" not in relay.commands
    relay = scripted(RCPT="550 5.1.1 unknown")
    with pytest.raises(PermanentMailError):
        deliver(settings(relay.port, host="127.0.0.1"), EVE, BOB)


@pytest.mark.parametrize("answer", ["421 shutting down", "500 what", None])
def test_a_relay_that_parts_rudely_has_taken_the_message(
    scripted: Callable[..., ScriptedRelay], answer: str | None
) -> None:
    relay = scripted(QUIT=answer)
    assert deliver(settings(relay.port, host="127.0.0.1")).accepted == (ADA,)


@pytest.mark.parametrize("word", ["EHLO", "MAIL", "RCPT", "DATA", "."])
def test_a_connection_lost_at_any_step_is_transient(scripted: Callable[..., ScriptedRelay], word: str) -> None:
    relay = scripted(**{word: None})
    with pytest.raises(TransientMailError):
        deliver(settings(relay.port, host="127.0.0.1"))


@pytest.mark.parametrize("greeting", ["421 busy", "554 no service", "SSH-2.0-OpenSSH_9.2"])
def test_a_relay_that_does_not_greet_is_transient(scripted: Callable[..., ScriptedRelay], greeting: str) -> None:
    relay = scripted(**{"": greeting})
    with pytest.raises(TransientMailError):
        deliver(settings(relay.port, host="127.0.0.1"))


def test_a_relay_that_says_nothing_is_given_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TransientMailError, match="stopped answering"):
        deliver(settings(silent.getsockname()[1], host="127.0.0.1", timeout_seconds=0.2))


def test_no_log_holds_an_address_or_a_body(smtp_sink: SmtpSink, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # asyncio's and aiosmtpd's own logs are the sink's, not the sender's.
    for name in ("mail.log", "asyncio"):
        caplog.set_level(logging.CRITICAL, logger=name)
    smtp_sink.refuse_next(f"550 5.1.1 No such user {ADA}")
    with pytest.raises(PermanentMailError) as caught:
        deliver(settings(smtp_sink.port))
    deliver(settings(smtp_sink.port))
    assert ADA not in caplog.text and "private matter" not in caplog.text
    # What a traceback in a log would show: nothing of the relay's words hangs on the error.
    assert (caught.value.__cause__ is None and caught.value.__suppress_context__) or caught.value.__context__ is None
