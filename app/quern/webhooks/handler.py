"""One attempt of a webhook job: breaker, deliver, log, verdict for the queue. And the jobs that are no steps."""

from __future__ import annotations

import random
import ssl
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from pymongo.client_session import ClientSession

from quern.audit.entry import entry, record
from quern.jobs.handler import Context, Handler, Refused, RetryLater
from quern.jobs.model import Job, NewJob, Queue
from quern.observe import traces
from quern.store import clock
from quern.store.connection import Db, Document
from quern.store.vault import Vault
from quern.webhooks import RESEND_KIND, TEST_KIND, breaker, deliveries, endpoints, schedule
from quern.webhooks.breaker import BreakerState, CircuitOpenError
from quern.webhooks.deliver import deliver
from quern.webhooks.endpoints import Cipher, DisabledReason, Endpoint
from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.settings import WebhookSettings

TEST_EVENT = "webhook.test"


@dataclass(frozen=True)
class Message:
    """What is to be delivered, and where. `response` is None for a test event.

    `original` is the job whose message this is, when another job sends it again: then the `webhook-id` is that one's.
    """

    endpoint: str
    event_type: str
    payload: bytes
    response: str | None
    original: str | None = None


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

    A test event goes past the event filter and an open circuit: its owner wants to know whether the endpoint works.

    Raises:
        RetryLater: by the Standard Webhooks schedule, or, uncharged, while the endpoint's circuit is open.
        Refused: the endpoint is gone or disabled, answered 410, or the schedule is exhausted.
    """
    now = clock.now()
    is_test = message.event_type == TEST_EVENT
    try:
        endpoint, secrets = endpoints.load_for_delivery(db, job.tenant, message.endpoint, cipher=cipher, now=now)
    except LookupError:
        raise Refused("the webhook endpoint was deleted") from None
    if not is_test and not endpoint.wants(message.event_type):
        return {"delivered": False, "reason": "the endpoint does not want this type of event"}
    if len(message.payload) > settings.max_payload_bytes:
        raise Refused(f"the payload has {len(message.payload)} bytes; at most {settings.max_payload_bytes} are sent")
    webhook_id = message_id(message.original or job.id)
    if endpoint.enabled:
        if not is_test:
            _admit(db, endpoint, now, settings)
        outcome = deliver(
            endpoint.url,
            secrets,
            message_id=webhook_id,
            payload=message.payload,
            settings=settings,
            tls=tls,
            now=now,
            request_id=job.request_id,
            traceparent=traceparent,
        )
    else:
        reason = f"the webhook endpoint is disabled ({endpoint.disabled_reason}); enable it and replay this job"
        outcome = DeliveryOutcome(None, Failure.DISABLED, reason, timedelta(0))
    ended = clock.now()
    _log(db, job, message, endpoint, outcome, settings, ended)
    if endpoint.enabled:
        _note(db, endpoint, outcome, ended, settings)
    decision = schedule.decide(
        outcome, attempt=job.failures + 1, now=ended, settings=settings, rng=random.SystemRandom()
    )
    match decision:
        case schedule.Delivered():
            return {"delivered": True, "status": outcome.status, "message_id": webhook_id}
        case schedule.Retry(delay=delay):
            raise RetryLater(outcome.detail, after=delay.total_seconds())
        case schedule.GiveUp(reason=reason, disable_endpoint=disable):
            if disable:
                _disable(db, endpoint, DisabledReason.GONE, ended)
            raise Refused(reason)


def message_id(job_id: str) -> str:
    """The `webhook-id` of a job's message."""
    return "msg_" + job_id.removeprefix("job_")


def make_test_event(tenant: str, endpoint: str, cause: str, *, request_id: str, traceparent: str) -> NewJob:
    """A job that sends one test event, once; the same `cause` makes the same job."""
    return NewJob(
        id=NewJob.derived_id(tenant, TEST_KIND, endpoint, cause),
        tenant=tenant,
        queue=Queue.WEBHOOKS,
        kind=TEST_KIND,
        payload={"endpoint": endpoint},
        request_id=request_id,
        traceparent=traceparent,
    )


