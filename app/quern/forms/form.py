"""Forms: a draft that changes, versions that never do, and a state (draft, open, closed)."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import orjson
from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument
from pymongo.client_session import ClientSession

from quern.store import clock, identifier
from quern.store.connection import Db, Document

INDEXES = {
    "forms": [IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant")],
    "form_versions": [IndexModel([("form", ASCENDING), ("version", DESCENDING)], name="by_form")],
}


class NotPossibleError(Exception):
    """The form's state does not allow what was asked; the text says why and what to do."""


@dataclass(frozen=True)
class Version:
    """One published version of a form: what it asks and what happens with the answers. Never changes."""

    form: str
    tenant: str
    number: int
    name: str
    definition: str
    """JSON of `fields.FormDefinition`."""
    workflow: str
    """JSON of the workflow's definition."""


def create(
    db: Db, tenant: str, name: str, definition: Any, workflow: Any, session: ClientSession | None = None
) -> Document:
    """Make a form with its first draft. `definition` and `workflow` are JSON values that were validated before."""
    now = clock.now()
    document: Document = {
        "_id": identifier.new("frm"),
        "tenant": tenant,
        "name": name,
        "status": "draft",
        "version": None,
        "draft": _dump(definition, workflow),
        "created": now,
        "updated": now,
    }
    db.forms.insert_one(document, session=session)
    return document


def get(db: Db, tenant: str, form: str, session: ClientSession | None = None) -> Document | None:
    return db.forms.find_one({"_id": form, "tenant": tenant}, session=session)


def listing(db: Db, tenant: str, *, after: str | None, limit: int, status: str | None = None) -> list[Document]:
    """A tenant's forms, newest first."""
    query: Document = {"tenant": tenant}
    if status:
        query["status"] = status
    if after:
        query["_id"] = {"$lt": after}
    return list(db.forms.find(query).sort("_id", -1).limit(limit))


def save_draft(
    db: Db,
    tenant: str,
    form: str,
    *,
    name: str | None,
    definition: Any,
    workflow: Any,
    session: ClientSession | None = None,
) -> Document | None:
    """Replace the draft; published versions stay as they are. None: no such form."""
    change: Document = {"draft": _dump(definition, workflow), "updated": clock.now()}
    if name is not None:
        change["name"] = name
    return db.forms.find_one_and_update(
        {"_id": form, "tenant": tenant}, {"$set": change}, return_document=ReturnDocument.AFTER, session=session
    )


def publish(db: Db, tenant: str, form: str, session: ClientSession) -> Document | None:
    """Make the draft the next version and open the form. None: no such form.

    Raises:
        NotPossibleError: there is no draft.
    """
    document = get(db, tenant, form, session)
    if document is None:
        return None
    if document["draft"] is None:
        raise NotPossibleError("the form has no draft to publish; save one first")
    number = (document["version"] or 0) + 1
    now = clock.now()
    db.form_versions.insert_one(
        {
            "_id": f"{form}:{number}",
            "tenant": tenant,
            "form": form,
            "version": number,
            "name": document["name"],
            **document["draft"],
            "published": now,
        },
        session=session,
    )
    return db.forms.find_one_and_update(
        {"_id": form, "tenant": tenant},
        {"$set": {"version": number, "status": "open", "draft": None, "updated": now}},
        return_document=ReturnDocument.AFTER,
        session=session,
    )


def set_status(db: Db, tenant: str, form: str, status: str, session: ClientSession | None = None) -> Document | None:
    """Open or close a published form. None: no such form.

    Raises:
        NotPossibleError: the form was never published.
    """
    document = get(db, tenant, form, session)
    if document is None:
        return None
    if document["version"] is None:
        raise NotPossibleError("the form was never published; publish its draft first")
    return db.forms.find_one_and_update(
        {"_id": form, "tenant": tenant},
        {"$set": {"status": status, "updated": clock.now()}},
        return_document=ReturnDocument.AFTER,
        session=session,
    )


def versions(db: Db, tenant: str, form: str, *, before: int | None, limit: int) -> list[Document]:
    """A form's versions, newest first."""
    query: Document = {"form": form, "tenant": tenant}
    if before is not None:
        query["version"] = {"$lt": before}
    return list(db.form_versions.find(query).sort("version", -1).limit(limit))


class Versions:
    """Published versions by form and number, kept in memory: they never change."""

    def __init__(self) -> None:
        self._load = lru_cache(maxsize=2000)(self._read)
        self._db: Db | None = None

    def get(self, db: Db, tenant: str, form: str, number: int) -> Version | None:
        """The version, or None when there is none of that tenant."""
        self._db = db
        try:
            version = self._load(form, number)
        except KeyError:
            return None
        return version if version.tenant == tenant else None

    def _read(self, form: str, number: int) -> Version:
        if self._db is None:
            raise RuntimeError("a version is read through `get`")
        document = self._db.form_versions.find_one({"_id": f"{form}:{number}"})
        if document is None:
            raise KeyError(form, number)
        return Version(form, document["tenant"], number, document["name"], document["definition"], document["workflow"])


@dataclass(frozen=True)
class Standing:
    """What intake must know of a form."""

    status: str
    version: int | None


class OpenForms:
    """Standings of forms, kept for TTL seconds: so long may closing or publishing take to hold everywhere."""

    TTL: Final = 1.0
    _MOST: Final = 10_000

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[float, Standing]] = {}

    def get(self, db: Db, tenant: str, form: str) -> Standing | None:
        """The standing, or None when the tenant has no such form."""
        kept = self._kept.get((tenant, form))
        if kept and time.monotonic() - kept[0] < self.TTL:
            return kept[1]
        document = db.forms.find_one({"_id": form, "tenant": tenant}, {"status": 1, "version": 1})
        if document is None:
            return None
        if len(self._kept) >= self._MOST:
            self._kept.clear()
        standing = Standing(document["status"], document["version"])
        self._kept[(tenant, form)] = (time.monotonic(), standing)
        return standing

    def drop(self, tenant: str, form: str) -> None:
        """Forget one standing: this process has just changed it."""
        self._kept.pop((tenant, form), None)


def _dump(definition: Any, workflow: Any) -> Document:
    # As text: a JSON Schema has keys that begin with `$`, and what was published must come back to the letter.
    return {"definition": orjson.dumps(definition).decode(), "workflow": orjson.dumps(workflow).decode()}
