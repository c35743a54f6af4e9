"""Webhook endpoints of a tenant: where signed messages go, and the secrets that sign them.

Every function takes the tenant and touches nothing outside it. Secrets are stored only as the injected cipher made
them, and leave by `create` and `rotate_secret` (once, for their owner) and `load_for_delivery`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Protocol

from bson.codec_options import CodecOptions
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pymongo import ReturnDocument
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database

from quern.store import identifier
from quern.webhooks.breaker import BreakerState
from quern.webhooks.guard import parse_target
from quern.webhooks.settings import WebhookSettings
from quern.webhooks.sign import new_secret

COLLECTION = "webhook_endpoints"
MAX_ACTIVE_SECRETS = 4
MAX_CONFLICTS = 10


class Cipher(Protocol):
    """Authenticated encryption at rest; `decrypt` raises when the text was changed or its key is gone."""

    def encrypt(self, plaintext: bytes, /) -> bytes: ...

    def decrypt(self, ciphertext: bytes, /) -> bytes: ...


class TooManyEndpointsError(ValueError):
    """The tenant has as many endpoints as the operator allows."""


class DisabledReason(StrEnum):
    """Why nothing is sent to an endpoint. The values are stored and shown: never rename one."""

    OWNER = "owner"
    GONE = "gone"
    FAILING = "failing"


EventType = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}(\.[a-z0-9_]{1,64}){0,4}$")]
"""Such as response.processed: lower case, parts joined by full stops."""

Description = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f]*$")]


class EndpointDraft(BaseModel):
    """What the owner decides. No event types means all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(max_length=2_048)
    description: Description = ""
    event_types: tuple[EventType, ...] = Field((), max_length=50)


class EndpointChange(BaseModel):
    """The fields to change; those that are left out (or None) stay as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = Field(None, max_length=2_048)
    description: Description | None = None
    event_types: tuple[EventType, ...] | None = Field(None, max_length=50)


class Endpoint(BaseModel):
    """An endpoint as its owner may see it: without secrets."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    url: str
    description: str
    event_types: tuple[str, ...]
    enabled: bool
    disabled_reason: DisabledReason | None
    disabled_at: datetime | None
    breaker: BreakerState
    created_at: datetime
    updated_at: datetime

    def wants(self, event_type: str) -> bool:
        return not self.event_types or event_type in self.event_types


class WithSecret(NamedTuple):
    """An endpoint and its new secret in clear, to be shown to its owner this once."""

    endpoint: Endpoint
    secret: str


class ForDelivery(NamedTuple):
    """An endpoint and the secrets in clear that sign for it now, newest first."""

    endpoint: Endpoint
    secrets: tuple[str, ...]


class Page(NamedTuple):
    """`after` is the position of the next page, or None at the end."""

    endpoints: tuple[Endpoint, ...]
    after: str | None


def collection(db: Database[dict[str, Any]]) -> Collection[dict[str, Any]]:
    """The endpoints, with times as aware UTC whatever the client's own setting is."""
    return db.get_collection(COLLECTION, codec_options=CodecOptions(tz_aware=True, tzinfo=UTC))


def create(
    db: Database[dict[str, Any]],
    tenant: str,
    draft: EndpointDraft,
    *,
    cipher: Cipher,
    settings: WebhookSettings,
    now: datetime,
    session: ClientSession | None = None,
) -> WithSecret:
    """Store an endpoint with a fresh secret.

    Raises ForbiddenURLError, TooManyEndpointsError.
    """
    url = parse_target(draft.url, settings).url
    endpoints = collection(db)
    # Two at once can pass this together: it bounds abuse, not a quota to the last one.
    if endpoints.count_documents({"tenant": tenant}, session=session) >= settings.max_endpoints_per_tenant:
        raise TooManyEndpointsError(f"expected at most {settings.max_endpoints_per_tenant} endpoints; delete one first")
    secret = new_secret()
    now = _milliseconds(now)
    document = {
        "_id": identifier.new("whe"),
        "tenant": tenant,
        "url": url,
        "description": draft.description,
        "event_types": list(draft.event_types),
        "enabled": True,
        "disabled_reason": None,
        "disabled_at": None,
        "secrets": [_sealed(secret, cipher, now)],
        "breaker": BreakerState().model_dump(),
        "revision": 0,
        "created_at": now,
        "updated_at": now,
    }
    endpoints.insert_one(document, session=session)
    return WithSecret(_endpoint(document), secret)


def get(
    db: Database[dict[str, Any]], tenant: str, endpoint_id: str, *, session: ClientSession | None = None
) -> Endpoint:
    """Raises LookupError."""
    return _endpoint(_found(collection(db).find_one(_selector(tenant, endpoint_id), session=session)))


def page(
    db: Database[dict[str, Any]],
    tenant: str,
    *,
    after: str | None = None,
    limit: int = 50,
    session: ClientSession | None = None,
) -> Page:
    """The tenant's endpoints from the oldest, `limit` at a time; `after` is what the page before gave."""
    selector: dict[str, Any] = {"tenant": tenant} | ({} if after is None else {"_id": {"$gt": after}})
    documents = list(collection(db).find(selector, session=session).sort("_id", 1).limit(limit + 1))
    found = tuple(_endpoint(document) for document in documents[:limit])
    return Page(found, found[-1].id if len(documents) > limit else None)


def subscribed(
    db: Database[dict[str, Any]], tenant: str, event_type: str, *, session: ClientSession | None = None
) -> list[Endpoint]:
    """The tenant's enabled endpoints that want this type of event, from the oldest."""
    selector = {"tenant": tenant, "enabled": True, "$or": [{"event_types": event_type}, {"event_types": []}]}
    return [_endpoint(document) for document in collection(db).find(selector, session=session).sort("_id", 1)]


