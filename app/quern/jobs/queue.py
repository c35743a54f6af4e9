"""The durable queue over the `jobs` collection: enqueue, claim, settle, hand back, cancel, replay.

A job is `blocked` until what it depends on has ended, then `queued`, `running` under a lease, and at last `done`,
`dead`, `cancelled` or `skipped`. A claim writes a fresh random `lease_id` (the fence), and every later write of that
worker must match it. A claim need not survive a power cut: the job is then queued again and the fence refuses the old
worker. Every end is journaled by a majority, with all that follows from it, in one transaction.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import bson
import pymongo
from pymongo import ReturnDocument, UpdateMany
from pymongo.client_session import ClientSession
from pymongo.errors import BulkWriteError, PyMongoError

from quern.jobs import turns
from quern.jobs.handler import Followup, Handler, Registry
from quern.jobs.model import COUNTED_BY, ENDED, SKIPPED_KEPT, Job, NewJob, Queue, State
from quern.observe import metrics
from quern.store import clock
from quern.store.connection import EPHEMERAL, Db, Document, Store

#: A queued job whose turn was never opened is found by the reconciler this much later.
GRACE = timedelta(seconds=2)

#: What waits for a document that is locked: see `unless_locked`.
CLAIM_SECONDS = 10.0

#: Entries that a job's log keeps: a job that waits for days tries again thousands of times.
LOG_KEPT = 100

Opened = list[tuple[str, int, str, datetime]]


class LeaseLostError(Exception):
    """Another worker holds the job now, or it was ended: what this worker did must not be written."""


def insert(db: Db, jobs: Sequence[NewJob], session: ClientSession | None = None) -> Opened:
    """Make jobs durable; those that exist already stay as they are.

    Returns what `turns.open_many` must be told afterwards. Inside a transaction the caller does that after the commit;
    jobs then carry `wake`, so that the reconciler finds them if the caller dies in between.
    """
    if not jobs:
        return []
    now = clock.now()
    documents = [job.document(now) for job in jobs]
    if session is not None:
        present = {
            found["_id"]
            for found in db.jobs.find({"_id": {"$in": [job.id for job in jobs]}}, {"_id": 1}, session=session)
        }
        documents = [document for document in documents if document["_id"] not in present]
        for document in documents:
            if document["state"] == State.QUEUED:
                document["wake"] = max(document["due"], now + GRACE)
        if documents:
            db.jobs.insert_many(documents, session=session)
    else:
        # What waits for others goes in first: whoever may claim a job finds those that its end releases.
        waiting = [document for document in documents if document["state"] != State.QUEUED]
        _insert_new(db, waiting)
        _insert_new(db, [document for document in documents if document["state"] == State.QUEUED])
    return [
        (document["queue"], document["priority"], document["tenant"], document["due"])
        for document in documents
        if document["state"] == State.QUEUED
    ]


def _insert_new(db: Db, documents: list[Document]) -> None:
    if not documents:
        return
    try:
        db.jobs.insert_many(documents, ordered=False)
    except BulkWriteError as error:
        if any(item.get("code") != 11000 for item in error.details.get("writeErrors", [])):
            raise


def claim(db: Db, queue: str, lease: float) -> Job | None:
    """Take the next job of a queue for `lease` seconds: by priority, then by turns between tenants, then by age.

    Gives up after CLAIM_SECONDS with a PyMongoError, as on any trouble with the database: the turn has moved on, so the
    next call looks at another tenant.
    """
    with pymongo.timeout(CLAIM_SECONDS):
        return _claim(db, queue, lease)


def _claim(db: Db, queue: str, lease: float) -> Job | None:
    jobs = db.jobs.with_options(write_concern=EPHEMERAL)
    while True:
        now = clock.now()
        turn = turns.take(db, queue, now)
        if turn is None:
            return None
        mine = {"queue": queue, "priority": turn.priority, "tenant": turn.tenant, "state": State.QUEUED.value}
        document = jobs.find_one_and_update(
            {**mine, "due": {"$lte": now}},
            _claimed(now, lease, secrets.token_hex(8)),
            sort=[("due", 1), ("_id", 1)],
            return_document=ReturnDocument.AFTER,
        )
        if document is not None:
            metrics.CLAIMS.labels(queue, document["kind"]).inc()
            metrics.JOB_WAIT_SECONDS.labels(queue).observe(max(0.0, (now - document["due"]).total_seconds()))
            return Job.from_document(document)
        waiting = db.jobs.find_one(mine, {"due": 1}, sort=[("due", 1)])
        turns.close(db, turn, waiting["due"] if waiting else None)


@dataclass(frozen=True)
class Claimed:
    """Jobs that were claimed together."""

    jobs: list[Job]
    more: bool = True
    """False when no other job of the queue was due: whoever enqueues the next one sends a wake-up for it."""


def claim_many(db: Db, queue: str, lease: float, most: int) -> Claimed:
    """Take up to `most` jobs that are to start at once; as `claim`, with fewer trips to the database.

    Only while one turn is open: where tenants or priorities compete, each claim is a turn of its own.
    """
    with pymongo.timeout(CLAIM_SECONDS):
        return _claim_many(db, queue, lease, most)


def _claim_many(db: Db, queue: str, lease: float, most: int) -> Claimed:
    now = clock.now()
    open_turns = turns.due(db, queue, now, most=2)
    if not open_turns:
        return Claimed([], more=False)
    if len(open_turns) > 1:
        job = claim(db, queue, lease)
        return Claimed([job] if job else [], more=job is not None)
    [turn] = open_turns
    mine = {"queue": queue, "priority": turn.priority, "tenant": turn.tenant, "state": State.QUEUED.value}
    # More than are wanted: other workers claim at the same time, and the oldest are everybody's first choice. Those
    # that are not due are read as well: the first of them says until when the turn may be put off.
    found = list(db.jobs.find(mine).sort([("due", 1), ("_id", 1)]).limit(2 * most))
    due = [document for document in found if document["due"] <= now]
    seen_all = len(found) < 2 * most or len(due) < len(found)
    claimed: list[Job] = []
    more = True
    try:
        left = due
        while left and len(claimed) < most:
            chosen, left = left[: most - len(claimed)], left[most - len(claimed) :]
            claimed += _claim_these(db, chosen, now, lease)
        if seen_all and not left:
            # Every job that was due is somebody's now. Whoever enqueued one meanwhile opens the turn anew, and this
            # close, of the turn as it was read before, leaves that as it is.
            more = not turns.close(db, turn, found[len(due)]["due"] if len(due) < len(found) else None)
    except PyMongoError:
        # What was claimed must be run: nobody else may, until its lease runs out.
        if not claimed:
            raise
    for job in claimed:
        metrics.CLAIMS.labels(queue, job.kind).inc()
        metrics.JOB_WAIT_SECONDS.labels(queue).observe(max(0.0, (now - job.due).total_seconds()))
    return Claimed(claimed, more)


def _claim_these(db: Db, documents: list[Document], now: datetime, lease: float) -> list[Job]:
    batch, ids = secrets.token_hex(8), [document["_id"] for document in documents]
    attempts = {document["attempt"] for document in documents}
    # A job that ran and came back in between is not the one that was read. One update of many documents costs the
    # server a third of as many updates of one.
    written = db.jobs.with_options(write_concern=EPHEMERAL).update_many(
        {"_id": {"$in": ids}, "state": State.QUEUED.value, "attempt": {"$in": list(attempts)}},
        _claimed(now, lease, {"$concat": [batch, ".", "$_id"]}),
    )
    if written.matched_count == len(documents) and len(attempts) == 1:
        claimed = {"state": State.RUNNING.value, "attempt": attempts.pop() + 1}
        return [
            Job.from_document({**document, **claimed, "lease_id": f"{batch}.{document['_id']}"})
            for document in documents
        ]
    ours = {"_id": {"$in": ids}, "lease_id": {"$in": [f"{batch}.{job}" for job in ids]}}
    return [Job.from_document(document) for document in db.jobs.find(ours).sort([("due", 1), ("_id", 1)])]


def _claimed(now: datetime, lease: float, lease_id: str | Document) -> list[Document]:
    attempt = {"$add": ["$attempt", 1]}
    return [
        {
            "$set": {
                "state": State.RUNNING.value,
                "lease_id": lease_id,
                "lease_until": now + timedelta(seconds=lease),
                "started": now,
                "attempt": attempt,
                "log": appended(State.RUNNING.value, now, {"attempt": attempt}),
            }
        },
        {"$unset": ["wake"]},
    ]


def appended(kind: str, at: datetime, data: dict[str, Any]) -> Document:
    """The aggregation expression for a job's log with one entry more; of a long log, the newest LOG_KEPT stay."""
    entry = {"seq": {"$add": [{"$ifNull": [{"$max": "$log.seq"}, 0]}, 1]}, "type": kind, "at": at, "data": data}
    return {"$slice": [{"$concatArrays": ["$log", [entry]]}, -LOG_KEPT]}


