"""Making jobs: once for each cause, and never half."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from pymongo.client_session import ClientSession

from quern.jobs import queue, reconciler, turns
from quern.jobs.model import NewJob, Queue, State
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, new_job, read


def caused(tenant: str = "ten_a", step: str = "mood") -> NewJob:
    return NewJob(
        id=NewJob.derived_id(tenant, "rsp_1", step), tenant=tenant, queue=Queue.DEFAULT, kind="nothing", payload={}
    )


def test_the_same_cause_never_makes_two_jobs(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: enqueue(store, caused()), range(16)))
    assert store.db.jobs.count_documents({}) == 1


def test_an_ended_job_is_not_made_again(store: Store) -> None:
    enqueue(store, caused())
    store.db.jobs.update_one({}, {"$set": {"state": "done"}})
    enqueue(store, caused())
    assert read(store, caused().id)["state"] == "done"
    assert queue.claim(store.db, "default", 60) is None


def test_no_cause_crosses_a_tenant_or_a_step() -> None:
    ids = {caused("ten_a").id, caused("ten_b").id, caused(step="moo").id, NewJob.derived_id("ten_a", "rsp_1m", "ood")}
    assert len(ids) == 4


def test_jobs_of_an_aborted_transaction_do_not_exist(store: Store) -> None:
    def work(session: ClientSession) -> None:
        queue.insert(store.db, [caused()], session=session)
        raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError, match="changed my mind"):
        queue.transact(store, work)
    assert store.db.jobs.count_documents({}) == 0


def test_jobs_of_a_transaction_are_found_though_nobody_opened_their_turn(store: Store) -> None:
    queue.transact(store, lambda session: queue.insert(store.db, [caused()], session=session))
    assert queue.claim(store.db, "default", 60) is None
    assert reconciler.reopen(store) == 0, "whoever made it may still be about to open it"
    store.db.jobs.update_one({"wake": {"$exists": True}}, {"$set": {"wake": clock.now() - timedelta(seconds=1)}})
    assert reconciler.reopen(store) == 1
    found = queue.claim(store.db, "default", 60)
    assert found is not None
    assert found.id == caused().id


def test_an_existing_job_in_a_transaction_stays_as_it_is(store: Store) -> None:
    enqueue(store, caused())
    opened = queue.transact(store, lambda session: queue.insert(store.db, [caused()], session=session))
    assert opened == []
    assert store.db.jobs.count_documents({}) == 1


def test_reopening_an_ended_job_does_nothing(store: Store) -> None:
    [identity] = enqueue(store, new_job(state=State.SKIPPED))
    store.db.jobs.update_one({"_id": identity}, {"$set": {"wake": clock.now() - timedelta(seconds=1)}})
    assert reconciler.reopen(store) == 0
    assert "wake" not in read(store, identity)
    assert turns.take(store.db, "default", clock.now()) is None


def test_jobs_whose_turns_a_crash_of_mongod_took_are_found(store: Store) -> None:
    later = clock.now() + timedelta(hours=1)
    jobs = [new_job(tenant="ten_a"), new_job(tenant="ten_b"), new_job(queue=Queue.HIGH), new_job(priority=1, due=later)]
    enqueue(store, *jobs)
    assert reconciler.restore_turns(store) == 0
    store.db.turns.delete_many({"tenant": "ten_a"})
    # And one that was put off though its job is due.
    store.db.turns.update_one({"tenant": "ten_b"}, {"$set": {"ready": later}})
    assert queue.claim(store.db, "default", 60) is None
    assert reconciler.restore_turns(store) == 4
    found = [queue.claim(store.db, name, 60) for name in ("default", "default", "high")]
    assert {job.id for job in found if job} == {job.id for job in jobs[:3]}
    assert queue.claim(store.db, "default", 60) is None, "it is not due"
    assert reconciler.restore_turns(store) == 0
