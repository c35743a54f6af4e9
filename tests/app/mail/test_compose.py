"""What a message looks like, and that nothing typed by a person can change its shape."""

import email
import email.policy
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from quern.mail.address import parse_address
from quern.mail.compose import MAX_SUBJECT_LENGTH, MessageDraft, MessageRefusedError, compose, header_text
from quern.mail.settings import MailSettings, PasswordMissingError

SETTINGS = MailSettings(host="127.0.0.1", from_address="forms@quern.example.com", from_name="Quern Förms")
DATE = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def draft(**changes: Any) -> MessageDraft:
    return MessageDraft.model_validate({"to": ["ada@example.com"], "subject": "Hello", "text": "Hi"} | changes)


def composed(settings: MailSettings = SETTINGS, **changes: Any) -> EmailMessage:
    return compose(draft(**changes), job_id="job_1", date=DATE, settings=settings)


def wire(message: EmailMessage) -> bytes:
    return message.as_bytes(policy=email.policy.SMTP)


def parsed(message: EmailMessage) -> EmailMessage:
    return email.message_from_bytes(wire(message), _class=EmailMessage, policy=email.policy.default)


def one_newline_kind(text: str) -> str:
    """Mail has one kind of line end, and one after the last line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


EXPECTED_HEADERS = [
    "From",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "Auto-Submitted",
    "X-Auto-Response-Suppress",
    "MIME-Version",
    "Content-Type",
    "Content-Transfer-Encoding",
]


def test_a_message_says_who_what_and_that_a_machine_sent_it() -> None:
    message = parsed(composed(subject="Größe 東京", text="Zeile eins\nZeile zwei: 🎉\n"))
    assert sorted(message.keys()) == sorted(EXPECTED_HEADERS)
    assert message["From"] == "Quern Förms <forms@quern.example.com>"
    assert message["To"] == "ada@example.com"
    assert message["Subject"] == "Größe 東京"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Message-ID"] == "<job_1@quern.example.com>"
    assert message.get_content() == "Zeile eins\r\nZeile zwei: 🎉\r\n"


def test_the_same_job_composes_the_same_bytes_again() -> None:
    assert wire(composed()) == wire(composed())


def test_the_bytes_are_plain_ascii_in_short_lines() -> None:
    data = wire(composed(subject="ü" * 200, text="x" * 5_000 + "€" * 5_000, with_html=True))
    assert data.isascii()
    assert max(len(line) for line in data.split(b"\r\n")) <= 998
    assert b"\n" not in data.replace(b"\r\n", b"")


def test_the_html_twin_shows_what_was_typed_and_runs_none_of_it() -> None:
    typed = "<script>alert('x')</script>\nA & B\n\n<img src=x onerror=y> \"quoted\""
    message = parsed(composed(text=typed, with_html=True))
    plain, html = message.get_body(("plain",)), message.get_body(("html",))
    assert plain is not None and html is not None
    assert plain.get_content().splitlines() == typed.splitlines()
    markup = html.get_content()
    assert "<script" not in markup and "<img" not in markup
    assert "&lt;script&gt;" in markup and "A &amp; B" in markup and "<br>" in markup
    assert markup.count("<p>") == 2


@given(st.text(), st.text(), st.booleans())
@example("Hello\r\nBcc: eve@example.com", "", False)
@example("Hello\nBcc: eve@example.com\n\nbody", "", False)
@example("=?utf-8?q?Hello=0D=0ABcc:_eve@example.com?=", "", False)
@example("=?utf-8?b?SGVsbG8NCkJjYzogZXZlQGV4YW1wbGUuY29t?=", "", False)
@example("a\x0bBcc: eve\x0cBcc: eve\x1cBcc: eve\x85Bcc: eve\u2028Bcc: eve\u2029Bcc: eve", "", True)
@example("x" * 70 + "\r\n " + "y" * 70 + "\r\nBcc: eve@example.com", ".\r\n.\r\nMAIL FROM:<eve@example.com>", False)
@example("ü" * 80 + "\nBcc: eve@example.com" + "ü" * 80, "From here\r\n\r\n.\r\n", True)
@example("=?=?utf-8?q?=0ABcc:_eve?=", "", False)
@example("=\r?utf-8?q?=0ABcc:_eve?=", "", False)
def test_no_subject_and_no_text_can_add_or_change_a_header(subject: str, text: str, with_html: bool) -> None:
    message = parsed(composed(subject=subject, text=text, with_html=with_html))
    headers = [name for name in EXPECTED_HEADERS if not (with_html and name == "Content-Transfer-Encoding")]
    assert sorted(message.keys()) == sorted(headers)
    # A first word that is too long for its line is folded after the colon, which parses as a leading space.
    assert message["Subject"].lstrip() == header_text(subject)
    assert message["To"] == "ada@example.com"
    body = message.get_body(("plain",))
    assert body is not None
    assert one_newline_kind(body.get_content()) == one_newline_kind(text)


@given(st.text())
def test_a_subject_is_one_printable_line_of_bounded_length(text: str) -> None:
    line = header_text(text)
    assert len(line) <= MAX_SUBJECT_LENGTH
    assert len(line.splitlines()) <= 1
    assert "=?" not in line
    assert header_text(line) == line


@given(st.text())
@example("x\r\nBcc: eve@example.com")
@example('"quoted" <eve@example.com>,')
@example("=?utf-8?q?=0ABcc:_eve?=")
def test_the_senders_display_name_cannot_become_another_header_or_address(name: str) -> None:
    message = parsed(composed(SETTINGS.model_copy(update={"from_name": name[:100]})))
    assert sorted(message.keys()) == sorted(EXPECTED_HEADERS)
    assert [mailbox.addr_spec for mailbox in message["From"].addresses] == ["forms@quern.example.com"]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ada",
        "ada@",
        "@example.com",
        "ada@example",
        "ada@localhost",
        "ada@127.0.0.1",
        "ada@[127.0.0.1]",
        "ada@example.com,eve@example.com",
        "ada@example.com eve@example.com",
        "Ada <ada@example.com>",
        "<ada@example.com>",
        "ada@example.com\r\nBcc: eve@example.com",
        "ada@example.com\n",
        "ada\r\n@example.com",
        '"ada\r\n"@example.com',
        '"a b"@example.com',
        "ada@exam\x00ple.com",
        "ada(comment)@example.com",
        "ada@example.com>\r\nRCPT TO:<eve@example.com",
        "größe@example.com",
        "a" * 65 + "@example.com",
        "ada@" + "a" * 250 + ".com",
    ],
)
def test_what_is_not_one_plain_address_is_no_recipient(address: str) -> None:
    with pytest.raises(ValidationError) as caught:
        draft(to=[address])
    assert "expected an email address" in str(caught.value)
    with pytest.raises(ValidationError):
        draft(reply_to=address)


def test_an_internationalized_domain_travels_in_its_ascii_form() -> None:
    assert parse_address("ada@bücher.example.com") == "ada@xn--bcher-kva.example.com"


@given(st.text(max_size=80))
@example("a@b.c\u2028Bcc: d")
def test_every_text_is_either_a_header_safe_address_or_refused(text: str) -> None:
    for candidate in (text, f"{text}@example.com", f"ada@{text}.com"):
        try:
            address = parse_address(candidate)
        except ValueError as error:
            assert str(error).startswith("expected an email address") and "found" in str(error)
            continue
        assert address.isascii() and address.isprintable() and " " not in address
        assert not set('<>,;:"()[]\\') & set(address)
        assert address.count("@") == 1


def test_recipients_are_named_once_and_bounded() -> None:
    twice = composed(to=["ada@example.com", "bob@example.com", "ada@example.com"])
    assert parsed(twice)["To"] == "ada@example.com, bob@example.com"
    with pytest.raises(MessageRefusedError, match="at most 20 recipients"):
        composed(to=[f"user{n}@example.com" for n in range(21)])
    with pytest.raises(ValidationError):
        draft(to=[])


def test_a_text_over_the_limit_is_refused() -> None:
    with pytest.raises(MessageRefusedError, match="at most"):
        composed(text="€" * 100_000)


@pytest.mark.parametrize("job_id", ["", "a b", "a@b", "a\r\nBcc: x", "<a>", "x" * 129])
def test_a_job_id_that_is_no_token_gives_no_message_id(job_id: str) -> None:
    with pytest.raises(ValueError, match="job id"):
        compose(draft(), job_id=job_id, date=DATE, settings=SETTINGS)


def test_replies_go_where_the_draft_says() -> None:
    assert parsed(composed(reply_to="bob@example.com"))["Reply-To"] == "bob@example.com"


@pytest.mark.parametrize("host", ["relay.example.com", "10.0.0.1", "localhost.example.com", "::2"])
def test_mail_without_tls_stays_on_this_machine(host: str) -> None:
    with pytest.raises(ValidationError, match="starttls or implicit"):
        MailSettings.model_validate({"host": host, "tls": "none", "from_address": "a@example.com"})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_loopback_may_go_without_tls(host: str) -> None:
    assert MailSettings.model_validate({"host": host, "tls": "none", "from_address": "a@example.com"}).host == host


def test_the_password_is_not_shown() -> None:
    values = {"host": "relay.example.com", "from_address": "a@example.com", "username": "u"}
    assert "hunter2" not in repr(MailSettings.model_validate(values | {"password": "hunter2"}))


def test_a_user_name_without_a_password_hinders_only_who_logs_in() -> None:
    values = {"host": "relay.example.com", "from_address": "a@example.com"}
    assert MailSettings.model_validate(values).login is None
    half = MailSettings.model_validate(values | {"username": "u"})
    with pytest.raises(PasswordMissingError, match="QUERN_MAIL_PASSWORD"):
        _ = half.login
    assert MailSettings.model_validate(values | {"username": "u", "password": "hunter2"}).login == ("u", "hunter2")
    with pytest.raises(ValidationError):
        MailSettings.model_validate(values | {"username": ""})
