"""`/keys`: a tenant's API keys."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from quern.api.operation import Call, Edge, Reply
from quern.api.page import Page, PageQuery, page
from quern.api.problem import Fault, Problem, not_found
from quern.store.connection import Document
from quern.tenants import keys

edge = Edge("keys")


class KeyIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]
    kind: Literal["secret", "publishable"] = "secret"
    scopes: list[Annotated[str, StringConstraints(max_length=50)]] | None = Field(
        None, max_length=50, description="by default all that this kind of key can have, and never more than your own"
    )
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = None
    expires: AwareDatetime | None = None


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
    limit = body.requests_per_minute
    if limit is not None and call.principal.requests_per_minute and limit > call.principal.requests_per_minute:
        raise Problem(403, f"your own key may make {call.principal.requests_per_minute} requests a minute, not more")
    if limit is None and call.principal.requests_per_minute != call.runtime.settings.requests_per_minute:
        limit = call.principal.requests_per_minute or None
    try:
        document, whole = keys.create(
            call.db,
            call.tenant,
            body.name,
            kind=body.kind,
            scopes=scopes,
            requests_per_minute=limit,
            expires=body.expires,
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
