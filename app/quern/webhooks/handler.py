"""One attempt of a webhook job: guard, breaker, deliver, log, and the verdict for the queue."""

from __future__ import annotations

import random
import ssl
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from quern.jobs.handler import Refused, RetryLater
from quern.jobs.model import Job
from quern.store import clock
from quern.store.connection import Db
from quern.webhooks import breaker, deliveries, endpoints, schedule
from quern.webhooks.breaker import BreakerState, CircuitOpenError
from quern.webhooks.deliver import deliver
from quern.webhooks.endpoints import Cipher, DisabledReason, Endpoint
from quern.webhooks.outcome import DeliveryOutcome
from quern.webhooks.settings import WebhookSettings


@dataclass(frozen=True)
class Message:
    """What is to be delivered, and where. `response` is None for a test event."""

    endpoint: str
    event_type: str
    payload: bytes
    response: str | None


def attempt(
    job: Job,
    db: Db,
    message: Message,
    settings: WebhookSettings,
    cipher: Cipher,
    tls: ssl.SSLContext,
    traceparent: str | None,
) -> dict[str, Any]:
    """Deliver once. The message's id is made from the job's, so it is the same at every attempt and after a crash.

    Raises:
        RetryLater: by the Standard Webhooks schedule, or, uncharged, while the endpoint's circuit is open.
        Refused: the endpoint is gone or disabled, answered 410, or the schedule is exhausted.
    """
    now = clock.now()
    try:
        endpoint, secrets = endpoints.load_for_delivery(db, job.tenant, message.endpoint, cipher=cipher, now=now)
    except LookupError:
        raise Refused("the webhook endpoint was deleted") from None
    if not endpoint.enabled:
        raise Refused(f"the webhook endpoint is disabled ({endpoint.disabled_reason}); enable it and replay this job")
    if not endpoint.wants(message.event_type):
        return {"delivered": False, "reason": "the endpoint does not want this type of event"}
    if len(message.payload) > settings.max_payload_bytes:
        raise Refused(f"the payload has {len(message.payload)} bytes; at most {settings.max_payload_bytes} are sent")
    _admit(db, endpoint, now, settings)
    outcome = deliver(
        endpoint.url,
        secrets,
        message_id=message_id(job),
        payload=message.payload,
        settings=settings,
        tls=tls,
        now=now,
        request_id=job.request_id,
        traceparent=traceparent,
    )
    number = job.failures + 1
    ended = clock.now()
    deliveries.record(
        db,
        job.tenant,
        outcome,
        endpoint=endpoint.id,
        job=job.id,
        attempt=number,
        event_type=message.event_type,
        response=message.response,
        settings=settings,
        now=ended,
    )
    _note(db, endpoint, outcome, ended, settings)
    decision = schedule.decide(outcome, attempt=number, now=ended, settings=settings, rng=random.SystemRandom())
    match decision:
        case schedule.Delivered():
            return {"delivered": True, "status": outcome.status, "message_id": message_id(job)}
        case schedule.Retry(delay=delay):
            raise RetryLater(outcome.detail, after=delay.total_seconds())
        case schedule.GiveUp(reason=reason, disable_endpoint=disable):
            if disable:
                endpoints.disable(db, job.tenant, endpoint.id, DisabledReason.GONE, now=ended)
            raise Refused(reason)


def message_id(job: Job) -> str:
    """The `webhook-id` of a job's message."""
    return "msg_" + job.id.removeprefix("job_")


def _admit(db: Db, endpoint: Endpoint, now: datetime, settings: WebhookSettings) -> None:
    def transition(state: BreakerState) -> BreakerState:
        return breaker.admit(state, now=now, settings=settings)

    try:
        breaker.apply(endpoints.collection(db), endpoints.selector(endpoint), transition)
    except CircuitOpenError as error:
        # A little spread, so that what waited does not come back all at once.
        wait = (error.until - now).total_seconds() + random.SystemRandom().uniform(0.05, 1.0)
        raise RetryLater("the endpoint's circuit is open", after=max(wait, 0.05), charged=False) from None


def _note(db: Db, endpoint: Endpoint, outcome: DeliveryOutcome, now: datetime, settings: WebhookSettings) -> None:
    pause: timedelta | None = schedule.throttle(outcome, now=now, settings=settings)

    def transition(state: BreakerState) -> BreakerState:
        if outcome.delivered:
            return breaker.succeeded(state)
        return breaker.failed(state, now=now, settings=settings, throttle=pause)

    try:
        state = breaker.apply(endpoints.collection(db), endpoints.selector(endpoint), transition)
        if breaker.failed_too_long(state, now=now, settings=settings):
            endpoints.disable(db, endpoint.tenant, endpoint.id, DisabledReason.FAILING, now=now)
    except LookupError:
        # Deleted while its last message was under way; the decision about that message stands by itself.
        return
