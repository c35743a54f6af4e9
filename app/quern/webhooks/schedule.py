"""When to try again, and when to stop: the Standard Webhooks rules as pure functions."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.settings import WebhookSettings

GONE = 410
THROTTLING = frozenset({429, 502, 503, 504})
"""Statuses by which a receiver says that it is under load, for all messages and not only for this one."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """Nothing is left to do."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after `delay`."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop; the message stays as a dead letter that can be replayed. `disable_endpoint` stops all others too."""

    reason: str
    disable_endpoint: bool = False


Decision = Delivered | Retry | GiveUp


def decide(
    outcome: DeliveryOutcome, *, attempt: int, now: datetime, settings: WebhookSettings, rng: random.Random
) -> Decision:
    """What follows from the outcome of attempt number `attempt` (from 1).

    Every answer but 2xx is a failure and is retried on the schedule, for a receiver that answers 404 or 301 while it is
    being deployed is common; 410 ends it and disables the endpoint. An endpoint that is disabled, or whose URL the
    policy refuses, cannot get better by itself. `Retry-After` can only lengthen a delay, up to the cap.
    """
    if outcome.delivered:
        return Delivered()
    if outcome.status == GONE:
        return GiveUp("the receiver answered 410 Gone", disable_endpoint=True)
    if outcome.failure in (Failure.DISABLED, Failure.FORBIDDEN_URL):
        return GiveUp(outcome.detail)
    if attempt >= settings.max_attempts:
        return GiveUp(f"all {settings.max_attempts} attempts failed; the last one: {outcome.detail}")
    delay = settings.schedule_seconds[attempt] * rng.uniform(1 - settings.jitter, 1 + settings.jitter)
    asked = parse_retry_after(outcome.retry_after, now=now)
    if asked is not None:
        delay = max(delay, min(asked.total_seconds(), settings.retry_after_cap_seconds))
    return Retry(timedelta(seconds=delay))


def throttle(outcome: DeliveryOutcome, *, now: datetime, settings: WebhookSettings) -> timedelta | None:
    """How long the receiver asked to be left alone altogether, or None if it did not ask."""
    asked = parse_retry_after(outcome.retry_after, now=now) if outcome.status in THROTTLING else None
    return None if asked is None else min(asked, timedelta(seconds=settings.retry_after_cap_seconds))


def parse_retry_after(value: str | None, *, now: datetime) -> timedelta | None:
    """The delay that a `Retry-After` header asks for (RFC 9110, 10.2.3), or None if it says nothing usable."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]+", value):
        return timedelta(seconds=int(value[:9])) if len(value) <= 9 else timedelta(days=10_000)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    # RFC 9110 dates are in GMT; Python leaves "-0000" without a zone.
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return max(at - now, timedelta(0))
