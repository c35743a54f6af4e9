"""`/keys`: a tenant's API keys."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from quern.api.operation import Call, Edge, Reply
from quern.api.page import Page, PageQuery, page
from quern.api.problem import Fault, Problem, not_found
from quern.store import clock
from quern.store.connection import Document
from quern.store.moment import Moment
from quern.tenants import keys

edge = Edge("keys")


class KeyIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]
    kind: Literal["secret", "publishable"] = "secret"
    scopes: list[Annotated[str, StringConstraints(max_length=50)]] | None = Field(
        None, max_length=50, description="by default all that this kind of key can have, and never more than your own"
    )
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = Field(
        None, description="a limit of its own below the tenant's, in which it counts as well"
    )
    expires: Moment | None = Field(None, description="by default, and at the latest, when your own key does")


class Key(BaseModel):
    id: str
    name: str
    kind: Literal["secret", "publishable"]
    scopes: list[str]
    hint: str = Field(description="the key's last four characters")
    created: datetime
    last_used: datetime | None
    revoked: datetime | None
    expires: datetime | None
    requests_per_minute: int | None


class NewKey(Key):
    key: str = Field(description="the whole key; it cannot be shown again")


class KeyPage(Page[Key]):
    """Keys, oldest first."""


def _fields(document: Document) -> Document:
    shown = {name: document[name] for name in Key.model_fields if name != "id"}
    return {"id": document["_id"], **shown}


def _within(principal: keys.Principal, body: KeyIn) -> tuple[int | None, datetime | None]:
    """Limit and end of a new key: what was asked for, by default as its maker has them, and never more."""
    if body.expires is not None and body.expires <= clock.now():
        raise Problem(
            422,
            "the request has 1 fault; see `errors`",
            kind="validation",
            errors=[Fault(pointer="/expires", detail="is in the past")],
        )
    if principal.expires is not None and body.expires is not None and body.expires > principal.expires:
        raise Problem(403, f"your own key ends at {clock.rfc3339(principal.expires)}, and so must the keys it makes")
    bounds = [bound for bound in (principal.own_requests_per_minute, principal.tenant_requests_per_minute) if bound]
    if body.requests_per_minute is not None and bounds and body.requests_per_minute > min(bounds):
        raise Problem(403, f"your own key may give at most {min(bounds)} requests a minute")
    # A key that the operator freed from all limits makes ordinary ones.
    limit = body.requests_per_minute or (min(bounds) if principal.own_requests_per_minute else None)
    return limit, body.expires or principal.expires


@edge.operation("POST", "/keys", scope="keys:write", summary="Create an API key", body=KeyIn, answers={201: NewKey})
def create_key(call: Call) -> Reply:
    """A key can give only scopes that it has itself. A publishable key can only submit."""
    body: KeyIn = call.body
    own = call.principal.scopes
    scopes = body.scopes
    if scopes is None:
        scopes = sorted(own & (keys.PUBLISHABLE if body.kind == "publishable" else frozenset(keys.SCOPES)))
    if beyond := sorted(set(scopes) & keys.SCOPES.keys() - own):
        raise Problem(403, f"your own key does not have {', '.join(beyond)}", kind="scope-missing")
    limit, expires = _within(call.principal, body)
    try:
        document, whole = keys.create(
            call.db,
            call.tenant,
            body.name,
            kind=body.kind,
            scopes=scopes,
            requests_per_minute=limit,
            expires=expires,
            session=call.session,
        )
    except keys.UnknownScopeError as error:
        raise Problem(
            422, str(error), kind="validation", errors=[Fault(pointer="/scopes", detail=str(error))]
        ) from None
    call.audit("key.created", document["_id"], {"kind": body.kind, "scopes": document["scopes"]})
    return Reply(NewKey(**_fields(document), key=whole), 201, {"Location": f"/api/v1/keys/{document['_id']}"})


@edge.operation("GET", "/keys", scope="keys:read", summary="List API keys", query=PageQuery, answers={200: KeyPage})
def list_keys(call: Call) -> Reply:
    """Oldest first, revoked ones included."""
    after = call.query.position(1)
    found = keys.listing(call.db, call.tenant, after=after[0] if after else None, limit=call.query.limit + 1)
    items, following = page(found, call.query.limit, lambda item: Key(**_fields(item)), lambda item: [item["_id"]])
    return Reply(KeyPage(items=items, next_cursor=following))


@edge.operation("GET", "/keys/{key}", scope="keys:read", summary="Read an API key", answers={200: Key})
def get_key(call: Call, key: str) -> Reply:
    document = keys.get(call.db, call.tenant, key)
    if document is None:
        raise not_found("key")
    return Reply(Key(**_fields(document)))


@edge.operation("DELETE", "/keys/{key}", scope="keys:write", summary="Revoke an API key", answers={200: Key})
def revoke_key(call: Call, key: str) -> Reply:
    """Refused everywhere within two seconds, for good."""
    document = keys.revoke(call.db, call.tenant, key, call.session)
    if document is None:
        raise not_found("key")
    call.audit("key.revoked", key)
    return Reply(Key(**_fields(document)))
