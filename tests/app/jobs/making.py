"""Jobs as the tests make them."""

import itertools
from datetime import datetime
from typing import Any

from quern.jobs import queue, turns
from quern.jobs.model import NewJob, Queue, State
from quern.store.connection import Document, Store

_numbers = itertools.count()


def new_job(
    kind: str = "nothing",
    *,
    tenant: str = "ten_a",
    queue: Queue = Queue.DEFAULT,
    payload: dict[str, Any] | None = None,
    priority: int = 5,
    due: datetime | None = None,
    deadline: datetime | None = None,
    state: State = State.QUEUED,
    subject: str | None = None,
) -> NewJob:
    """A job with an identifier of its own."""
    return NewJob(
        id=NewJob.derived_id(tenant, "test", str(next(_numbers))),
        tenant=tenant,
        queue=queue,
        kind=kind,
        payload=payload or {},
        priority=priority,
        due=due,
        deadline=deadline,
        state=state,
        subject=subject,
    )


def enqueue(store: Store, *jobs: NewJob) -> list[str]:
    """Make jobs durable and open their turns, as a relay does; returns their identifiers."""
    turns.open_many(store.db, queue.insert(store.db, jobs))
    return [job.id for job in jobs]


def read(store: Store, job_id: str) -> Document:
    """The job's document, which must exist."""
    document = store.db.jobs.find_one({"_id": job_id})
    assert document is not None
    return document


def events(document: Document) -> list[str]:
    """The types of the entries in a job's log."""
    return [entry["type"] for entry in document["log"]]
