"""What came of one attempt to deliver."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum


class Failure(StrEnum):
    """Why there is no answer with a status. The values are stored and shown: never rename one."""

    DISABLED = "endpoint_disabled"
    FORBIDDEN_URL = "forbidden_url"
    FORBIDDEN_ADDRESS = "forbidden_address"
    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """One attempt: either `status` (the receiver answered) or `failure` (it did not), never both.

    `request_headers` holds no signature. `excerpt` is the start of the body of an answer outside 2xx.
    """

    status: int | None
    failure: Failure | None
    detail: str
    duration: timedelta
    retry_after: str | None = None
    excerpt: str = ""
    address: str | None = None
    request_headers: dict[str, str] = field(default_factory=dict)

    @property
    def delivered(self) -> bool:
        """Only 2xx is success: a redirect is refused, as the specification recommends."""
        return self.status is not None and 200 <= self.status <= 299
