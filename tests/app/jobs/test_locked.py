"""A process that is killed inside a transaction leaves documents locked for a while: that holds up nobody else."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from pymongo.errors import PyMongoError

from quern.jobs import queue, reconciler
from quern.jobs.handler import Handler, Registry
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, new_job, read

NOTHING = Registry([Handler("nothing", lambda job, context: None)])


@contextmanager
def locked(store: Store, job_id: str) -> Iterator[None]:
    """As if somebody had been killed between the first write and the commit."""
    with store.client.start_session() as session:
        session.start_transaction()
        store.db.jobs.update_one({"_id": job_id}, {"$set": {"touched": True}}, session=session)
        yield
        session.abort_transaction()


def test_a_locked_job_does_not_hold_up_the_rescue_of_others(store: Store) -> None:
    ids = enqueue(store, *(new_job() for _ in range(3)))
    for _ in ids:
        queue.claim(store.db, "default", 60)
    store.db.jobs.update_many({}, {"$set": {"lease_until": clock.now() - timedelta(seconds=1)}})
    with locked(store, ids[0]):
        assert reconciler.rescue(store, NOTHING) == 2
    assert reconciler.rescue(store, NOTHING) == 1


def test_a_locked_job_does_not_cost_the_others_their_leases(store: Store) -> None:
    ids = enqueue(store, *(new_job() for _ in range(3)))
    jobs = [queue.claim(store.db, "default", 0.5) for _ in ids]
    leases = [job.lease_id for job in jobs if job is not None]
    with locked(store, ids[0]):
        held, _ = queue.extend(store.db, leases, 4)
    assert held == set(leases), "a locked lease is not a lost one"
    for identity in ids[1:]:
        assert read(store, identity)["lease_until"] > clock.now()


def test_a_locked_job_does_not_hold_up_other_tenants(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "CLAIM_SECONDS", 1.0)
    [stuck] = enqueue(store, new_job(tenant="ten_stuck"))
    [free] = enqueue(store, new_job(tenant="ten_free"))
    taken = []
    with locked(store, stuck):
        for _ in range(2):
            try:
                job = queue.claim(store.db, "default", 60)
            except PyMongoError as error:
                assert error.timeout
            else:
                taken.append(job.id if job else None)
    assert taken == [free]
