"""A process of the queue with handlers for tests: `python -m tests.app.jobs.serve worker|stopped|scheduler|die`.

Settings come from the environment, as in production. Each run of a job is noted in `effects`.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from pymongo.client_session import ClientSession

from quern.config import LiveSettings
from quern.jobs import queue, scheduler
from quern.jobs.handler import Context, Handler, Registry, RetryLater
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
    store = Store(LiveSettings())
    waker = Waker(store.redis_queue_url)
    if sys.argv[1] == "worker":
        Worker(store, REGISTRY, waker, Queue.DEFAULT).run()
    elif sys.argv[1] == "stopped":
        stop = threading.Event()
        stop.set()
        Worker(store, REGISTRY, waker, Queue.DEFAULT).run(stop)
    elif sys.argv[1] == "scheduler":
        scheduler.main(store, REGISTRY, waker, [], [], threading.Event())
    elif sys.argv[1] == "die":
        _die_after_commit(store)


if __name__ == "__main__":
    main()
