"""The delivery log: one entry per attempt, for the owner of the endpoint to see what happened.

The payload is not in it, and of the answer only the start of a refusal's body. A receiver may quote in that what it
was sent, so erasing a response blanks it too (`quern.responses`). Entries end by themselves (TTL).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from bson.codec_options import CodecOptions
from pydantic import BaseModel, ConfigDict
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database
from ulid import ULID

from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.settings import WebhookSettings

COLLECTION = "webhook_deliveries"


class DeliveryRecord(BaseModel):
    """One attempt. `attempt` counts from 1 within the job; `response` is None for a test event."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    endpoint: str
    job: str
    response: str | None
    event_type: str
    attempt: int
    at: datetime
    duration_ms: int
    delivered: bool
    status: int | None
    failure: Failure | None
    detail: str
    address: str | None
    request_headers: dict[str, str]
    excerpt: str


class Page(NamedTuple):
    """`after` is the position of the next page, or None at the end."""

    deliveries: tuple[DeliveryRecord, ...]
    after: str | None


def collection(db: Database[dict[str, Any]]) -> Collection[dict[str, Any]]:
    """The log, with times as aware UTC whatever the client's own setting is."""
    return db.get_collection(COLLECTION, codec_options=CodecOptions(tz_aware=True, tzinfo=UTC))


def record(
    db: Database[dict[str, Any]],
    tenant: str,
    outcome: DeliveryOutcome,
    *,
    endpoint: str,
    job: str,
    attempt: int,
    event_type: str,
    response: str | None,
    settings: WebhookSettings,
    now: datetime,
    session: ClientSession | None = None,
) -> DeliveryRecord:
    """Log one attempt that ended at `now`."""
    now = now.replace(microsecond=now.microsecond // 1000 * 1000)
    document = {
        "_id": f"whd_{str(ULID.from_datetime(now)).lower()}",
        "tenant": tenant,
        "endpoint": endpoint,
        "job": job,
        "response": response,
        "event_type": event_type,
        "attempt": attempt,
        "at": now,
        "duration_ms": round(outcome.duration.total_seconds() * 1000),
        "delivered": outcome.delivered,
        "status": outcome.status,
        "failure": None if outcome.failure is None else outcome.failure.value,
        "detail": outcome.detail,
        "address": outcome.address,
        "request_headers": outcome.request_headers,
        "excerpt": outcome.excerpt,
        "expires_at": now + timedelta(days=settings.delivery_log_days),
    }
    collection(db).insert_one(document, session=session)
    return _record(document)


def page(
    db: Database[dict[str, Any]],
    tenant: str,
    *,
    endpoint: str | None = None,
    job: str | None = None,
    response: str | None = None,
    delivered: bool | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    after: str | None = None,
    limit: int = 50,
    session: ClientSession | None = None,
) -> Page:
    """The tenant's attempts from the newest, `limit` at a time, that match every filter; `until` is exclusive."""
    selector: dict[str, Any] = {"tenant": tenant}
    filters = {"endpoint": endpoint, "job": job, "response": response, "delivered": delivered}
    selector |= {name: value for name, value in filters.items() if value is not None}
    selector |= _span(since, until)
    if after is not None:
        selector["_id"] = selector.get("_id", {}) | {"$lt": min(after, selector.get("_id", {}).get("$lt", after))}
    documents = list(collection(db).find(selector, session=session).sort("_id", -1).limit(limit + 1))
    found = tuple(_record(document) for document in documents[:limit])
    return Page(found, found[-1].id if len(documents) > limit else None)


def get(
    db: Database[dict[str, Any]], tenant: str, delivery_id: str, *, session: ClientSession | None = None
) -> DeliveryRecord:
    """Raises LookupError."""
    document = collection(db).find_one({"_id": delivery_id, "tenant": tenant}, session=session)
    if document is None:
        raise LookupError("expected a delivery of this tenant, found none (the log is kept for a limited time)")
    return _record(document)


def failed_jobs(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint: str,
    *,
    since: datetime,
    until: datetime | None,
    limit: int,
) -> list[str]:
    """Dead jobs of responses that failed at this endpoint in a span of time, from the oldest, at most `limit`."""
    failed = {"tenant": tenant, "endpoint": endpoint, "delivered": False, "response": {"$ne": None}}
    pipeline: list[dict[str, Any]] = [
        {"$match": failed | _span(since, until)},
        {"$sort": {"_id": 1}},
        {"$group": {"_id": "$job", "first": {"$first": "$_id"}}},
        {"$lookup": {"from": "jobs", "localField": "_id", "foreignField": "_id", "as": "job"}},
        {"$match": {"job.state": "dead", "job.tenant": tenant}},
        {"$sort": {"first": 1}},
        {"$limit": limit},
        {"$project": {"_id": 1}},
    ]
    return [row["_id"] for row in collection(db).aggregate(pipeline)]


def blank_excerpt(db: Database[dict[str, Any]], delivery: DeliveryRecord) -> None:
    """Remove what the receiver said in one attempt."""
    collection(db).update_one({"_id": delivery.id, "tenant": delivery.tenant}, {"$set": {"excerpt": ""}})


def _span(since: datetime | None, until: datetime | None) -> dict[str, Any]:
    """A span of time as bounds of the identifiers, which begin with the time: so the list's own index serves it."""
    bounds = {"$gte": since, "$lt": until}
    found = {operator: _first_id(at) for operator, at in bounds.items() if at is not None}
    return {"_id": found} if found else {}


def _first_id(at: datetime) -> str:
    milliseconds = max(0, -(-int(at.timestamp() * 1_000_000) // 1_000))
    return f"whd_{str(ULID.from_bytes(milliseconds.to_bytes(6, 'big') + bytes(10))).lower()}"


def _record(document: dict[str, Any]) -> DeliveryRecord:
    return DeliveryRecord.model_validate({"id": document["_id"]} | document)
