"""`/webhooks`: endpoints, their secrets, test events, the delivery log and replays."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from quern.api.jobs import Job
from quern.api.jobs import show as show_job
from quern.api.operation import Call, Edge, Reply
from quern.api.page import Page, PageQuery
from quern.api.problem import Fault, Problem, not_found
from quern.jobs import queue
from quern.jobs.model import NewJob, State
from quern.observe.traces import traceparent
from quern.store import clock, cursor, identifier
from quern.store.moment import Moment
from quern.webhooks import RESEND_KIND, TEST_KIND, deliveries, endpoints
from quern.webhooks.endpoints import DisabledReason, EndpointChange, EndpointDraft
from quern.webhooks.guard import ForbiddenURLError
from quern.webhooks.handler import make_test_event, resend
from quern.webhooks.outcome import Failure

MAX_REPLAYED = 100

edge = Edge("webhooks")


class Circuit(BaseModel):
    """Whether messages go out, or wait because the endpoint has been failing."""

    state: Literal["closed", "open", "half_open"]
    failures: int = Field(description="failures since the last success")
    until: datetime | None = Field(description="when the next message goes out as a probe")


class Endpoint(BaseModel):
    """A webhook endpoint; its secret is shown only when it is made."""

    id: str
    url: str
    description: str
    event_types: list[str] = Field(description="empty: all")
    enabled: bool
    disabled_reason: DisabledReason | None = Field(
        description="`owner`: by you; `gone`: it answered 410; `failing`: it only failed for days"
    )
    disabled_at: datetime | None
    circuit: Circuit
    created: datetime
    updated: datetime


class EndpointWithSecret(Endpoint):
    """An endpoint and its new secret."""

    secret: str = Field(description="signs every message (Standard Webhooks, `whsec_…`); it cannot be shown again")


class EndpointPage(Page[Endpoint]):
    """Webhook endpoints, oldest first."""


class Delivery(BaseModel):
    """One attempt to deliver one message."""

    id: str
    endpoint: str
    job: str
    response: str | None = Field(description="null for a test event")
    event_type: str
    attempt: int
    at: datetime
    duration_ms: int
    delivered: bool
    status: int | None = Field(description="what the receiver answered; null when there was no answer")
    failure: Failure | None = Field(description="why there was no answer")
    detail: str
    address: str | None
    request_headers: dict[str, str] = Field(description="without the signature")
    excerpt: str = Field(description="the start of the body of an answer other than 2xx")


class DeliveryPage(Page[Delivery]):
    """Deliveries, newest first."""


class DeliveryQuery(PageQuery):
    job: Annotated[str, StringConstraints(max_length=40)] | None = None
    response: Annotated[str, StringConstraints(max_length=40)] | None = None
    delivered: bool | None = None
    since: Moment | None = None
    until: Moment | None = Field(None, description="exclusive")


class ReplayIn(BaseModel):
    """Which failures to send again."""

    model_config = ConfigDict(extra="forbid")

    since: Moment
    until: Moment | None = Field(None, description="exclusive; by default now")


class Replayed(BaseModel):
    """The jobs that run again."""

    jobs: list[str]
    more: bool = Field(description="whether to ask again for the rest")


def _fields(endpoint: endpoints.Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "description": endpoint.description,
        "event_types": list(endpoint.event_types),
        "enabled": endpoint.enabled,
        "disabled_reason": endpoint.disabled_reason,
        "disabled_at": endpoint.disabled_at,
        "circuit": Circuit(
            state=endpoint.breaker.circuit.value, failures=endpoint.breaker.failures, until=endpoint.breaker.until
        ),
        "created": endpoint.created_at,
        "updated": endpoint.updated_at,
    }


def _show(endpoint: endpoints.Endpoint) -> Endpoint:
    return Endpoint(**_fields(endpoint))


def _show_delivery(record: deliveries.DeliveryRecord) -> Delivery:
    return Delivery(**record.model_dump(exclude={"tenant"}))


def _forbidden(error: ForbiddenURLError) -> Problem:
    return Problem(422, str(error), kind="validation", errors=[Fault(pointer="/url", detail=str(error))])


def _get(call: Call, endpoint: str) -> endpoints.Endpoint:
    try:
        return endpoints.get(call.db, call.tenant, endpoint, session=call.session)
    except LookupError:
        raise not_found("webhook endpoint") from None


def _enabled(call: Call, endpoint: str) -> endpoints.Endpoint:
    found = _get(call, endpoint)
    if not found.enabled:
        raise Problem(409, f"the webhook endpoint is disabled ({found.disabled_reason}); enable it first")
    return found


@edge.operation(
    "POST",
    "/webhooks",
    scope="webhooks:write",
    summary="Create a webhook endpoint",
    body=EndpointDraft,
    answers={201: EndpointWithSecret},
)
def create_endpoint(call: Call) -> Reply:
    """The URL must be https, on a port that the operator allows, and must not lead into the operator's own network.

    Keep the secret: messages are verified with it, and it is not shown again.
    """
    settings = call.runtime.settings.webhook
    try:
        made = endpoints.create(
            call.db,
            call.tenant,
            call.body,
            cipher=call.runtime.vault,
            settings=settings,
            now=clock.now(),
            session=call.session,
        )
    except ForbiddenURLError as error:
        raise _forbidden(error) from None
    except endpoints.TooManyEndpointsError as error:
        raise Problem(409, str(error)) from None
    call.audit("webhook.created", made.endpoint.id)
    shown = EndpointWithSecret(**_fields(made.endpoint), secret=made.secret)
    return Reply(shown, 201, {"Location": f"/api/v1/webhooks/{made.endpoint.id}"})


@edge.operation(
    "GET",
    "/webhooks",
    scope="webhooks:read",
    summary="List webhook endpoints",
    query=PageQuery,
    answers={200: EndpointPage},
)
def list_endpoints(call: Call) -> Reply:
    """Oldest first."""
    after = call.query.position(1)
    found = endpoints.page(call.db, call.tenant, after=after[0] if after else None, limit=call.query.limit)
    following = cursor.encode(found.after) if found.after else None
    return Reply(EndpointPage(items=[_show(endpoint) for endpoint in found.endpoints], next_cursor=following))


@edge.operation(
    "GET", "/webhooks/{endpoint}", scope="webhooks:read", summary="Read a webhook endpoint", answers={200: Endpoint}
)
def get_endpoint(call: Call, endpoint: str) -> Reply:
    """With the state of its circuit: an endpoint that keeps failing is left alone for a while."""
    return Reply(_show(_get(call, endpoint)))


@edge.operation(
    "PATCH",
    "/webhooks/{endpoint}",
    scope="webhooks:write",
    summary="Change a webhook endpoint",
    body=EndpointChange,
    answers={200: Endpoint},
)
def change_endpoint(call: Call, endpoint: str) -> Reply:
    """Fields that are left out, or null, stay as they are."""
    try:
        changed = endpoints.update(
            call.db,
            call.tenant,
            endpoint,
            call.body,
            settings=call.runtime.settings.webhook,
            now=clock.now(),
            session=call.session,
        )
    except LookupError:
        raise not_found("webhook endpoint") from None
    except ForbiddenURLError as error:
        raise _forbidden(error) from None
    call.audit("webhook.changed", endpoint, {"fields": sorted(call.body.model_dump(exclude_none=True))})
    return Reply(_show(changed))


@edge.operation(
    "DELETE", "/webhooks/{endpoint}", scope="webhooks:write", summary="Delete a webhook endpoint", answers={204: None}
)
def delete_endpoint(call: Call, endpoint: str) -> Reply:
    """Messages that still wait for it become dead letters."""
    try:
        endpoints.delete(call.db, call.tenant, endpoint, session=call.session)
    except LookupError:
        raise not_found("webhook endpoint") from None
    call.audit("webhook.deleted", endpoint)
    return Reply(status=204)


@edge.operation(
    "POST",
    "/webhooks/{endpoint}/rotate",
    scope="webhooks:write",
    summary="Rotate a webhook endpoint's secret",
    answers={200: EndpointWithSecret},
)
def rotate_secret(call: Call, endpoint: str) -> Reply:
    """Messages are signed with both secrets, the new one first, until the grace period of the old one ends (a day)."""
    try:
        made = endpoints.rotate_secret(
            call.db,
            call.tenant,
            endpoint,
            cipher=call.runtime.vault,
            settings=call.runtime.settings.webhook,
            now=clock.now(),
            session=call.session,
        )
    except LookupError:
        raise not_found("webhook endpoint") from None
    call.audit("webhook.secret_rotated", endpoint)
    return Reply(EndpointWithSecret(**_fields(made.endpoint), secret=made.secret))


@edge.operation(
    "POST",
    "/webhooks/{endpoint}/enable",
    scope="webhooks:write",
    summary="Enable a webhook endpoint",
    answers={200: Endpoint},
)
def enable_endpoint(call: Call, endpoint: str) -> Reply:
    """Closes its circuit too. What failed in the meantime is sent again by `replay`."""
    try:
        enabled = endpoints.enable(call.db, call.tenant, endpoint, now=clock.now(), session=call.session)
    except LookupError:
        raise not_found("webhook endpoint") from None
    call.audit("webhook.enabled", endpoint)
    return Reply(_show(enabled))


@edge.operation(
    "POST",
    "/webhooks/{endpoint}/disable",
    scope="webhooks:write",
    summary="Disable a webhook endpoint",
    answers={200: Endpoint},
)
def disable_endpoint(call: Call, endpoint: str) -> Reply:
    """Messages for it become dead letters, which `replay` sends once it is enabled again."""
    _get(call, endpoint)
    disabled = endpoints.disable(
        call.db, call.tenant, endpoint, DisabledReason.OWNER, now=clock.now(), session=call.session
    )
    call.audit("webhook.disabled", endpoint)
    return Reply(_show(disabled))


@edge.operation(
    "POST",
    "/webhooks/{endpoint}/test",
    scope="webhooks:write",
    summary="Send a test event",
    answers={202: Job},
)
def send_test_event(call: Call, endpoint: str) -> Reply:
    """Sends `webhook.test` once, whatever event types the endpoint wants and even while its circuit is open."""
    _enabled(call, endpoint)
    job = make_test_event(
        call.tenant, endpoint, identifier.new("run"), request_id=call.request_id, traceparent=traceparent()
    )
    call.audit("webhook.tested", endpoint, {"job": job.id})
    return _start(call, job)


@edge.operation(
    "GET",
    "/webhooks/{endpoint}/deliveries",
    scope="webhooks:read",
    summary="List an endpoint's deliveries",
    query=DeliveryQuery,
    answers={200: DeliveryPage},
)
def list_deliveries(call: Call, endpoint: str) -> Reply:
    """Every attempt, newest first, as long as the operator keeps the log (30 days by default), without payloads."""
    _get(call, endpoint)
    query: DeliveryQuery = call.query
    after = query.position(1)
    found = deliveries.page(
        call.db,
        call.tenant,
        endpoint=endpoint,
        job=query.job,
        response=query.response,
        delivered=query.delivered,
        since=query.since,
        until=query.until,
        after=after[0] if after else None,
        limit=query.limit,
    )
    following = cursor.encode(found.after) if found.after else None
    return Reply(DeliveryPage(items=[_show_delivery(record) for record in found.deliveries], next_cursor=following))


@edge.operation(
    "GET",
    "/webhooks/{endpoint}/deliveries/{delivery}",
    scope="webhooks:read",
    summary="Read a delivery",
    answers={200: Delivery},
)
def get_delivery(call: Call, endpoint: str, delivery: str) -> Reply:
    """One attempt."""
    return Reply(_show_delivery(_delivery(call, endpoint, delivery)))


def _delivery(call: Call, endpoint: str, delivery: str) -> deliveries.DeliveryRecord:
    _get(call, endpoint)
    try:
        record = deliveries.get(call.db, call.tenant, delivery, session=call.session)
    except LookupError:
        raise not_found("delivery") from None
    if record.endpoint != endpoint:
        raise not_found("delivery")
    return record


@edge.operation(
    "POST",
    "/webhooks/{endpoint}/deliveries/{delivery}/replay",
    scope="webhooks:write",
    summary="Send a delivery's message again",
    answers={202: Job},
)
def replay_delivery(call: Call, endpoint: str, delivery: str) -> Reply:
    """The message keeps its `webhook-id` and shows the response as it is now.

    A dead letter runs again; a message that was delivered is sent once more by a job of its own.
    """
    _enabled(call, endpoint)
    record = _delivery(call, endpoint, delivery)
    document = queue.get(call.db, call.tenant, record.job, call.session)
    if document is None or "erased" in document:
        raise Problem(409, "the message is no longer kept: its response was erased, or its job is too old")
    if document["kind"] == TEST_KIND:
        raise Problem(409, "this was a test event; send another one")
    if document["state"] == State.DEAD:
        try:
            document = queue.replay(call.runtime.store, call.tenant, record.job, call.session) or document
        except queue.NotPossibleError as error:
            raise Problem(409, str(error)) from None
        call.audit("job.replayed", record.job)
        call.open_after_commit(queue.opening(document))
        return Reply(show_job(document), 202)
    if document["state"] != State.DONE:
        raise Problem(409, f"the job is {document['state']}; only a dead or done one can be sent again")
    if record.response is None:
        raise Problem(409, "this message was delivered; what it names can be read, and it is not sent twice")
    cause = call.idempotency_key or identifier.new("run")
    job = resend(document, f"{delivery} {cause}", request_id=call.request_id, traceparent=traceparent())
    call.audit("webhook.resent", endpoint, {"job": job.id, "kind": RESEND_KIND})
    return _start(call, job)


@edge.operation(
    "POST",
    "/webhooks/{endpoint}/replay",
    scope="webhooks:write",
    summary="Send what failed in a span of time again",
    body=ReplayIn,
    answers={202: Replayed},
)
def replay_failures(call: Call, endpoint: str) -> Reply:
    """For after an outage: runs every dead letter of this endpoint again that failed in the span, up to 100 at a time.

    Asking twice sends nothing twice: a job that runs again is no dead letter.
    """
    _enabled(call, endpoint)
    found = deliveries.failed_jobs(
        call.db, call.tenant, endpoint, since=call.body.since, until=call.body.until, limit=MAX_REPLAYED + 1
    )
    replayed, opened = [], []
    for job in found[:MAX_REPLAYED]:
        try:
            document = queue.replay(call.runtime.store, call.tenant, job, call.session)
            if document is not None:
                replayed.append(job)
                opened += queue.opening(document)
        except queue.NotPossibleError:
            # Somebody else replayed it in the meantime.
            continue
    if replayed:
        call.audit("webhook.replayed", endpoint, {"jobs": len(replayed)})
        call.open_after_commit(opened)
    return Reply(Replayed(jobs=replayed, more=len(found) > MAX_REPLAYED), 202)


def _start(call: Call, job: NewJob) -> Reply:
    """Make the job durable, with the request where it has a transaction, and wake its queue."""
    call.open_after_commit(queue.insert(call.db, [job], session=call.session))
    document = call.db.jobs.find_one({"_id": job.id}, session=call.session)
    if document is None:
        raise RuntimeError(f"expected the job {job.id} that was just made, found none")
    return Reply(show_job(document), 202, {"Location": f"/api/v1/jobs/{job.id}"})