def extend(db: Db, lease_ids: Sequence[str], lease: float) -> tuple[set[str], set[str]]:
    """Heartbeat: hold the leases for `lease` seconds more. Returns (still held, of those: asked to cancel)."""
    running: Document = {"lease_id": {"$in": list(lease_ids)}, "state": State.RUNNING.value}
    running["lease_until"] = {"$exists": True}
    change = {"$set": {"lease_until": clock.now() + timedelta(seconds=lease)}}
    jobs = db.jobs.with_options(write_concern=EPHEMERAL)
    try:
        with pymongo.timeout(max(1.0, lease / 4)):
            jobs.update_many(running, change)
    except PyMongoError as error:
        if not error.timeout:
            raise
        # One of them is in somebody's transaction: it must not cost the others their leases.
        for lease_id in lease_ids:
            unless_locked(partial(jobs.update_one, {**running, "lease_id": lease_id}, change))
    held, cancelled = set(), set()
    for document in db.jobs.find(running, {"lease_id": 1, "cancel": 1}):
        held.add(document["lease_id"])
        if document.get("cancel"):
            cancelled.add(document["lease_id"])
    return held, cancelled


def unless_locked(write: Callable[[], Any], seconds: float = 1.0) -> Any:
    """The answer of `write`, or None when its document stays locked for `seconds`.

    A process that is killed inside a transaction leaves its documents locked until the server ends the transaction
    (`transactionLifetimeLimitSeconds`, by default 60): who does many jobs one after the other must not wait for it.
    """
    try:
        with pymongo.timeout(seconds):
            return write()
    except PyMongoError as error:
        if not error.timeout:
            raise
        return None


