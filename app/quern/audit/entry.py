"""Audit entries: who changed what, when. Written with what they record, chained afterwards by the sealer.

An entry never holds a person's words. Where it must vouch for them it holds an HMAC-SHA-256 of them under a key of
the subject's own; the key is destroyed on erasure, after which the entry still stands in the chain and says nothing.
"""

import hashlib
import hmac
import secrets
from datetime import datetime
from typing import Any

import orjson
from pymongo import ASCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.store import clock, identifier
from quern.store.connection import Db, Document

INDEXES = {
    "audit": [
        IndexModel(
            [("seq", ASCENDING)], unique=True, partialFilterExpression={"seq": {"$exists": True}}, name="sealed"
        ),
        IndexModel([("pending", ASCENDING), ("_id", ASCENDING)], sparse=True, name="unsealed"),
        IndexModel([("tenant", ASCENDING), ("at", ASCENDING), ("_id", ASCENDING)], name="by_tenant"),
        IndexModel([("subject", ASCENDING), ("action", ASCENDING)], name="by_subject"),
    ],
}


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value: keys sorted, times as RFC 3339, no spaces."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z, default=str)


def content_key() -> bytes:
    """A fresh key for one subject's content."""
    return secrets.token_bytes(32)


def content_mac(key: bytes, content: Any) -> str:
    """HMAC-SHA-256 (hex) of the canonical form of `content`."""
    return hmac.new(key, canonical(content), hashlib.sha256).hexdigest()


def entry(
    tenant: str,
    actor: str,
    action: str,
    subject: str,
    *,
    detail: dict[str, Any] | None = None,
    mac: str | None = None,
    request_id: str | None = None,
    at: datetime | None = None,
    cause: tuple[str, ...] = (),
) -> Document:
    """An entry to be written with the change that it records.

    Args:
        actor: the key's or the process's name. action: `form.created`, past tense. subject: an identifier.
        detail: facts without personal data. mac: vouches for the content, see the module.
        cause: makes the entry's identifier derived, so that relaying it twice makes one entry.
    """
    identity = identifier.derived("aud", tenant, action, subject, *cause) if cause else identifier.new("aud")
    document: Document = {
        "_id": identity,
        "tenant": tenant,
        "at": at or clock.now(),
        "actor": actor,
        "action": action,
        "subject": subject,
        "pending": True,
    }
    if detail:
        document["detail"] = detail
    if mac:
        document["mac"] = mac
    if request_id:
        document["request_id"] = request_id
    return document


def record(db: Db, document: Document, session: ClientSession | None = None) -> None:
    """Write one entry; inside the change's transaction where there is one."""
    db.audit.insert_one(document, session=session)


def listing(db: Db, tenant: str, *, after: list[str] | None, limit: int, subject: str | None = None) -> list[Document]:
    """A tenant's entries, newest first."""
    query: Document = {"tenant": tenant}
    if subject:
        query["subject"] = subject
    if after:
        at = datetime.fromisoformat(after[0])
        query["$or"] = [{"at": {"$lt": at}}, {"at": at, "_id": {"$lt": after[1]}}]
    return list(db.audit.find(query).sort([("at", -1), ("_id", -1)]).limit(limit))