def update(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint_id: str,
    change: EndpointChange,
    *,
    settings: WebhookSettings,
    now: datetime,
    session: ClientSession | None = None,
) -> Endpoint:
    """Change what the owner decides. A new URL starts with a closed circuit.

    Raises LookupError, ForbiddenURLError.
    """
    fields: dict[str, Any] = change.model_dump(exclude_none=True) | {"updated_at": now}
    if change.event_types is not None:
        fields["event_types"] = list(change.event_types)
    if change.url is not None:
        fields["url"] = parse_target(change.url, settings).url
        fields |= _closed_circuit()
    return _set(db, tenant, endpoint_id, fields, session)


def delete(
    db: Database[dict[str, Any]], tenant: str, endpoint_id: str, *, session: ClientSession | None = None
) -> None:
    """Raises LookupError."""
    if not collection(db).delete_one(_selector(tenant, endpoint_id), session=session).deleted_count:
        raise _missing()


def enable(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint_id: str,
    *,
    now: datetime,
    session: ClientSession | None = None,
) -> Endpoint:
    """Send to it again, with a closed circuit. Raises LookupError."""
    fields = {"enabled": True, "disabled_reason": None, "disabled_at": None, "updated_at": now}
    return _set(db, tenant, endpoint_id, fields | _closed_circuit(), session)


def disable(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint_id: str,
    reason: DisabledReason,
    *,
    now: datetime,
    session: ClientSession | None = None,
) -> Endpoint:
    """Send nothing more to it until it is enabled. Raises LookupError."""
    fields = {"enabled": False, "disabled_reason": reason.value, "disabled_at": now, "updated_at": now}
    return _set(db, tenant, endpoint_id, fields, session)


def rotate_secret(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint_id: str,
    *,
    cipher: Cipher,
    settings: WebhookSettings,
    now: datetime,
    session: ClientSession | None = None,
) -> WithSecret:
    """Add a fresh secret; the ones before it go on signing for the grace period, so that every message is signed twice.

    At most four are active: rotating faster than that drops the oldest. Raises LookupError, and RuntimeError when
    others rotate it at the same time again and again.
    """
    endpoints = collection(db)
    now = _milliseconds(now)
    grace_ends = now + timedelta(seconds=settings.rotation_grace_seconds)
    secret = new_secret()
    for _ in range(MAX_CONFLICTS):
        document = _found(endpoints.find_one(_selector(tenant, endpoint_id), session=session))
        before = [
            stored | {"expires_at": min(stored["expires_at"] or grace_ends, grace_ends)}
            for stored in document["secrets"]
            if _is_active(stored, now)
        ]
        after = endpoints.find_one_and_update(
            _selector(tenant, endpoint_id) | {"revision": document["revision"]},
            {
                "$set": {"secrets": [_sealed(secret, cipher, now), *before][:MAX_ACTIVE_SECRETS], "updated_at": now},
                "$inc": {"revision": 1},
            },
            return_document=ReturnDocument.AFTER,
            session=session,
        )
        if after is not None:
            return WithSecret(_endpoint(after), secret)
    raise RuntimeError(f"expected to rotate the secret, found it rotated {MAX_CONFLICTS} times in between; try again")


def load_for_delivery(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint_id: str,
    *,
    cipher: Cipher,
    now: datetime,
    session: ClientSession | None = None,
) -> ForDelivery:
    """The endpoint and its active secrets in clear. Raises LookupError, and what the cipher raises."""
    document = _found(collection(db).find_one(_selector(tenant, endpoint_id), session=session))
    return ForDelivery(
        _endpoint(document),
        tuple(cipher.decrypt(stored["sealed"]).decode() for stored in document["secrets"] if _is_active(stored, now)),
    )


def selector(endpoint: Endpoint) -> dict[str, Any]:
    """What selects this endpoint's document, for the circuit breaker."""
    return _selector(endpoint.tenant, endpoint.id)


def _selector(tenant: str, endpoint_id: str) -> dict[str, Any]:
    return {"_id": endpoint_id, "tenant": tenant}


def _set(
    db: Database[dict[str, Any]],
    tenant: str,
    endpoint_id: str,
    fields: dict[str, Any],
    session: ClientSession | None,
) -> Endpoint:
    increments = {"revision": 1} | ({"breaker.revision": 1} if "breaker.circuit" in fields else {})
    return _endpoint(
        _found(
            collection(db).find_one_and_update(
                _selector(tenant, endpoint_id),
                {"$set": fields, "$inc": increments},
                return_document=ReturnDocument.AFTER,
                session=session,
            )
        )
    )


def _closed_circuit() -> dict[str, Any]:
    # The revision is kept and counted up, so that a worker that read the old state cannot write it back.
    return {f"breaker.{name}": value for name, value in BreakerState().model_dump(exclude={"revision"}).items()}


def _sealed(secret: str, cipher: Cipher, now: datetime) -> dict[str, Any]:
    return {"sealed": cipher.encrypt(secret.encode()), "created_at": now, "expires_at": None}


def _is_active(stored: dict[str, Any], now: datetime) -> bool:
    return stored["expires_at"] is None or stored["expires_at"] > now


def _endpoint(document: dict[str, Any]) -> Endpoint:
    return Endpoint.model_validate({"id": document["_id"]} | document)


def _found(document: dict[str, Any] | None) -> dict[str, Any]:
    if document is None:
        raise _missing()
    return document


def _missing() -> LookupError:
    return LookupError("expected a webhook endpoint of this tenant, found none")


def _milliseconds(at: datetime) -> datetime:
    """BSON keeps milliseconds: what is returned must equal what is read back."""
    return at.replace(microsecond=at.microsecond // 1000 * 1000)