def transact(store: Store, work: Callable[[ClientSession], Any]) -> Any:
    """Run `work` in a transaction, again on a transient conflict (pymongo bounds that at 120 s)."""
    with store.client.start_session() as session:
        return session.with_transaction(work)


def settle(
    store: Store,
    registry: Registry,
    job: Job,
    state: State,
    *,
    result: dict[str, Any] | None = None,
    error: str | None = None,
    fence: Document | None = None,
    session: ClientSession | None = None,
) -> Opened:
    """End a job: its state, its result and all that follows, in one transaction.

    Args:
        fence: what must still hold of the job; by default that this worker's lease does.
        session: the caller's transaction, if it has one; it then opens what is returned after its commit.

    Returns:
        The work that became ready, already opened: the queues to wake.

    Raises:
        LeaseLostError: the fence no longer holds; nothing was written.
    """
    db, now = store.db, clock.now()
    handler = registry.get(job.kind)
    guard = fence if fence is not None else {"state": State.RUNNING.value, "lease_id": job.lease_id}
    update = _ended(store, handler, state, now, result, error)

    def write(session: ClientSession | None) -> tuple[Followup, Opened]:
        if db.jobs.update_one({"_id": job.id, **guard}, update, session=session).matched_count != 1:
            raise LeaseLostError(job.id)
        if handler is None or handler.on_end is None or session is None:
            return Followup(), []
        followup = handler.on_end(db, session, job, state, result, error)
        opened = insert(db, followup.enqueue, session=session)
        opened += _unblock(db, followup.release, session)
        _skip(db, followup.skip, now, session)
        return followup, opened

    if session is not None:
        return write(session)[1]
    needs_transaction = handler is not None and handler.on_end is not None
    _, opened = transact(store, write) if needs_transaction else write(None)
    turns.open_many(db, opened)
    return list(opened)


@dataclass(frozen=True)
class End:
    """How a job ended that nothing follows from: its handler has no `on_end`."""

    job: Job
    state: State
    result: dict[str, Any] | None = None
    error: str | None = None


