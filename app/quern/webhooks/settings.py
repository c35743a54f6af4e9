"""What the operator decides about webhooks."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyNetwork, PlainSerializer, field_validator

STANDARD_SCHEDULE_SECONDS = (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Delay before each attempt: the example schedule of the Standard Webhooks specification 1.0.0."""


class PortRange(NamedTuple):
    """TCP ports `first` to `last`, both included."""

    first: int
    last: int


def _parse_port_range(value: object) -> object:
    if isinstance(value, PortRange):
        return value
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", str(value))
    if match is None:
        raise ValueError(f"expected a port or a range of ports, such as 443 or 8000-8999, found {value!r}")
    ports = PortRange(int(match[1]), int(match[2] or match[1]))
    if not 1 <= ports.first <= ports.last <= 65_535:
        raise ValueError(f"expected ports between 1 and 65535 in rising order, found {value!r}")
    return ports


def _format_port_range(ports: PortRange) -> str:
    return str(ports.first) if ports.first == ports.last else f"{ports.first}-{ports.last}"


Ports = Annotated[PortRange, BeforeValidator(_parse_port_range), PlainSerializer(_format_port_range)]


class WebhookSettings(BaseModel):
    """Where webhooks may go, how long an attempt may take, and how often it is tried.

    All durations are in seconds. Everything that opens the way to an internal network is off by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allow_http: bool = Field(False, description="Accept http:// as well as https:// (payloads then travel in clear)")
    allow_ports: tuple[Ports, ...] = Field(
        (PortRange(443, 443), PortRange(8443, 8443)), description='Ports that an endpoint may use: 443, "8000-8999"'
    )
    allow_hosts: tuple[str, ...] = Field(
        (), description="Host names (or *.suffix) that may resolve to private, shared or loopback addresses"
    )
    allow_networks: tuple[IPvAnyNetwork, ...] = Field(
        (), description="Networks that are always a legal target, such as 10.20.0.0/16"
    )
    deny_networks: tuple[IPvAnyNetwork, ...] = Field(
        (), description="Networks that are never a legal target, whatever else allows them"
    )
    ca_file: Path | None = Field(None, description="PEM file of authorities to trust besides the system's")

    deadline_seconds: float = Field(20.0, gt=0, le=120, description="Bound of a whole attempt, name lookup included")
    connect_timeout_seconds: float = Field(5.0, gt=0, le=60, description="Bound of connecting to one address")
    max_payload_bytes: int = Field(262_144, ge=1_024, le=8_388_608)
    max_response_bytes: int = Field(65_536, ge=1_024, le=1_048_576, description="Bound of a response body that is read")
    excerpt_bytes: int = Field(1_024, ge=0, le=16_384, description="How much of a refusal's body is kept in the log")

    schedule_seconds: tuple[float, ...] = Field(
        STANDARD_SCHEDULE_SECONDS, min_length=1, max_length=50, description="Delay before each attempt"
    )
    jitter: float = Field(0.2, ge=0, lt=1, description="Each delay is spread by plus or minus this share")
    retry_after_cap_seconds: float = Field(86_400.0, gt=0, description="The longest Retry-After that is honoured")

    breaker_threshold: int = Field(10, ge=1, description="Failures in a row that open an endpoint's circuit")
    breaker_cooldown_seconds: float = Field(30.0, gt=0, description="First pause of an open circuit; doubles")
    breaker_cooldown_cap_seconds: float = Field(1_800.0, gt=0, description="Longest pause of an open circuit")
    disable_after_seconds: float = Field(
        432_000.0, gt=0, description="An endpoint that only failed for so long is disabled (5 days)"
    )

    rotation_grace_seconds: float = Field(86_400.0, ge=0, description="How long a rotated secret still signs")
    max_endpoints_per_tenant: int = Field(50, ge=1)
    delivery_log_days: int = Field(30, ge=1, le=3_650, description="How long the delivery log keeps an attempt")

    @field_validator("allow_hosts")
    @classmethod
    def _hosts_are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            name = host.removeprefix("*.")
            if not name or set("*/:@ ") & set(name):
                raise ValueError(f"expected a host name such as hooks.corp or *.corp, found {host!r}")
        return tuple(host.lower().rstrip(".") for host in hosts)

    @field_validator("schedule_seconds")
    @classmethod
    def _delays_are_not_negative(cls, delays: tuple[float, ...]) -> tuple[float, ...]:
        if min(delays) < 0:
            raise ValueError(f"expected delays of 0 seconds or more, found {min(delays)}")
        return delays

    @property
    def max_attempts(self) -> int:
        return len(self.schedule_seconds)

    @property
    def probe_lease(self) -> timedelta:
        """How long a half-open circuit waits for its probe before it takes the prober for dead."""
        return timedelta(seconds=2 * self.deadline_seconds)
