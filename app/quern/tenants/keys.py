"""API keys: random, shown once, stored only as a hash, scoped, revocable.

A key is `qrn_<kind>_<id>_<secret>`: the id finds the document, and 256 random bits make the secret, so a plain SHA-256
of it is enough (a slow hash guards guessable passwords; this cannot be guessed).
"""

import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from pymongo import ASCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.store import clock, identifier
from quern.store.connection import Db, Document
from quern.tenants.limit import Limit

Kind = Literal["secret", "publishable"]

#: What a secret key may be allowed, and what each scope opens.
SCOPES: Final[dict[str, str]] = {
    "forms:read": "read forms and their versions",
    "forms:write": "create, change, publish and close forms",
    "responses:submit": "submit responses",
    "responses:read": "read, list and export responses",
    "responses:erase": "erase responses",
    "jobs:read": "follow jobs",
    "jobs:write": "cancel and replay jobs",
    "webhooks:read": "read webhook endpoints and their delivery log",
    "webhooks:write": "create and change webhook endpoints",
    "ai:use": "ask models under /v1: completions, responses, embeddings",
    "ai:read": "read stored AI responses, files and batches",
    "ai:write": "upload files, make and cancel batches, cancel and delete AI responses and files",
    "keys:read": "list API keys",
    "keys:write": "create and revoke API keys",
    "audit:read": "read the audit log",
    "analytics:read": "ask for statistics over all responses",
    "analytics:sql": "run SQL over all rows of the warehouse, answers among them",
}
#: A publishable key stands in a web page for all to read, so it can only submit.
PUBLISHABLE: Final = frozenset({"responses:submit"})

INDEXES = {"keys": [IndexModel([("tenant", ASCENDING), ("_id", ASCENDING)], name="by_tenant")]}

_LAST_USED_EVERY = timedelta(minutes=1)


@dataclass(frozen=True)
class Principal:
    """Who is asking: a tenant by one of its keys."""

    tenant: str
    key: str
    scopes: frozenset[str]
    limits: tuple[Limit, ...]
    """What its requests count against; empty: no limit."""
    own_requests_per_minute: int | None
    """The key's own limit; None: only its tenant's."""
    tenant_requests_per_minute: int
    """0: no limit."""
    expires: datetime | None


class UnknownScopeError(ValueError):
    """A scope that does not exist, or one that this kind of key cannot have."""


def create(
    db: Db,
    tenant: str,
    name: str,
    *,
    kind: Kind = "secret",
    scopes: list[str] | None = None,
    requests_per_minute: int | None = None,
    expires: datetime | None = None,
    session: ClientSession | None = None,
) -> tuple[Document, str]:
    """Make a key; returns its document and the whole key, which nobody can show again.

    Raises:
        UnknownScopeError: for a scope that this kind of key cannot have.
    """
    allowed = PUBLISHABLE if kind == "publishable" else frozenset(SCOPES)
    wanted = sorted(allowed if scopes is None else set(scopes))
    if strangers := sorted(set(wanted) - allowed):
        raise UnknownScopeError(
            f"a {kind} key cannot have {', '.join(strangers)}; it can have {', '.join(sorted(allowed))}"
        )
    identity, secret = identifier.new("key"), secrets.token_urlsafe(32)
    document: Document = {
        "_id": identity,
        "tenant": tenant,
        "name": name,
        "kind": kind,
        "scopes": wanted,
        "hash": _hash(secret),
        "hint": secret[-4:],
        "created": clock.now(),
        "last_used": None,
        "revoked": None,
        "expires": expires,
        "requests_per_minute": requests_per_minute,
    }
    db.keys.insert_one(document, session=session)
    return document, f"qrn_{'pk' if kind == 'publishable' else 'sk'}_{identity.removeprefix('key_')}_{secret}"


def get(db: Db, tenant: str, key: str, session: ClientSession | None = None) -> Document | None:
    return db.keys.find_one({"_id": key, "tenant": tenant}, session=session)


