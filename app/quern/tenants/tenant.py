"""Tenants: whose forms, responses and keys are whose. Made by the operator's command."""

from pymongo.client_session import ClientSession

from quern.store import clock, identifier
from quern.store.connection import Db, Document


def create(
    db: Db, name: str, *, requests_per_minute: int | None = None, session: ClientSession | None = None
) -> Document:
    """Make a tenant. `requests_per_minute`: of all its keys together; None: the appliance's default; 0: no limit."""
    document: Document = {
        "_id": identifier.new("ten"),
        "name": name,
        "created": clock.now(),
        "requests_per_minute": requests_per_minute,
        "suspended": None,
    }
    db.tenants.insert_one(document, session=session)
    return document


def get(db: Db, tenant: str) -> Document | None:
    return db.tenants.find_one({"_id": tenant})


def listing(db: Db) -> list[Document]:
    return list(db.tenants.find().sort("_id", 1))


def suspend(db: Db, tenant: str, suspended: bool, session: ClientSession | None = None) -> Document | None:
    """Refuse (or accept again) every key of a tenant; returns its document or None."""
    return db.tenants.find_one_and_update(
        {"_id": tenant},
        {"$set": {"suspended": clock.now() if suspended else None}},
        return_document=True,
        session=session,
    )
