import smtplib
import ssl
from base64 import b64decode, b64encode
from email.message import EmailMessage
from pathlib import Path

import pytest

from quern.embedded.certificate import ServerCertificate, issue_certificate
from quern.embedded.smtp_sink import SmtpSink, Tls

CREDENTIALS = ("relay", "correct horse")


@pytest.fixture(scope="module")
def certificate(session_directory: Path) -> ServerCertificate:
    return issue_certificate(session_directory / "certificate")


def letter(subject: str = "Grüße") -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "form@example.org", "owner@example.org", subject
    message.set_content("Ein Satz.\n.\nNach dem Punkt.\n")
    return message


def test_a_message_is_kept_whole_with_its_envelope(smtp_sink: SmtpSink) -> None:
    with smtplib.SMTP(smtp_sink.host, smtp_sink.port) as client:
        client.send_message(letter(), to_addrs=["a@example.org", "b@example.org"])
    received = smtp_sink.wait_for(lambda m: m.message["Subject"] == "Grüße")
    assert received.sender == "form@example.org"
    assert received.recipients == ("a@example.org", "b@example.org")
    assert received.content.endswith(b"Ein Satz.\r\n.\r\nNach dem Punkt.\r\n")
    assert not received.encrypted


def test_refusals_are_used_up_in_order_and_nothing_refused_is_kept(smtp_sink: SmtpSink) -> None:
    smtp_sink.refuse_next("451 4.3.0 Try later", "550 5.1.1 Unknown")
    codes = []
    with smtplib.SMTP(smtp_sink.host, smtp_sink.port) as client:
        for subject in ("one", "two", "three"):
            try:
                client.send_message(letter(subject))
            except smtplib.SMTPDataError as error:
                codes.append(error.smtp_code)
    assert codes == [451, 550]
    assert [message.message["Subject"] for message in smtp_sink.messages] == ["three"]


def test_starttls_is_demanded_before_a_message(certificate: ServerCertificate) -> None:
    with SmtpSink(tls="starttls", certificate=certificate) as sink, smtplib.SMTP(sink.host, sink.port) as client:
        with pytest.raises(smtplib.SMTPSenderRefused, match="STARTTLS"):
            client.send_message(letter())
        client.starttls(context=certificate.client_context())
        client.send_message(letter())
        assert [message.encrypted for message in sink.messages] == [True]


def test_implicit_tls_is_trusted_only_through_its_own_authority(certificate: ServerCertificate) -> None:
    with SmtpSink(tls="implicit", certificate=certificate) as sink:
        with smtplib.SMTP_SSL(sink.host, sink.port, context=certificate.client_context()) as client:
            client.send_message(letter())
        with pytest.raises(ssl.SSLCertVerificationError):
            smtplib.SMTP_SSL(sink.host, sink.port, context=ssl.create_default_context())
        assert [message.encrypted for message in sink.messages] == [True]


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_with_credentials_only_who_logs_in_may_send(certificate: ServerCertificate, tls: Tls) -> None:
    context = certificate.client_context()
    sink = SmtpSink(
        tls="starttls" if tls == "starttls" else "implicit", certificate=certificate, credentials=CREDENTIALS
    )
    with sink:
        client = (
            smtplib.SMTP(sink.host, sink.port)
            if tls == "starttls"
            else smtplib.SMTP_SSL(sink.host, sink.port, context=context)
        )
        with client:
            if tls == "starttls":
                client.starttls(context=context)
            with pytest.raises(smtplib.SMTPSenderRefused) as refused:
                client.send_message(letter())
            assert refused.value.smtp_code == 530
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login("relay", "wrong")
            client.login(*CREDENTIALS)
            client.send_message(letter())
        assert len(sink.messages) == 1


def test_it_asks_for_a_login_in_the_words_of_relays_in_use(certificate: ServerCertificate) -> None:
    with (
        SmtpSink(tls="starttls", certificate=certificate, credentials=CREDENTIALS) as sink,
        smtplib.SMTP(sink.host, sink.port) as client,
    ):
        client.starttls(context=certificate.client_context())
        client.ehlo()
        asked = [client.docmd("AUTH LOGIN"), client.docmd(b64encode(CREDENTIALS[0].encode()).decode())]
        assert [(code, b64decode(words)) for code, words in asked] == [(334, b"Username:"), (334, b"Password:")]
        assert client.docmd(b64encode(CREDENTIALS[1].encode()).decode())[0] == 235


def test_after_a_restart_it_is_found_at_the_same_port(smtp_sink: SmtpSink) -> None:
    smtp_sink.stop()
    with pytest.raises(ConnectionRefusedError):
        smtplib.SMTP(smtp_sink.host, smtp_sink.port)
    smtp_sink.start()
    with smtplib.SMTP(smtp_sink.host, smtp_sink.port) as client:
        client.send_message(letter())
    assert len(smtp_sink.messages) == 1


def test_tls_without_a_certificate_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="expects a certificate"):
        SmtpSink(tls="starttls")
