"""The reconciler: mends what a crash left. Idempotent, so any number may run, anywhere."""

import logging
from datetime import datetime, timedelta
from functools import partial

from pymongo.errors import PyMongoError

from quern.jobs import queue, turns
from quern.jobs.handler import Registry
from quern.jobs.model import CONCURRENCY, Job, Queue, State
from quern.jobs.wake import Waker
from quern.observe import metrics
from quern.store import clock
from quern.store.connection import Db, Document, Store

_log = logging.getLogger(__name__)
_BATCH = 500
_PUT_OFF = timedelta(minutes=1)


def rescue(store: Store, registry: Registry) -> int:
    """Take jobs back from workers whose lease ran out; bury those that ended too many workers. Returns how many."""
    db, settings, now = store.db, store.settings.job, clock.now()
    rescued = 0
    expired = {"state": State.RUNNING.value, "lease_until": {"$lt": now}}
    for document in db.jobs.find(expired).limit(_BATCH):
        fence = {"lease_id": document["lease_id"], **expired}
        metrics.RESCUED.labels(document["queue"]).inc()
        if document.get("cancel"):
            _end(store, registry, document, State.CANCELLED, None, fence, "lease_until")
            continue
        if document["lost"] + 1 >= settings.max_lost_leases:
            error = f"its worker vanished {settings.max_lost_leases} times; replay it once the cause is mended"
            _end(store, registry, document, State.DEAD, error, fence, "lease_until")
            continue
        if queue.unless_locked(partial(_take_back, db, document["_id"], fence, now)):
            rescued += 1
            turns.open_many(db, [(document["queue"], document["priority"], document["tenant"], now)])
            _log.info("took a job back from a silent worker", extra={"job": document["_id"], "kind": document["kind"]})
    return rescued


def _take_back(db: Db, job: str, fence: Document, now: datetime) -> bool:
    written = db.jobs.update_one(
        {"_id": job, **fence, "cancel": {"$exists": False}},
        [
            {
                "$set": {
                    "state": State.QUEUED.value,
                    "due": now,
                    "wake": now + queue.GRACE,
                    "lost": {"$add": ["$lost", 1]},
                    "log": queue.appended("rescued", now, {}),
                }
            },
            {"$unset": ["lease_id", "lease_until"]},
        ],
    )
    return written.matched_count == 1


def _end(
    store: Store,
    registry: Registry,
    document: Document,
    state: State,
    error: str | None,
    fence: Document,
    timer: str,
) -> bool:
    """End a job that no worker holds; whether this did it.

    One that cannot be ended must not keep the others from rescue: `timer`, the time by which it was found, is put
    off, and the log says what is wrong with it.
    """
    settle = partial(queue.settle, store, registry, Job.from_document(document), state, error=error, fence=fence)
    try:
        return queue.unless_locked(settle, seconds=5.0) is not None
    except queue.LeaseLostError:
        return False
    except PyMongoError:
        raise
    except Exception:
        _log.exception("could not end a job", extra={"job": document["_id"], "kind": document["kind"]})
        later = {"$set": {timer: clock.now() + _PUT_OFF}}
        store.db.jobs.update_one({"_id": document["_id"], **fence}, later)
        return False


def reopen(store: Store) -> int:
    """Open turns for jobs whose `wake` has passed: whoever queued them died before it could. Returns how many."""
    db, now = store.db, clock.now()
    found = list(
        db.jobs.find({"wake": {"$lte": now}}, {"queue": 1, "priority": 1, "tenant": 1, "due": 1, "wake": 1, "state": 1})
        .sort("wake", 1)
        .limit(_BATCH)
    )
    waiting = [document for document in found if document["state"] == State.QUEUED.value]
    turns.open_many(db, [(job["queue"], job["priority"], job["tenant"], job["due"]) for job in waiting])
    if found:
        # Journaled after the turns, so a turn is never lost while its job's `wake` is gone.
        db.jobs.update_many(
            {"_id": {"$in": [job["_id"] for job in found]}, "wake": {"$lte": now}}, {"$unset": {"wake": ""}}
        )
    return len(waiting)


def restore_turns(store: Store) -> int:
    """Open the turns that queued jobs lack. Returns how many.

    Turns are written unjournaled. When mongod is killed it forgets the newest of them, while the driver repeats on the
    next mongod what came after: a job may then be queued without a turn, or behind one that was put off or closed.
    """
    db = store.db
    first = db.jobs.aggregate(
        [
            {"$match": {"state": State.QUEUED.value}},
            {"$sort": {"queue": 1, "priority": 1, "tenant": 1, "due": 1}},
            {
                "$group": {
                    "_id": {"queue": "$queue", "priority": "$priority", "tenant": "$tenant"},
                    "due": {"$first": "$due"},
                }
            },
        ],
        hint="claim",
    )
    wanted = [(row["_id"]["queue"], row["_id"]["priority"], row["_id"]["tenant"], row["due"]) for row in first]
    ready = turns.ready(db)
    # One that was closed since the jobs were read is opened for nothing, and closed again by the next claim.
    lost = [work for work in wanted if (at := ready.get(work[:3])) is None or at > work[3]]
    turns.open_many(db, lost)
    return len(lost)


def wake_ready(store: Store, waker: Waker) -> None:
    """Send wake-ups for every queue in which a turn is due: a retry, or what a wiped Redis forgot."""
    for name in turns.ready_queues(store.db, clock.now()):
        waker.wake(name, CONCURRENCY[Queue(name)])


def expire(store: Store, registry: Registry) -> int:
    """End queued jobs whose deadline has passed. Returns how many."""
    db, now, ended = store.db, clock.now(), 0
    overdue = {"state": {"$in": [State.QUEUED.value, State.BLOCKED.value]}, "deadline": {"$lt": now}}
    for document in db.jobs.find(overdue).hint("overdue").limit(_BATCH):
        fence = {"state": document["state"], "deadline": document["deadline"]}
        ended += _end(store, registry, document, State.DEAD, "its deadline passed while it waited", fence, "deadline")
    return ended


def mend(store: Store, registry: Registry) -> None:
    """One pass over what crashes and deadlines leave. What is due now is `wake_ready`'s, more often."""
    rescue(store, registry)
    reopen(store)
    expire(store, registry)


def observe(store: Store) -> None:
    """Refresh the gauges of the queues."""
    db, now = store.db, clock.now()
    counts = queue.depth(db)
    for name in Queue:
        for state in (State.BLOCKED, State.QUEUED, State.RUNNING, State.DEAD):
            metrics.QUEUE_DEPTH.labels(name.value, state.value).set(counts[name.value].get(state.value, 0))
        oldest = now
        for turn in db.turns.find({"queue": name.value, "ready": {"$lte": now}}).limit(100):
            mine = {
                "queue": name.value,
                "priority": turn["priority"],
                "tenant": turn["tenant"],
                "state": State.QUEUED.value,
            }
            first = db.jobs.find_one(mine, {"due": 1}, sort=[("due", 1)])
            oldest = min(oldest, first["due"]) if first else oldest
        metrics.QUEUE_AGE.labels(name.value).set(max(timedelta(0), now - oldest).total_seconds())
