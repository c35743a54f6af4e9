"""Hand one message to the operator's SMTP relay (RFC 5321), over TLS that is verified."""

from __future__ import annotations

import re
import smtplib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP

from quern.mail.settings import MailSettings, PasswordMissingError, TLSMode

_ENHANCED_STATUS = re.compile(rb"\s*([245]\.\d{1,3}\.\d{1,3})\b")


class MailError(Exception):
    """The relay did not take the message. The text names no address and quotes nothing that the relay said."""


class TransientMailError(MailError):
    """Trying again may help: the relay is away, busy, or not set up right at the moment."""


class PermanentMailError(MailError):
    """The relay will never take this message."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who the relay took the message for, and who it refused for now (4xx) or for good (5xx).

    When some are refused for now, send the same message again to these alone.
    """

    accepted: tuple[str, ...]
    deferred: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()


def send(message: EmailMessage, recipients: tuple[str, ...], settings: MailSettings) -> Receipt:
    """Send the message to the envelope recipients, which need not be all that its To header names.

    The relay's certificate must be valid for its host name; a relay that does not offer STARTTLS gets nothing. A wrong
    or missing password is transient: it is the operator's to mend (or being rotated), and the mail is still good.

    Raises TransientMailError, PermanentMailError.
    """
    data = message.as_bytes(policy=SMTP)
    with _understood(settings), _connected(settings) as relay:
        return _transact(relay, data, recipients, settings)


def probe(settings: MailSettings) -> None:
    """Greet the relay, encrypt and log in as `send` does, and part: what keeps mail back is known before there is any.

    Raises TransientMailError.
    """
    with _understood(settings), _connected(settings):
        pass


@contextmanager
def _connected(settings: MailSettings) -> Iterator[smtplib.SMTP]:
    relay = _connect(settings)
    try:
        yield relay
        _quit(relay)
    finally:
        relay.close()


@contextmanager
def _understood(settings: MailSettings) -> Iterator[None]:
    """What goes wrong on the way to the relay, in words that quote nobody."""
    try:
        yield
    except PasswordMissingError as error:
        raise TransientMailError(str(error)) from None
    except smtplib.SMTPServerDisconnected:
        raise TransientMailError("the relay closed the connection or stopped answering") from None
    except ssl.SSLError as error:
        reason = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else "handshake failed"
        raise TransientMailError(f"expected a relay with a valid certificate for its name, found: {reason}") from None
    except TimeoutError:
        raise TransientMailError(f"the relay did not answer within {settings.timeout_seconds:g} s") from None
    except (OSError, smtplib.SMTPException) as error:
        # smtplib's own errors quote the relay, and the relay quotes addresses: only the kind is kept.
        raise TransientMailError(f"could not talk to the relay ({type(error).__name__})") from None


def _connect(settings: MailSettings) -> smtplib.SMTP:
    """A relay that is greeted, encrypted and logged in to, as the settings say."""
    login = settings.login
    tls = ssl.create_default_context()
    if settings.ca_file is not None:
        tls.load_verify_locations(cafile=settings.ca_file)
    # EHLO with the operator's domain: the default asks the resolver for this host's name, which can hang.
    if settings.tls is TLSMode.IMPLICIT:
        relay: smtplib.SMTP = smtplib.SMTP_SSL(
            settings.host, settings.port, settings.domain, timeout=settings.timeout_seconds, context=tls
        )
    else:
        relay = smtplib.SMTP(settings.host, settings.port, settings.domain, timeout=settings.timeout_seconds)
    try:
        relay.ehlo_or_helo_if_needed()
        if settings.tls is TLSMode.STARTTLS:
            _start_tls(relay, tls)
        if login is not None:
            _log_in(relay, *login)
    except BaseException:
        relay.close()
        raise
    return relay


def _start_tls(relay: smtplib.SMTP, tls: ssl.SSLContext) -> None:
    try:
        relay.starttls(context=tls)
    except smtplib.SMTPNotSupportedError:
        raise TransientMailError("expected the relay to offer STARTTLS, found that it does not") from None
    relay.ehlo()


def _log_in(relay: smtplib.SMTP, username: str, password: str) -> None:
    try:
        relay.login(username, password)
    except smtplib.SMTPAuthenticationError as error:
        raise TransientMailError(f"the relay refused the user name and password ({error.smtp_code})") from None
    except smtplib.SMTPNotSupportedError:
        raise TransientMailError("expected the relay to offer a log-in, found that it does not") from None


def _transact(relay: smtplib.SMTP, data: bytes, recipients: tuple[str, ...], settings: MailSettings) -> Receipt:
    """MAIL, RCPT for each, DATA. Written out, for `sendmail` hides who was refused for now and who for good."""
    _check(*relay.mail(settings.from_address), "the sender")
    accepted, deferred, rejected = [], [], []
    codes = []
    for recipient in recipients:
        code, text = relay.rcpt(recipient)
        codes.append((code, text))
        if 200 <= code <= 299:
            accepted.append(recipient)
        elif code >= 500:
            rejected.append(recipient)
        else:
            deferred.append(recipient)
    if not accepted:
        worst = next((reply for reply in codes if reply[0] < 500), codes[0])
        _check(*worst, "every recipient")
    try:
        code, text = relay.data(data)
    except smtplib.SMTPDataError as error:
        code, text = error.smtp_code, error.smtp_error if isinstance(error.smtp_error, bytes) else b""
    _check(code, text, "the message")
    return Receipt(tuple(accepted), tuple(deferred), tuple(rejected))


def _quit(relay: smtplib.SMTP) -> None:
    """Part politely. The relay has taken the message: what happens now must not make it be sent again."""
    try:
        relay.quit()
    except (OSError, smtplib.SMTPException):
        pass


def _check(code: int, text: bytes, what: str) -> None:
    if 200 <= code <= 299:
        return
    status = _ENHANCED_STATUS.match(text)
    shown = f"{code} {status[1].decode()}" if status else str(code)
    kind = PermanentMailError if 500 <= code <= 599 else TransientMailError
    raise kind(f"the relay refused {what} ({shown})")