def listing(db: Db, tenant: str, *, after: str | None = None, limit: int = 100) -> list[Document]:
    """A tenant's keys in order of creation."""
    query: Document = {"tenant": tenant}
    if after:
        query["_id"] = {"$gt": after}
    return list(db.keys.find(query).sort("_id", 1).limit(limit))


def revoke(db: Db, tenant: str, key: str, session: ClientSession | None = None) -> Document | None:
    """Refuse a key from now on (within `Authenticator.TTL` in other processes); returns its document or None."""
    return db.keys.find_one_and_update(
        {"_id": key, "tenant": tenant},
        [{"$set": {"revoked": {"$ifNull": ["$revoked", clock.now()]}}}],
        return_document=True,
        session=session,
    )


def token(header: str | None) -> str:
    """The key in an `Authorization: Bearer` header; empty when there is none."""
    scheme, _, found = (header or "").partition(" ")
    return found.strip() if scheme.lower() == "bearer" else ""


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Authenticator:
    """Turns an `Authorization` header into a Principal.

    Keeps a verified key for TTL seconds, so that a busy key costs the database one read in that time; a revoked key is
    therefore refused after TTL seconds at the latest. Refusals are not kept: a new key works at once.
    """

    TTL: Final = 2.0
    _MOST: Final = 10_000

    def __init__(self, default_requests_per_minute: int) -> None:
        self._default = default_requests_per_minute
        self._kept: dict[bytes, tuple[float, Principal]] = {}
        self._lock = threading.Lock()

    def __call__(self, db: Db, header: str | None) -> Principal | None:
        """The principal behind `Bearer qrn_…`, or None when the key is missing, wrong, revoked, expired or orphaned."""
        whole = token(header)
        parts = whole.split("_", 3)
        if len(parts) != 4 or parts[0] != "qrn" or not identifier.is_valid("key_" + parts[2], "key"):
            return None
        fingerprint = hashlib.sha256(whole.encode()).digest()
        kept = self._kept.get(fingerprint)
        if kept and time.monotonic() - kept[0] < self.TTL:
            return kept[1]
        principal = self._look_up(db, "key_" + parts[2], parts[3])
        with self._lock:
            if principal is None:
                self._kept.pop(fingerprint, None)
            else:
                if len(self._kept) >= self._MOST:
                    self._kept.clear()
                self._kept[fingerprint] = (time.monotonic(), principal)
        return principal

    def _look_up(self, db: Db, key: str, secret: str) -> Principal | None:
        now = clock.now()
        document = db.keys.find_one({"_id": key})
        stored = document["hash"] if document else _hash("")
        if not hmac.compare_digest(stored, _hash(secret)) or document is None or document["revoked"]:
            return None
        if document["expires"] and document["expires"] <= now:
            return None
        tenant = db.tenants.find_one({"_id": document["tenant"]}, {"suspended": 1, "requests_per_minute": 1})
        if tenant is None or tenant.get("suspended"):
            return None
        last = document["last_used"]
        if last is None or now - last >= _LAST_USED_EVERY:
            db.keys.update_one({"_id": key}, {"$set": {"last_used": now}})
        own, of_tenant = document["requests_per_minute"], tenant.get("requests_per_minute")
        shared = self._default if of_tenant is None else of_tenant
        return Principal(
            document["tenant"],
            key,
            frozenset(document["scopes"]),
            limits_of(document["tenant"], key, own, shared),
            own,
            shared,
            document["expires"],
        )


def limits_of(tenant: str, key: str, own: int | None, shared: int) -> tuple[Limit, ...]:
    """What a key's requests count against.

    All keys of a tenant share the tenant's limit. A key with a smaller one of its own (`own`) counts against both. One
    with a greater one counts against that alone, and with 0 against nothing: only the operator can give these.
    """
    tenants = (Limit("tenant", tenant, shared),) if shared else ()
    if own is None:
        return tenants
    if own == 0:
        return ()
    mine = Limit("key", key, own)
    return (mine, *tenants) if own <= shared else (mine,)
