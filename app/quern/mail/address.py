"""Mail addresses as they go into headers and envelopes: ASCII, one mailbox, nothing else."""

from __future__ import annotations

from typing import Annotated

from email_validator import EmailNotValidError, validate_email
from pydantic import AfterValidator


def parse_address(text: str) -> str:
    """The address in its normal form, an internationalized domain in its ASCII form.

    Local parts outside ASCII need SMTPUTF8 at every hop and are refused. Raises ValueError, which does not repeat the
    address: it may end in a log.
    """
    try:
        parsed = validate_email(text, check_deliverability=False, allow_smtputf8=False, strict=True)
    except EmailNotValidError:
        raise ValueError("expected an email address such as ada@example.com, found something else") from None
    if parsed.ascii_email is None:
        raise ValueError("expected an email address with an ASCII local part, found another")
    return parsed.ascii_email


Address = Annotated[str, AfterValidator(parse_address)]
