"""One message, built so that nothing that a person typed can become a header, a recipient or markup."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from email.headerregistry import Address as Mailbox
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime

from pydantic import BaseModel, ConfigDict, Field

from quern.mail.address import Address
from quern.mail.settings import MailSettings

MAX_SUBJECT_LENGTH = 200

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class MessageDraft(BaseModel):
    """What to say to whom. `subject` and `text` may hold anything that people typed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: tuple[Address, ...] = Field(min_length=1)
    subject: str
    text: str
    reply_to: Address | None = None
    with_html: bool = False


class MessageRefusedError(ValueError):
    """The draft goes beyond the operator's limits; trying again will not help."""


def message_id(job_id: str, domain: str) -> str:
    """The same job gives the same Message-ID, so that a repetition after a crash is seen as one.

    Raises ValueError for a job id outside `[A-Za-z0-9_-]{1,128}`.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise ValueError("expected a job id of 1 to 128 letters, digits, _ or -, found something else")
    return f"<{job_id}@{domain}>"


def compose(draft: MessageDraft, *, job_id: str, date: datetime, settings: MailSettings) -> EmailMessage:
    """The message for one job: UTF-8 text, and its HTML twin if asked for.

    `date` (aware) should be the job's, not the attempt's: then a repetition is the same message to the byte, but for
    the separator between the two twins.
    It says that it was sent automatically (RFC 3834), so that no vacation responder answers.

    Raises MessageRefusedError.
    """
    if len(draft.to) > settings.max_recipients:
        raise MessageRefusedError(f"expected at most {settings.max_recipients} recipients, found {len(draft.to)}")
    if len(draft.text.encode()) > settings.max_text_bytes:
        raise MessageRefusedError(f"expected a text of at most {settings.max_text_bytes} bytes, found a longer one")
    message = EmailMessage(policy=SMTP)
    message["From"] = _mailbox(settings.from_address, header_text(settings.from_name))
    message["To"] = _mailboxes(draft.to)
    if draft.reply_to is not None:
        message["Reply-To"] = _mailbox(draft.reply_to)
    message["Subject"] = header_text(draft.subject)
    message["Date"] = format_datetime(date.astimezone(UTC))
    message["Message-ID"] = message_id(job_id, settings.domain)
    message["Auto-Submitted"] = "auto-generated"
    message["X-Auto-Response-Suppress"] = "All"
    message.set_content(draft.text, cte="base64")
    if draft.with_html:
        message.add_alternative(_as_html(draft.text), subtype="html", cte="base64")
    return message


def header_text(text: str) -> str:
    """Text for an unstructured header: one line, no control characters, nothing that reads as an encoded word.

    Python's header classes decode `=?…?=` in what they are given, and split lines at more characters than CR and LF:
    both would let a value grow a header (CVE-2024-6923 is of this kind). Neither is left in the text.
    """
    kept = "".join(" " if unicodedata.category(character) in _BREAKING else character for character in text)
    return " ".join(kept.replace("=?", "= ?").split())[:MAX_SUBJECT_LENGTH].strip()


# Controls, line and paragraph separators, and surrogates (which have no UTF-8).
_BREAKING = frozenset({"Cc", "Zl", "Zp", "Cs"})


def _mailbox(address: str, name: str = "") -> Mailbox:
    return Mailbox(display_name=name, addr_spec=address)


def _mailboxes(addresses: Sequence[str]) -> tuple[Mailbox, ...]:
    return tuple(_mailbox(address) for address in dict.fromkeys(addresses))


def _as_html(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip())
    escaped = (html.escape(paragraph).replace("\n", "<br>\n") for paragraph in paragraphs)
    body = "\n".join(f"<p>{paragraph}</p>" for paragraph in escaped)
    return f'<!doctype html>\n<html><head><meta charset="utf-8"></head><body>\n{body}\n</body></html>\n'