def settle_many(store: Store, registry: Registry, ends: Sequence[End], now: datetime) -> list[LeaseLostError | None]:
    """End jobs that nothing follows from, at `now`, with one trip and one journal flush; outcomes as of `settle`.

    Call it with the same `now` to try again after a failure that left open whether it was done.
    """
    alike: dict[bytes, list[End]] = {}
    for end in ends:
        keeps = end.result is not None and _keeps_result(registry.get(end.job.kind))
        outcome = bson.encode({"state": end.state.value, "result": end.result if keeps else None, "error": end.error})
        alike.setdefault(outcome, []).append(end)
    updates = []
    for same in alike.values():
        # A lease is of one claim of one job, so a pair of two other jobs cannot match.
        ids, leases = [end.job.id for end in same], [end.job.lease_id for end in same]
        held = {"_id": {"$in": ids}, "state": State.RUNNING.value, "lease_id": {"$in": leases}}
        first = same[0]
        handler = registry.get(first.job.kind)
        updates.append(UpdateMany(held, _ended(store, handler, first.state, now, first.result, first.error)))
    if store.db.jobs.bulk_write(updates, ordered=False).matched_count == len(ends):
        return [None] * len(ends)
    written = {"_id": {"$in": [end.job.id for end in ends]}, "ended": now}
    ours = {found["_id"] for found in store.db.jobs.find(written, {"_id": 1})}
    return [None if end.job.id in ours else LeaseLostError(end.job.id) for end in ends]


def _keeps_result(handler: Handler | None) -> bool:
    return handler is None or handler.keeps_result


def _ended(
    store: Store, handler: Handler | None, state: State, now: datetime, result: dict[str, Any] | None, error: str | None
) -> list[Document]:
    change: Document = {"state": state.value, "ended": now, "error": {"$literal": error}}
    if state in (State.DONE, State.CANCELLED, State.SKIPPED):
        change["forget"] = now + timedelta(days=store.settings.job.keep_ended_days)
    if result is not None and _keeps_result(handler):
        change["result"] = {"$literal": result}
    data = {"error": {"$literal": error}} if error else {}
    return [
        {"$set": {**change, "log": appended(state.value, now, data)}},
        {"$unset": ["lease_id", "lease_until", "wake", "cancel"]},
    ]


def _unblock(db: Db, ids: Sequence[str], session: ClientSession) -> Opened:
    if not ids:
        return []
    now = clock.now()
    # A step skipped because of a dead one comes back when that one is replayed and succeeds.
    blocked = {"_id": {"$in": list(ids)}, "state": {"$in": [State.BLOCKED.value, State.SKIPPED.value]}}
    found = list(db.jobs.find(blocked, {"queue": 1, "priority": 1, "tenant": 1}, session=session))
    db.jobs.update_many(
        blocked,
        [
            {
                "$set": {
                    "state": State.QUEUED.value,
                    "due": now,
                    "wake": now + GRACE,
                    # A replay comes when it comes: the deadline of what was skipped has long passed.
                    "deadline": {"$cond": [{"$eq": ["$state", State.SKIPPED.value]}, "$$REMOVE", "$deadline"]},
                    "log": appended("queued", now, {}),
                }
            },
            {"$unset": ["ended", "forget"]},
        ],
        session=session,
    )
    return [(document["queue"], document["priority"], document["tenant"], now) for document in found]


def _skip(db: Db, ids: Sequence[str], now: datetime, session: ClientSession) -> None:
    if ids:
        db.jobs.update_many(
            {"_id": {"$in": list(ids)}, "state": State.BLOCKED.value},
            [
                {
                    "$set": {
                        "state": State.SKIPPED.value,
                        "ended": now,
                        "forget": now + SKIPPED_KEPT,
                        "log": appended(State.SKIPPED.value, now, {}),
                    }
                }
            ],
            session=session,
        )


def put_back(db: Db, job: Job, *, after: float, reason: str, charged: bool) -> bool:
    """Queue a running job again, `after` seconds from now.

    False when nothing was written: the lease is no longer held, or somebody asked to cancel the job (`cancel_asked`).
    """
    now = clock.now()
    due = now + timedelta(seconds=after)
    written = db.jobs.update_one(
        {"_id": job.id, "state": State.RUNNING.value, "lease_id": job.lease_id, "cancel": {"$exists": False}},
        [
            {
                "$set": {
                    "state": State.QUEUED.value,
                    "due": due,
                    "wake": max(due, now + GRACE),
                    "failures": {"$add": ["$failures", 1 if charged else 0]},
                    "error": {"$literal": reason},
                    "log": appended("retry", now, {"after": after, "reason": {"$literal": reason}}),
                }
            },
            {"$unset": ["lease_id", "lease_until"]},
        ],
    )
    if written.matched_count:
        turns.open_many(db, [(job.queue.value, job.priority, job.tenant, due)])
    return written.matched_count == 1


def cancel_asked(db: Db, job: Job) -> bool:
    """Whether a job that this worker holds was asked to stop."""
    held = {"_id": job.id, "state": State.RUNNING.value, "lease_id": job.lease_id, "cancel": True}
    return db.jobs.find_one(held, {"_id": 1}) is not None


