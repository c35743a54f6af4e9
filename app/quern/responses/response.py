"""Stored responses: read, list, export, erase."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.audit.entry import entry
from quern.jobs import queue
from quern.jobs.model import ENDED, NewJob, Queue, State
from quern.search import vectors
from quern.store import clock
from quern.store.connection import Db, Document

INDEXES = {
    "responses": [
        IndexModel([("outbox.at", ASCENDING)], sparse=True, name="outbox"),
        IndexModel([("unrelayed.at", ASCENDING)], sparse=True, name="unrelayed"),
        IndexModel(
            [("tenant", ASCENDING), ("form", ASCENDING), ("created", DESCENDING), ("_id", DESCENDING)], name="by_form"
        ),
    ],
}

_STREAM_PAGE = 200

#: What leaves the database for a client; the outbox and the audit key never do.
_SHOWN = {"outbox": 0, "unrelayed": 0, "audit_key": 0, "fingerprint": 0}


@dataclass(frozen=True)
class Filter:
    """Which responses. Times are half-open: from `created_from` on, before `created_before`."""

    form: str | None = None
    status: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    answers: dict[str, str | float | bool] = field(default_factory=dict)
    """Field to the value it must have."""

    def query(self, tenant: str) -> Document:
        query: Document = {"tenant": tenant, "erased": {"$exists": False}}
        if self.form:
            query["form"] = self.form
        if self.status:
            query["status"] = self.status
        created: Document = {}
        if self.created_from:
            created["$gte"] = self.created_from
        if self.created_before:
            created["$lt"] = self.created_before
        if created:
            query["created"] = created
        for name, value in self.answers.items():
            query[f"answers.{name}"] = {"$eq": value}
        return query


def get(db: Db, tenant: str, response: str) -> Document | None:
    """A response, or the mark that one was erased (`erased` is set, `answers` are gone)."""
    return db.responses.find_one({"_id": response, "tenant": tenant}, _SHOWN)


def listing(db: Db, tenant: str, where: Filter, *, after: list[str] | None, limit: int) -> list[Document]:
    """Responses, newest first."""
    query = where.query(tenant)
    if after:
        at = datetime.fromisoformat(after[0])
        query["$or"] = [{"created": {"$lt": at}}, {"created": at, "_id": {"$lt": after[1]}}]
        # The same bound once more where the index can use it.
        query["created"] = {**query.get("created", {}), "$lte": at}
    return list(db.responses.find(query, _SHOWN).sort([("created", -1), ("_id", -1)]).limit(limit))


def stream(db: Db, tenant: str, where: Filter) -> Iterator[Document]:
    """Every response, oldest first, a page at a time: no cursor stays open while a slow client reads."""
    query = where.query(tenant)
    while True:
        rows = list(db.responses.find(query, _SHOWN).sort([("created", 1), ("_id", 1)]).limit(_STREAM_PAGE))
        yield from rows
        if len(rows) < _STREAM_PAGE:
            return
        at, last = rows[-1]["created"], rows[-1]["_id"]
        query["$or"] = [{"created": {"$gt": at}}, {"created": at, "_id": {"$gt": last}}]
        query["created"] = {**query.get("created", {}), "$gte": at}


def erase(
    db: Db,
    tenant: str,
    response: str,
    actor: str,
    request_id: str | None,
    session: ClientSession,
    *,
    keep_days: int = 30,
) -> bool | None:
    """Make a person's answers and everything derived from them vanish. None: no such response; False: erased before.

    What stays is the mark that there was one. Waiting jobs are cancelled; a running one finds nothing to write to. The
    key of its audit entries goes too, so that the chain holds and says nothing of the person. Its jobs, emptied, are
    forgotten after `keep_days`.
    """
    document = db.responses.find_one({"_id": response, "tenant": tenant}, session=session)
    if document is None:
        return None
    if "erased" in document:
        return False
    now = clock.now()
    forget = now + timedelta(days=keep_days)
    kept: Document = {name: document[name] for name in ("_id", "tenant", "form", "version", "created")}
    db.responses.replace_one(
        {"_id": response, "tenant": tenant}, {**kept, "status": "erased", "erased": now}, session=session
    )
    if outbox := document.get("outbox", document.get("unrelayed")):
        submitted = outbox["audit"]
        if db.audit.find_one({"_id": submitted["_id"]}, {"_id": 1}, session=session) is None:
            db.audit.insert_one(submitted, session=session)
        # A relay may hold this outbox in its hand: the jobs that it would make exist from here on, and have ended.
        queue.insert(db, _tombstones(document), session=session)
    # A dead one is no dead letter any more: nobody can replay it.
    ended = {"$in": ["$state", [state.value for state in ENDED if state is not State.DEAD]]}
    # Why a job failed may quote what it worked on.
    log = {"$map": {"input": "$log", "as": "entry", "in": {"$mergeObjects": ["$$entry", {"data": {"$literal": {}}}]}}}
    db.jobs.update_many(
        {"subject": response, "tenant": tenant},
        [
            {"$set": {"log": log}},
            {
                "$set": {
                    "log": {"$cond": [ended, "$log", queue.appended(State.CANCELLED.value, now, {})]},
                    "state": {"$cond": [ended, "$state", State.CANCELLED.value]},
                    "ended": {"$ifNull": ["$ended", now]},
                    "forget": {"$ifNull": ["$forget", forget]},
                    "erased": now,
                    # An operator, since a plain document would be merged into what is there.
                    "payload": {"$mergeObjects": [{"step": "$payload.step"}]},
                }
            },
            {"$unset": ["result", "error", "lease_id", "lease_until", "wake", "cancel"]},
        ],
        session=session,
    )
    db.webhook_deliveries.update_many(
        {"response": response, "tenant": tenant}, {"$set": {"excerpt": ""}}, session=session
    )
    vectors.forget(db, response, session)
    record = entry(tenant, actor, "response.erased", response, request_id=request_id, at=now)
    db.audit.insert_one(record, session=session)
    return True


def _tombstones(document: Document) -> list[NewJob]:
    return [
        NewJob(
            id=NewJob.derived_id(document["tenant"], document["_id"], step),
            tenant=document["tenant"],
            queue=Queue.LOW,
            kind="erased",
            payload={"step": step},
            subject=document["_id"],
            state=State.CANCELLED,
        )
        for step in document["steps"]
    ]


def matching(db: Db, tenant: str, where: Filter, limit: int) -> list[str]:
    """Identifiers of responses that a request for erasure by an answer covers."""
    return [row["_id"] for row in db.responses.find(where.query(tenant), {"_id": 1}).limit(limit)]
