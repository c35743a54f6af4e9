"""How many jobs of a queue run at once: each worker process announces itself, and is believed for a while."""

from datetime import timedelta

from quern.store import clock
from quern.store.connection import EPHEMERAL, Db

#: Seconds between two announcements of a worker.
EVERY = 5.0
_BELIEVED = timedelta(seconds=20)


def announce(db: Db, worker: str, queue: str, concurrency: int) -> None:
    """Note that `worker` runs up to `concurrency` jobs of `queue` at once."""
    db.workers.with_options(write_concern=EPHEMERAL).update_one(
        {"_id": worker},
        {"$set": {"queue": queue, "concurrency": concurrency, "until": clock.now() + _BELIEVED}},
        upsert=True,
    )


def leave(db: Db, worker: str) -> None:
    """Note that a worker has stopped."""
    db.workers.with_options(write_concern=EPHEMERAL).delete_one({"_id": worker})


def of(db: Db, queue: str) -> int:
    """Jobs of `queue` that its live workers run at once; 0 when none lives."""
    alive = db.workers.find({"queue": queue, "until": {"$gt": clock.now()}}, {"concurrency": 1})
    return sum(worker["concurrency"] for worker in alive)
