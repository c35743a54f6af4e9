"""What has changed since: MongoDB's change stream, read from a stored token up to now.

A change is taken down as the tenant's day that it belongs to; that day is rewritten. So the same event twice, or in
another order, changes nothing: exactly once in effect. The token is stored in one write with the days it led to.

The oplog is finite. When the token is older than what is left of it the changes in between are not known, and the
caller must rewrite a range instead (`since_then`).
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, Final

from bson.timestamp import Timestamp
from pymongo.change_stream import ChangeStream, DatabaseChangeStream
from pymongo.errors import AutoReconnect, NetworkTimeout, OperationFailure
from pymongo.read_concern import ReadConcern

from quern.analytics import source
from quern.analytics.manifest import Manifest, day_of
from quern.analytics.partition import batches_of
from quern.jobs.model import ENDED
from quern.store.connection import Db, Document
from quern.webhooks import RESEND_KIND

_log = logging.getLogger(__name__)

Token = dict[str, Any]
#: ChangeStreamHistoryLost, ChangeStreamFatalError, InvalidResumeToken, CappedPositionLost.
_LOST: Final = frozenset({286, 280, 260, 136})
_DATED: Final = {"responses": "created", "audit": "at"}
_DIMENSIONS: Final = ("forms", "form_versions", "keys", "tenants")
_GONE: Final = ("drop", "rename", "dropDatabase", "invalidate")
#: Of jobs, which change most often, only what no change of a response or of an audit entry tells: one that works on no
#: response, or sends a message again, is made; one that had ended is replayed. That such a job ends is not watched
#: either: the next run looks (`Partition.unsettled`).
_JOBS: Final[list[Document]] = [
    {
        "operationType": "insert",
        "ns.coll": "jobs",
        "fullDocument.tenant": {"$regex": f"^{source.TENANT_PREFIX}"},
        "$or": [{"fullDocument.subject": {"$not": {"$regex": "^rsp_"}}}, {"fullDocument.kind": RESEND_KIND}],
    },
    {"operationType": "update", "ns.coll": "jobs", "updateDescription.removedFields": "ended"},
    # The server writes down the whole of a small document where that is shorter than what changed of it.
    {"operationType": "replace", "ns.coll": "jobs", "fullDocument.log.type": "replayed"},
]
_PIPELINE: Final[list[Document]] = [
    {
        "$match": {
            "$or": [
                {"operationType": {"$in": list(_GONE)}},
                {
                    "operationType": {"$in": ["insert", "update", "replace", "delete"]},
                    "ns.coll": {"$in": [*_DATED, *_DIMENSIONS]},
                },
                *_JOBS,
            ]
        }
    },
    {
        "$project": {
            "operationType": 1,
            "clusterTime": 1,
            "ns": 1,
            "documentKey": 1,
            **{f"fullDocument.{name}": 1 for name in ("tenant", "created", "at", "subject")},
        }
    },
]
_OF_JOB: Final = ("job", "day", "state")
#: Updated documents whose day is looked up at once.
_LOOKUP: Final = 1000
#: No longer than this for the server to reach the present moment of a stream.
_PATIENCE: Final = 600.0
#: Milliseconds that the server waits for an event before it says that there is none.
_AWAIT: Final = 20


class TokenLostError(Exception):
    """The change stream cannot go on from the token: it is older than the oplog, or of another database."""


@dataclass
class Changes:
    """What happened between two tokens."""

    token: Token
    days: set[tuple[str, date]] = field(default_factory=set)
    """Tenants' days to rewrite."""
    tenants: set[str] = field(default_factory=set)
    """Tenants whose forms or keys changed."""
    deleted: dict[str, set[str]] = field(default_factory=dict)
    """Identifiers by collection that are gone, whose day only the warehouse knows."""
    everything: bool = False
    """A collection was dropped or renamed: nothing is known."""
    events: int = 0


def head(db: Db) -> Token:
    """The present moment of the change stream: no change that was durable before comes after it."""
    return _at(db, _committed(db))


def _committed(db: Db) -> Timestamp:
    """The last moment that a majority has.

    Raises:
        TokenLostError: there is no replica set.
        AutoReconnect: its member is only starting.
    """
    hello = db.client.admin.command("hello")
    try:
        committed: Timestamp = hello["lastWrite"]["majorityOpTime"]["ts"]
    except KeyError:
        if hello.get("isWritablePrimary") and "setName" not in hello:
            raise TokenLostError("expected a member of a replica set, found none; change streams need one") from None
        raise AutoReconnect("expected a member of a replica set, found one that is starting") from None
    return committed


