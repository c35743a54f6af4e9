"""A process of the queue with handlers for tests: `python -m tests.app.jobs.serve WHAT`, which is `worker[:QUEUE]`,
`stopped`, `patient`, `scheduler` or `die`.

Settings come from the environment, as in production. Each run of a job is noted in `effects`.
"""

import logging
import os
import signal
import sys
import threading
import time
from datetime import datetime
from typing import Any

from pymongo.client_session import ClientSession

from quern.config import LiveSettings
from quern.jobs import queue, scheduler, worker
from quern.jobs.handler import Context, Handler, Registry, RetryLater, Tick
from quern.jobs.model import Job, NewJob, Queue
from quern.jobs.wake import Waker
from quern.jobs.worker import Worker
from quern.store import clock
from quern.store.connection import Store


def _note(job: Job, context: Context) -> dict[str, Any] | None:
    context.db.effects.insert_one({"job": job.id, "pid": os.getpid(), "at": clock.now()})
    return None


def _nap(job: Job, context: Context) -> dict[str, Any] | None:
    """Works for `seconds`, and gives up when it is told to unless it is `stubborn`."""
    _note(job, context)
    end = time.monotonic() + float(job.payload["seconds"])
    while time.monotonic() < end:
        if not job.payload.get("stubborn") and context.stop.wait(0.02):
            raise RetryLater("told to stop", after=0)
        time.sleep(0.01)
    return {"rested": True}


REGISTRY = Registry([Handler("nothing", _note), Handler("nap", _nap)])


def _nightly(at: datetime) -> NewJob:
    identity = NewJob.derived_id("quern", "nightly", at.isoformat())
    return NewJob(id=identity, tenant="quern", queue=Queue.LOW, kind="nothing")


NIGHTLY = Tick("nightly", _nightly, every=24 * 60)


def _die_after_commit(store: Store) -> None:
    """Enqueue in a transaction, and be killed before anybody is told."""
    job = NewJob(id=sys.argv[2], tenant="ten_a", queue=Queue.DEFAULT, kind="nothing", payload={})

    def work(session: ClientSession) -> queue.Opened:
        return queue.insert(store.db, [job], session=session)

    queue.transact(store, work)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Be what the first argument says."""
    logging.basicConfig(level="INFO")
    what, _, name = sys.argv[1].partition(":")
    if what == "patient":
        worker.ASK_AGAIN = 3600.0
        os.environ["QUERN_JOB__DRAIN_TIMEOUT"] = "600"
    store = Store(LiveSettings())
    waker = Waker(store.redis_queue_url)
    if what in ("worker", "patient"):
        Worker(store, REGISTRY, waker, Queue(name or "default")).run()
    elif what == "stopped":
        stop = threading.Event()
        stop.set()
        Worker(store, REGISTRY, waker, Queue.DEFAULT).run(stop)
    elif what == "scheduler":
        scheduler.main(store, REGISTRY, waker, [NIGHTLY], [], threading.Event())
    elif what == "die":
        _die_after_commit(store)


if __name__ == "__main__":
    main()