def handler_of_test_events(tls: ssl.SSLContext) -> Handler:
    """Sends test events. They are tried once: whoever asked for one is waiting for its answer, not for tomorrow's."""

    def run(job: Job, context: Context) -> dict[str, Any]:
        endpoint = str(job.payload["endpoint"])
        body = {"type": TEST_EVENT, "timestamp": clock.rfc3339(job.created), "data": {"endpoint": endpoint}}
        settings = context.store.settings
        message = Message(endpoint, TEST_EVENT, orjson.dumps(body), None)
        once = settings.webhook.model_copy(update={"schedule_seconds": (0.0,)})
        vault = Vault(*settings.required("secret_keys"))
        with traces.span("deliver webhook", parent=context.traceparent) as traceparent:
            return attempt(job, context.db, message, once, vault, tls, traceparent)

    return Handler(TEST_KIND, run, max_failures=1)


def resend(document: Document, cause: str, *, request_id: str, traceparent: str) -> NewJob:
    """A job that sends the message of an ended job again, with its `webhook-id` and time; one `cause` makes one job."""
    original = document["payload"].get("original", document["_id"])
    occurred = document["payload"].get("occurred", document["created"])
    return NewJob(
        id=NewJob.derived_id(document["tenant"], RESEND_KIND, original, cause),
        tenant=document["tenant"],
        queue=Queue.WEBHOOKS,
        kind=RESEND_KIND,
        # With the body that was sent, if one was.
        payload={**document["payload"], "original": original, "occurred": occurred},
        subject=document["subject"],
        request_id=request_id,
        traceparent=traceparent,
    )


def _log(
    db: Db,
    job: Job,
    message: Message,
    endpoint: Endpoint,
    outcome: DeliveryOutcome,
    settings: WebhookSettings,
    now: datetime,
) -> None:
    record = deliveries.record(
        db,
        job.tenant,
        outcome,
        endpoint=endpoint.id,
        job=job.id,
        attempt=job.failures + 1,
        event_type=message.event_type,
        response=message.response,
        settings=settings,
        now=now,
    )
    # The response may have been erased while the receiver was answering, and the receiver may quote it. A write and not
    # a look: it makes an erasure that is under way start over, and then see the entry, or finish before and take the
    # lease with it.
    held = {"_id": job.id, "lease_id": job.lease_id}
    if record.excerpt and not db.jobs.update_one(held, {"$set": {"excerpt_at": now}}).matched_count:
        deliveries.blank_excerpt(db, record)


def _admit(db: Db, endpoint: Endpoint, now: datetime, settings: WebhookSettings) -> None:
    def transition(state: BreakerState) -> BreakerState:
        return breaker.admit(state, now=now, settings=settings)

    try:
        breaker.apply(endpoints.collection(db), endpoints.selector(endpoint), transition)
    except CircuitOpenError as error:
        # A little spread, so that what waited does not come back all at once.
        wait = (error.until - now).total_seconds() + random.SystemRandom().uniform(0.05, 1.0)
        raise RetryLater("the endpoint's circuit is open", after=wait, charged=False) from None
    except LookupError:
        raise Refused("the webhook endpoint was deleted") from None


def _note(db: Db, endpoint: Endpoint, outcome: DeliveryOutcome, now: datetime, settings: WebhookSettings) -> None:
    pause = schedule.throttle(outcome, now=now, settings=settings)

    def transition(state: BreakerState) -> BreakerState:
        if outcome.delivered:
            return breaker.succeeded(state)
        return breaker.failed(state, now=now, settings=settings, throttle=pause)

    try:
        state = breaker.apply(endpoints.collection(db), endpoints.selector(endpoint), transition)
    except LookupError:
        # Deleted while its last message was under way; the decision about that message stands by itself.
        return
    if breaker.failed_too_long(state, now=now, settings=settings):
        _disable(db, endpoint, DisabledReason.FAILING, now)


def _disable(db: Db, endpoint: Endpoint, reason: DisabledReason, now: datetime) -> None:
    def work(session: ClientSession) -> None:
        endpoints.disable(db, endpoint.tenant, endpoint.id, reason, now=now, session=session)
        detail = {"reason": reason.value}
        record(db, entry(endpoint.tenant, "quern", "webhook.disabled", endpoint.id, detail=detail, at=now), session)

    try:
        with db.client.start_session() as session:
            session.with_transaction(work)
    except LookupError:
        return