def _at(db: Db, moment: Timestamp) -> Token:
    """Where the stream stands after all changes of a moment that a majority has; or a little later, which does no harm:
    what the stream shows is in every later snapshot."""
    with _watch(db, start_at_operation_time=moment) as stream:
        while True:
            event = stream.try_next()
            if event is None or event["clusterTime"] > moment:
                return _token(stream)


def drain(db: Db, token: Token, pause: Callable[[], None] = lambda: None) -> Changes:
    """Everything that changed after `token`, until now.

    Raises:
        TokenLostError: the server does not go back that far.
        PyMongoError: MongoDB is away, or did not reach the present in time; try again.
    """
    committed = _committed(db)
    changes, updated = Changes(token), {name: set[str]() for name in (*_DATED, "jobs")}

    def take(event: Document) -> None:
        pause()
        changes.events += 1
        _take(db, event, changes, updated)

    try:
        with _watch(db, resume_after=token) as stream:
            changes.token = _reach(stream, committed, _at(db, committed), take)
    except OperationFailure as error:
        if error.code in _LOST or error.has_error_label("NonResumableChangeStreamError"):
            raise TokenLostError(f"the change stream cannot be resumed ({error.code})") from None
        raise
    _look_up_jobs(db, updated, changes)
    for collection in _DATED:
        _look_up(db, collection, updated, changes)
    return changes


def _watch(db: Db, **start: Any) -> DatabaseChangeStream[Document]:
    # No other read concern is accepted, and the client's own is another.
    settled = db.with_options(read_concern=ReadConcern("majority"))
    return settled.watch(_PIPELINE, max_await_time_ms=_AWAIT, batch_size=1000, **start)


def _reach(
    stream: ChangeStream[Document], committed: Timestamp, target: Token, take: Callable[[Document], None]
) -> Token:
    """Read until the stream has passed the moment `committed`, whose token is `target`; returns where it stands.

    An idle server's stream never goes beyond its last write, so an empty answer at `target` is the end. Tokens sort by
    their `_data`, as the server's documentation says.
    """
    limit = time.monotonic() + _PATIENCE
    while True:
        event = stream.try_next()
        if event is not None:
            take(dict(event))
            if event["operationType"] == "invalidate":
                return target
        reached = _token(stream)
        passed = event["clusterTime"] > committed if event is not None else reached["_data"] >= target["_data"]
        if passed:
            return reached
        if time.monotonic() > limit:
            # As all that is cured by waiting (`is_away`).
            raise NetworkTimeout("expected the change stream to reach the present, found it behind; run it again")


def _token(stream: ChangeStream[Document]) -> Token:
    token = stream.resume_token
    if token is None:
        raise TokenLostError("the change stream gives no token; expected MongoDB 6.0 or later")
    return dict(token)


def _take(db: Db, event: Document, changes: Changes, updated: dict[str, set[str]]) -> None:
    kind = event["operationType"]
    if kind in _GONE:
        changes.everything = True
        return
    collection, identity = event["ns"]["coll"], event["documentKey"]["_id"]
    document = event.get("fullDocument") or {}
    if collection in _DIMENSIONS:
        tenant = document.get("tenant")
        if tenant is None and kind != "delete":
            tenant = _tenant_of(db, collection, identity)
        if tenant is not None:
            changes.tenants.add(tenant)
    elif collection == "jobs":
        if kind == "insert":
            _take_job(document, changes, updated)
        else:
            updated[collection].add(identity)
            if len(updated[collection]) >= _LOOKUP:
                _look_up_jobs(db, updated, changes)
        if len(updated["responses"]) >= _LOOKUP:
            _look_up(db, "responses", updated, changes)
    elif kind == "delete":
        changes.deleted.setdefault(collection, set()).add(identity)
    elif document.get(_DATED[collection]) is not None:
        changes.days.add((document["tenant"], day_of(document[_DATED[collection]])))
    else:
        updated[collection].add(identity)
        if len(updated[collection]) >= _LOOKUP:
            _look_up(db, collection, updated, changes)


