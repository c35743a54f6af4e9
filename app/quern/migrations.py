"""Brings a database to what this version needs: its indexes. Safe to run at any time, and by several at once."""

from quern.api import idempotency
from quern.audit import entry
from quern.forms import form
from quern.jobs import model
from quern.openai import batches, files, ledger
from quern.responses import response
from quern.search import vectors
from quern.store.connection import Db
from quern.tenants import keys
from quern.webhooks.indexes import INDEXES as WEBHOOKS

_ALL = (
    idempotency.INDEXES,
    entry.INDEXES,
    form.INDEXES,
    model.INDEXES,
    response.INDEXES,
    keys.INDEXES,
    WEBHOOKS,
    ledger.INDEXES,
    files.INDEXES,
    batches.INDEXES,
    vectors.INDEXES,
)


def migrate(db: Db) -> list[str]:
    """Create every index that is missing; returns `collection.index` of all that must be there."""
    made = []
    for indexes in _ALL:
        for collection, models in indexes.items():
            made += [f"{collection}.{name}" for name in db[collection].create_indexes(list(models))]
    # A collection cannot be made by the first of two transactions at once that write to it.
    present = set(db.list_collection_names())
    for name in ("tenants", "durations", "schedule", "leads"):
        if name not in present:
            db.create_collection(name, check_exists=False)
    return made


def missing(db: Db) -> list[str]:
    """`collection.index` of every index that `migrate` would create."""
    absent = []
    for indexes in _ALL:
        for collection, models in indexes.items():
            present = set(db[collection].index_information())
            absent += [
                f"{collection}.{item.document['name']}" for item in models if item.document["name"] not in present
            ]
    return absent
