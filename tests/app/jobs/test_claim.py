"""Claims: one worker a job, by priority, by turns and by age, under a lease that fences off whoever lost it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from quern.jobs import queue, reconciler, turns
from quern.jobs.handler import Handler, Registry
from quern.jobs.model import Job, State
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, events, new_job, read

NOTHING = Registry([Handler("nothing", lambda job, context: None)])


def claim(store: Store, lease: float = 60.0) -> Job:
    job = queue.claim(store.db, "default", lease)
    assert job is not None
    return job


def expire_lease(store: Store, job: Job) -> None:
    past = clock.now() - timedelta(seconds=1)
    store.db.jobs.update_one({"_id": job.id}, {"$set": {"lease_until": past}})


def test_a_claim_takes_a_lease_and_counts_the_attempt(store: Store) -> None:
    [identity] = enqueue(store, new_job())
    job = claim(store)
    document = read(store, identity)
    assert (job.id, job.attempt, document["state"]) == (identity, 1, "running")
    assert document["lease_id"] == job.lease_id
    assert document["lease_until"] > clock.now() + timedelta(seconds=30)
    assert queue.claim(store.db, "default", 60) is None


def test_each_job_is_claimed_by_one_of_many_workers(store: Store) -> None:
    made = enqueue(store, *(new_job(tenant=f"ten_{number % 3}") for number in range(60)))

    def work(_: int) -> list[str]:
        taken = []
        while (job := queue.claim(store.db, "default", 60)) is not None:
            taken.append(job.id)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [identity for found in pool.map(work, range(8)) for identity in found]
    assert sorted(taken) == sorted(made)


def test_work_that_comes_while_others_claim_is_never_overlooked(store: Store) -> None:
    """Without a reconciler: a turn that is closed at the wrong moment would leave its job behind for good."""
    total, taken, done = 300, [], threading.Event()

    def feed(tenant: str) -> None:
        for _ in range(total // 3):
            enqueue(store, new_job(tenant=tenant))

    def work() -> None:
        while not done.is_set():
            job = queue.claim(store.db, "default", 60)
            if job is not None:
                taken.append(job.id)

    workers = [threading.Thread(target=work) for _ in range(4)]
    feeders = [threading.Thread(target=feed, args=(f"ten_{number}",)) for number in range(3)]
    for thread in (*workers, *feeders):
        thread.start()
    for thread in feeders:
        thread.join()
    deadline = time.monotonic() + 60
    while len(taken) < total and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in workers:
        thread.join()
    assert len(set(taken)) == len(taken) == total


def test_a_late_closing_does_not_hide_new_work(store: Store) -> None:
    """Two workers find nothing; one closes the turn, new work opens it again, then the other closes what it saw."""
    turns.open_many(store.db, [("default", 5, "ten_a", clock.now())])
    slow = turns.take(store.db, "default", clock.now())
    quick = turns.take(store.db, "default", clock.now())
    assert slow is not None
    assert quick is not None
    turns.close(store.db, quick, None)
    [identity] = enqueue(store, new_job())
    turns.close(store.db, slow, None)
    assert claim(store).id == identity


def test_the_better_priority_goes_first(store: Store) -> None:
    enqueue(store, new_job(priority=9), new_job(priority=5), new_job(priority=0))
    assert [claim(store).priority for _ in range(3)] == [0, 5, 9]


def test_the_older_job_of_a_tenant_goes_first(store: Store) -> None:
    now = clock.now()
    older, newer = new_job(due=now - timedelta(seconds=9)), new_job(due=now - timedelta(seconds=1))
    enqueue(store, newer, older)
    assert [claim(store).id for _ in range(2)] == [older.id, newer.id]


def test_a_job_due_later_waits_until_then(store: Store) -> None:
    [identity] = enqueue(store, new_job(due=clock.now() + timedelta(seconds=0.4)))
    assert queue.claim(store.db, "default", 60) is None
    deadline = time.monotonic() + 30
    while (job := queue.claim(store.db, "default", 60)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job is not None
    assert job.id == identity
    assert clock.now() >= job.due


def test_a_job_due_later_does_not_go_along_with_one_that_is_due(store: Store) -> None:
    later = new_job(due=clock.now() + timedelta(hours=1))
    [due, _] = enqueue(store, new_job(), later)
    assert claim(store).id == due
    assert queue.claim(store.db, "default", 60) is None
    assert queue.claim_many(store.db, "default", 60, 4).jobs == []


def test_a_blocked_job_is_not_claimed(store: Store) -> None:
    enqueue(store, new_job(state=State.BLOCKED))
    assert queue.claim(store.db, "default", 60) is None


def test_a_claim_takes_from_its_own_queue_only(store: Store) -> None:
    enqueue(store, new_job())
    assert queue.claim(store.db, "webhooks", 60) is None


def test_an_old_worker_cannot_write_after_its_lease_was_taken(store: Store) -> None:
    enqueue(store, new_job())
    old = claim(store)
    expire_lease(store, old)
    assert reconciler.rescue(store, NOTHING) == 1
    new = claim(store)
    assert new.id == old.id
    with pytest.raises(queue.LeaseLostError):
        queue.settle(store, NOTHING, old, State.DONE, result={"by": "old"})
    assert queue.put_back(store.db, old, after=0, reason="", charged=True) is False
    assert queue.extend(store.db, [old.lease_id], 60) == (set(), set())
    queue.settle(store, NOTHING, new, State.DONE, result={"by": "new"})
    assert read(store, new.id)["result"] == {"by": "new"}


def test_a_heartbeat_holds_the_lease_and_hears_of_a_cancellation(store: Store) -> None:
    enqueue(store, new_job(), new_job())
    one, two = claim(store, lease=1), claim(store, lease=1)
    store.db.jobs.update_one({"_id": two.id}, {"$set": {"cancel": True}})
    assert queue.extend(store.db, [one.lease_id, two.lease_id], 60) == (
        {one.lease_id, two.lease_id},
        {two.lease_id},
    )
    assert read(store, one.id)["lease_until"] > clock.now() + timedelta(seconds=30)
    assert reconciler.rescue(store, NOTHING) == 0


def test_a_job_whose_worker_fell_silent_is_queued_again(store: Store) -> None:
    [identity] = enqueue(store, new_job())
    expire_lease(store, claim(store))
    reconciler.rescue(store, NOTHING)
    document = read(store, identity)
    assert (document["state"], document["lost"], document["failures"]) == ("queued", 1, 0)
    assert "lease_id" not in document
    assert claim(store).attempt == 2
    assert events(read(store, identity)) == ["queued", "running", "rescued", "running"]


def test_a_flood_of_one_tenant_delays_another_by_a_few_jobs(store: Store) -> None:
    now = clock.now()
    flood = [new_job(tenant="ten_flood", due=now - timedelta(hours=1)) for _ in range(10_000)]
    enqueue(store, *flood)
    for _ in range(20):
        claim(store)
    [single] = enqueue(store, new_job(tenant="ten_single"))
    order = [claim(store).id for _ in range(4)]
    assert single in order


def test_tenants_take_turns(store: Store) -> None:
    for tenant in ("ten_a", "ten_b", "ten_c"):
        enqueue(store, *(new_job(tenant=tenant) for _ in range(5)))
    tenants = [claim(store).tenant for _ in range(15)]
    for start in range(0, 15, 3):
        assert sorted(tenants[start : start + 3]) == ["ten_a", "ten_b", "ten_c"]


def test_a_log_keeps_its_newest_entries_and_goes_on_counting(store: Store) -> None:
    """A job that waits for days (its engine is away, its circuit open) must not outgrow a document."""
    [identity] = enqueue(store, new_job())
    rounds = queue.LOG_KEPT
    for _ in range(rounds):
        assert queue.put_back(store.db, claim(store), after=0, reason="away", charged=False)
    log = read(store, identity)["log"]
    assert [entry["seq"] for entry in log] == list(range(rounds + 2, 2 * rounds + 2))