def _tenant_of(db: Db, collection: str, identity: str) -> str | None:
    if collection == "tenants":
        return identity
    found = db[collection].find_one({"_id": identity}, {"tenant": 1})
    return found["tenant"] if found else None


def _take_job(document: Document, changes: Changes, updated: dict[str, set[str]]) -> None:
    """A job is its response's day's, or that on which it was made."""
    subject = document.get("subject") or ""
    if subject.startswith("rsp_"):
        updated["responses"].add(subject)
    elif document["tenant"].startswith(source.TENANT_PREFIX):
        changes.days.add((document["tenant"], day_of(document["created"])))


def _look_up_jobs(db: Db, updated: dict[str, set[str]], changes: Changes) -> None:
    ids = updated["jobs"]
    if ids:
        for row in db.jobs.find({"_id": {"$in": sorted(ids)}}, {"tenant": 1, "subject": 1, "created": 1}):
            _take_job(row, changes, updated)
        ids.clear()


def _look_up(db: Db, collection: str, updated: dict[str, set[str]], changes: Changes) -> None:
    moment, ids = _DATED[collection], updated[collection]
    if not ids:
        return
    for row in db[collection].find({"_id": {"$in": sorted(ids)}}, {"tenant": 1, moment: 1}):
        changes.days.add((row["tenant"], day_of(row[moment])))
    # Those that are not there any more have an event of their own.
    ids.clear()


def settled(db: Db, manifest: Manifest) -> set[tuple[str, date]]:
    """The days with a job that had not ended when they were written, and has now. Only files that may have one are
    read (`Partition.unsettled`)."""
    found: set[tuple[str, date]] = set()
    for tenant, partitions in manifest.tables.get("fact_job", {}).items():
        for partition in partitions:
            if partition.unsettled:
                for rows in batches_of(manifest.root / partition.path, list(_OF_JOB)):
                    days = {
                        job: day
                        for job, day, state in zip(*(rows.column(name).to_pylist() for name in _OF_JOB), strict=True)
                        if state not in ENDED
                    }
                    found |= {(tenant, days[job]) for job in _ended(db, list(days))}
    return found


def _ended(db: Db, jobs: list[str]) -> Iterator[str]:
    for first in range(0, len(jobs), _LOOKUP):
        query = {"_id": {"$in": jobs[first : first + _LOOKUP]}, "state": {"$in": sorted(ENDED)}}
        yield from (row["_id"] for row in db.jobs.find(query, {"_id": 1}))


def since_then(db: Db, tenants: list[str], seen: datetime, days_before: int) -> set[tuple[str, date]]:
    """Without the stream: the days to rewrite after the moment `seen`.

    All days since `days_before` before it; and, however old, those of responses whose end or erasure the audit log has
    recorded since, and those of jobs that were replayed or made to send a message again. Every change of a response
    that matters ends in such an entry.
    """
    first = day_of(seen) - timedelta(days=days_before)
    found: set[tuple[str, date]] = set()
    for tenant in tenants:
        found |= {(tenant, day) for day in source.days(db, tenant, since=first)}
        subjects, jobs = set[str](), set[str]()
        late = {"tenant": tenant, "at": {"$gte": seen - timedelta(days=days_before)}}
        for row in db.audit.find(late, {"subject": 1, "detail.job": 1}):
            named = str((row.get("detail") or {}).get("job") or row["subject"])
            if named.startswith("rsp_"):
                subjects.add(named)
            elif named.startswith("job_"):
                jobs.add(named)
            if len(subjects) >= _LOOKUP:
                found |= _days_of(db, subjects)
            if len(jobs) >= _LOOKUP:
                found |= _days_of_jobs(db, jobs)
        found |= _days_of(db, subjects) | _days_of_jobs(db, jobs)
    return found


def _days_of_jobs(db: Db, jobs: set[str]) -> set[tuple[str, date]]:
    changes, updated = Changes({}), {"responses": set[str](), "jobs": jobs}
    _look_up_jobs(db, updated, changes)
    return changes.days | _days_of(db, updated["responses"])


def _days_of(db: Db, subjects: set[str]) -> set[tuple[str, date]]:
    rows = db.responses.find({"_id": {"$in": sorted(subjects)}}, {"tenant": 1, "created": 1})
    found = {(row["tenant"], day_of(row["created"])) for row in rows}
    subjects.clear()
    return found
