"""What the operator decides about mail."""

from __future__ import annotations

import ipaddress
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from quern.mail.address import Address


class TLSMode(StrEnum):
    """STARTTLS that is required (port 587), TLS from the first byte (port 465), or none: for loopback only."""

    STARTTLS = "starttls"
    IMPLICIT = "implicit"
    NONE = "none"


class PasswordMissingError(Exception):
    """The relay wants a user name, and this process was given no password for it."""


class MailSettings(BaseModel):
    """The SMTP relay that takes all mail, and who it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        min_length=1,
        max_length=253,
        description="Name of the relay, as its certificate has it",
        examples=["smtp.example.org"],
    )
    port: int = Field(587, ge=1, le=65_535)
    tls: TLSMode = TLSMode.STARTTLS
    ca_file: Path | None = Field(None, description="PEM file of authorities to trust besides the system's")
    username: str | None = Field(None, min_length=1)
    password: SecretStr | None = None
    from_address: Address = Field(description="Address in From and in the envelope", examples=["forms@example.org"])
    from_name: str = Field("", max_length=100)
    timeout_seconds: float = Field(30.0, gt=0, le=300, description="Bound of each exchange with the relay")
    max_recipients: int = Field(20, ge=1, le=100, description="Recipients of one message")
    max_text_bytes: int = Field(262_144, ge=1_024)

    @model_validator(mode="after")
    def _secrets_travel_encrypted(self) -> MailSettings:
        if self.tls is TLSMode.NONE and not _is_loopback(self.host):
            raise ValueError(f"expected tls starttls or implicit for a relay elsewhere, found none for {self.host}")
        return self

    @property
    def login(self) -> tuple[str, str] | None:
        """The user name and the password; None where the relay wants none.

        Asked of whoever talks to the relay, and not when settings are read: every process knows the user name, and
        only those that send mail are given the password.

        Raises PasswordMissingError.
        """
        if self.username is None:
            return None
        if self.password is None:
            raise PasswordMissingError(
                "expected a password for the relay's user name, found none; give it as QUERN_MAIL_PASSWORD "
                "(on a host: secrets_given, quern.quern_mail_password)"
            )
        return self.username, self.password.get_secret_value()

    @property
    def domain(self) -> str:
        """The operator's domain: the right side of every Message-ID, and the name in EHLO."""
        return self.from_address.rpartition("@")[2]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
