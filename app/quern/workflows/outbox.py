"""Outboxes that could not be relayed: set aside so that they hold up no other, and brought back."""

from collections.abc import Sequence

from quern.store.connection import Db, Document

_ASIDE: Document = {"unrelayed.at": {"$exists": True}}


def count_unrelayed(db: Db) -> int:
    """How many responses were acknowledged and have no jobs, because something is wrong with their outbox."""
    return db.responses.count_documents(_ASIDE)


def unrelayed(db: Db, limit: int) -> list[Document]:
    """Those responses, oldest first: `_id`, `tenant`, `form`, `version`, `created`."""
    shown = {"tenant": 1, "form": 1, "version": 1, "created": 1}
    return list(db.responses.find(_ASIDE, shown).sort("unrelayed.at", 1).limit(limit))


def bring_back(db: Db, responses: Sequence[str] | None = None) -> int:
    """Have the relay try again, with these responses or with all; returns how many. The same jobs come of it."""
    which = _ASIDE if responses is None else {"_id": {"$in": list(responses)}, **_ASIDE}
    return db.responses.update_many(which, {"$rename": {"unrelayed": "outbox"}}).modified_count
