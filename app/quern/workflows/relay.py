"""The relay: turns the outbox that a response carries into jobs and an audit entry, and wakes the queues.

Idempotent: what it makes has derived identifiers, so a relay that dies anywhere is simply run again.
"""

import logging
import threading
from functools import partial

import pymongo
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError, PyMongoError
from redis.exceptions import RedisError

from quern.forms.form import Versions
from quern.jobs import queue, turns
from quern.jobs.model import NewJob
from quern.jobs.wake import RELAY, Waker, make_huey
from quern.observe import metrics
from quern.store import clock
from quern.store.connection import EPHEMERAL, Db, Document, Store
from quern.workflows import outbox, run
from quern.workflows.definition import parsed

_log = logging.getLogger(__name__)
_BATCH = 200
_CLEAR_SECONDS = 5.0
#: Seconds between two batches that are not full.
_BREATH = 0.02


def drain(store: Store, versions: Versions, waker: Waker) -> int:
    """Relay one batch of outboxes, oldest first; returns how many."""
    db = store.db
    found = list(db.responses.find({"outbox.at": {"$exists": True}}).sort("outbox.at", 1).limit(_BATCH))
    if not found:
        metrics.OUTBOX_LAG.set(0)
        return 0
    metrics.OUTBOX_LAG.set((clock.now() - found[0]["outbox"]["at"]).total_seconds())
    jobs: list[NewJob] = []
    done: list[UpdateOne] = []
    for response in found:
        this = {"_id": response["_id"], "outbox.at": response["outbox"]["at"]}
        try:
            jobs += _jobs(store, versions, response)
        except PyMongoError:
            raise
        except Exception:
            # Kept as it is, but out of the way of all the others.
            _log.exception("an outbox cannot be relayed; it is set aside", extra={"response": response["_id"]})
            done.append(UpdateOne(this, {"$rename": {"outbox": "unrelayed"}}))
        else:
            done.append(UpdateOne(this, {"$unset": {"outbox": ""}}))
    # In the journal before the outbox goes: an update that the driver repeats on a mongod that was killed and started
    # again outlives inserts that only its memory had. The clearing need not wait: what comes back is relayed again.
    opened = queue.insert(db, jobs)
    _record(db, [response["outbox"]["audit"] for response in found])
    turns.open_many(db, opened)
    _clear(db.with_options(write_concern=EPHEMERAL), done)
    metrics.FANNED_OUT.inc(len(found))
    waker.wake_all(opened)
    return len(found)


def _clear(db: Db, done: list[UpdateOne]) -> None:
    try:
        with pymongo.timeout(_CLEAR_SECONDS):
            db.responses.bulk_write(done, ordered=False)
    except PyMongoError as error:
        if not error.timeout:
            raise
        # One of them is in somebody's transaction; it comes again with the next batch, and holds up no other.
        for one in done:
            queue.unless_locked(partial(db.responses.bulk_write, [one]))


def _jobs(store: Store, versions: Versions, response: Document) -> list[NewJob]:
    version = versions.get(store.db, response["tenant"], response["form"], response["version"])
    if version is None:
        raise LookupError("the version of the form that the response was filled in for is missing")
    return run.jobs(parsed(version.workflow), response)


def _record(db: Db, entries: list[Document]) -> None:
    try:
        db.audit.insert_many(entries, ordered=False)
    except BulkWriteError as error:
        if any(item.get("code") != 11000 for item in error.details.get("writeErrors", [])):
            raise


def _bring_back(store: Store) -> None:
    # What this version of the relay may know how to do; else it is set aside again.
    try:
        if brought := outbox.bring_back(store.db):
            _log.info("outboxes that were set aside are tried again", extra={"count": brought})
    except PyMongoError as error:
        _log.warning("the outboxes that were set aside stay there", extra={"error": type(error).__name__})


def main(store: Store, waker: Waker, stop: threading.Event) -> None:
    """Relay until `stop`: at once on a wake-up, else every half second."""
    _bring_back(store)
    versions = Versions()
    huey = make_huey(RELAY, store.redis_queue_url, timeout=3.0)
    huey.storage.read_timeout = 0.5
    while not stop.is_set():
        try:
            while not stop.is_set() and (relayed := drain(store, versions, waker)):
                # While responses keep coming, fewer and fuller batches: intake needs the processor more.
                if relayed < _BATCH:
                    stop.wait(_BREATH)
        except PyMongoError as error:
            _log.warning("the relay waits for the database", extra={"error": type(error).__name__})
            stop.wait(0.5)
            continue
        except Exception:
            _log.exception("the relay failed; trying again")
            stop.wait(0.5)
            continue
        try:
            huey.storage.dequeue()
        except (RedisError, OSError):
            stop.wait(0.2)