class NotPossibleError(Exception):
    """The job's state does not allow what was asked; the text says which state and what is allowed."""


def get(db: Db, tenant: str, job_id: str, session: ClientSession | None = None) -> Document | None:
    return db.jobs.find_one({"_id": job_id, "tenant": tenant}, session=session)


def listing(
    db: Db, tenant: str | None, *, state: str | None = None, after: str | None = None, limit: int = 100
) -> list[Document]:
    """Jobs, newest identifier first; `tenant=None` lists all tenants' and is for the operator only."""
    query: Document = {}
    if tenant is not None:
        query["tenant"] = tenant
    if state:
        query["state"] = state
    if after:
        query["_id"] = {"$lt": after}
    return list(db.jobs.find(query).sort("_id", -1).limit(limit))


def cancel(
    store: Store, registry: Registry, tenant: str, job_id: str, session: ClientSession | None = None
) -> tuple[Document, Opened] | None:
    """End a waiting job at once; ask the worker of a running one to stop. None: no such job of this tenant.

    Returns the job and the work that its end made ready. Inside the caller's transaction (`session`) the caller opens
    and wakes that after its commit; if it dies in between, the reconciler does.

    Raises:
        NotPossibleError: the job has ended.
    """
    for _ in range(10):
        document = get(store.db, tenant, job_id, session)
        if document is None:
            return None
        state = State(document["state"])
        if state in ENDED:
            raise NotPossibleError(f"the job is {state.value}; only a waiting or running job can be cancelled")
        if state is State.RUNNING:
            asked = {"_id": job_id, "state": State.RUNNING.value}
            after = store.db.jobs.find_one_and_update(
                asked, {"$set": {"cancel": True}}, return_document=ReturnDocument.AFTER, session=session
            )
            if after is not None:
                return after, []
            continue
        job, fence = Job.from_document(document), {"state": state.value}
        try:
            opened = settle(store, registry, job, State.CANCELLED, fence=fence, session=session)
        except LeaseLostError:
            continue
        after = get(store.db, tenant, job_id, session)
        return (after, opened) if after is not None else None
    raise NotPossibleError("the job keeps changing its state; try again")


def replay(store: Store, tenant: str | None, job_id: str, session: ClientSession | None = None) -> Document | None:
    """Queue a dead job again with a clean record of failures. None: no such job.

    Inside the caller's transaction (`session`) the caller opens the job's turn after its commit (`opening`); if it
    dies in between, the reconciler does.

    Raises:
        NotPossibleError: the job is not dead, or what it worked on was erased.
    """
    owner = {} if tenant is None else {"tenant": tenant}
    now = clock.now()
    document = store.db.jobs.find_one_and_update(
        {"_id": job_id, "state": State.DEAD.value, "erased": {"$exists": False}, **owner},
        [
            {
                "$set": {
                    "state": State.QUEUED.value,
                    "due": now,
                    "wake": now + GRACE,
                    "failures": 0,
                    "lost": 0,
                    "log": appended("replayed", now, {}),
                }
            },
            {"$unset": ["ended", "error", "deadline"]},
        ],
        return_document=ReturnDocument.AFTER,
        session=session,
    )
    if document is None:
        found = store.db.jobs.find_one({"_id": job_id, **owner}, {"state": 1, "erased": 1}, session=session)
        if found is None:
            return None
        if "erased" in found:
            raise NotPossibleError("what the job worked on was erased; there is nothing left to run it on")
        raise NotPossibleError(f"the job is {found['state']}; only a dead job can be replayed")
    if session is None:
        turns.open_many(store.db, opening(document))
    return document


def opening(document: Document) -> Opened:
    """What `turns.open_many` must be told of a queued job."""
    return [(document["queue"], document["priority"], document["tenant"], document["due"])]


def depth(db: Db) -> dict[str, dict[str, int]]:
    """Jobs by queue and by state, of those that have not ended, and the dead."""
    counts: dict[str, dict[str, int]] = {queue.value: {} for queue in Queue}
    for state, index in COUNTED_BY.items():
        # One partial index for each state: the ended jobs of a month, most of the collection, are not looked at.
        pipeline: list[Document] = [{"$match": {"state": state.value}}, {"$group": {"_id": "$queue", "n": {"$sum": 1}}}]
        for row in db.jobs.aggregate(pipeline, hint=index):
            counts.setdefault(row["_id"], {})[state.value] = row["n"]
    return counts
