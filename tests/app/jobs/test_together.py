"""Claims and ends that are taken many at a time: the same fences, the same turns, fewer trips."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from quern.jobs import queue
from quern.jobs.handler import Context, Handler, Registry
from quern.jobs.model import Job, Queue, State
from quern.jobs.wake import Waker, make_huey
from quern.jobs.worker import Worker
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, events, new_job, read

NOTHING = Registry([Handler("nothing", lambda job, context: None)])


def claim_many(store: Store, most: int) -> list[Job]:
    return queue.claim_many(store.db, "default", 60.0, most).jobs


def test_threads_that_ask_together_get_a_job_each_with_a_lease_of_its_own(store: Store) -> None:
    ids = enqueue(store, *(new_job() for _ in range(6)))
    jobs = claim_many(store, 4)
    assert len({job.id for job in jobs}) == len({job.lease_id for job in jobs}) == 4
    for job in jobs:
        document = read(store, job.id)
        assert (document["state"], document["lease_id"], document["attempt"]) == ("running", job.lease_id, job.attempt)
        assert events(document) == ["queued", "running"]
    assert {job.id for job in jobs + claim_many(store, 4)} == set(ids)
    assert claim_many(store, 4) == []


def test_while_tenants_compete_nobody_takes_more_than_one_a_turn(store: Store) -> None:
    enqueue(store, *(new_job(tenant="ten_a") for _ in range(20)))
    enqueue(store, new_job(tenant="ten_b"))
    taken = [job.tenant for _ in range(2) for job in claim_many(store, 4)]
    assert sorted(taken) == ["ten_a", "ten_b"]


def test_many_who_claim_many_never_share_a_job(store: Store) -> None:
    ids = enqueue(store, *(new_job() for _ in range(120)))

    def take(_: int) -> list[str]:
        taken: list[str] = []
        while jobs := claim_many(store, 4):
            taken += [job.id for job in jobs]
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [job for some in pool.map(take, range(6)) for job in some]
    assert sorted(taken) == sorted(ids)


def test_a_job_that_failed_before_keeps_its_count_among_new_ones(store: Store) -> None:
    enqueue(store, new_job())
    [job] = claim_many(store, 1)
    assert queue.put_back(store.db, job, after=0, reason="again", charged=True)
    enqueue(store, new_job(), new_job())
    found = {other.id: (other.attempt, other.failures) for other in claim_many(store, 4)}
    assert found.pop(job.id) == (2, 1)
    assert set(found.values()) == {(1, 0)}


def test_of_many_ends_only_that_of_a_lost_lease_is_refused(store: Store) -> None:
    enqueue(store, *(new_job() for _ in range(4)))
    jobs = claim_many(store, 4)
    store.db.jobs.update_one({"_id": jobs[1].id}, {"$set": {"lease_id": "another's"}})
    ends = [
        queue.End(jobs[0], State.DONE),
        queue.End(jobs[1], State.DONE),
        queue.End(jobs[2], State.DONE, {"$odd": [1]}),
        queue.End(jobs[3], State.DEAD, error="$no"),
    ]
    now = clock.now()
    for _ in range(2):
        # The second time stands for a try again after an answer that was lost.
        outcomes = queue.settle_many(store, NOTHING, ends, now)
        assert [type(outcome) for outcome in outcomes] == [type(None), queue.LeaseLostError, type(None), type(None)]
    documents = [read(store, job.id) for job in jobs]
    assert [document["state"] for document in documents] == ["done", "running", "done", "dead"]
    assert (documents[2]["result"], documents[3]["error"]) == ({"$odd": [1]}, "$no")
    assert all(events(documents[place]) == ["queued", "running", documents[place]["state"]] for place in (0, 2, 3))


def test_quick_jobs_are_claimed_ahead_and_given_back_when_one_is_slow(store: Store) -> None:
    """The worker has learned that its jobs are quick; then one is not, and those behind it go to others."""
    enqueue(store, *(new_job() for _ in range(40)))
    release = threading.Event()
    begun: list[str] = []

    def run(job: Job, _: Context) -> None:
        begun.append(job.id)
        if len(begun) > 40:
            assert release.wait(30)

    waker = Waker(store.redis_queue_url)
    worker = Worker(store, Registry([Handler("nothing", run)]), waker, Queue.DEFAULT)
    worker._mean = 0.0
    worker.drain()
    assert len(begun) == 40
    ids = enqueue(store, *(new_job() for _ in range(8)))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(worker.drain)
        deadline = time.monotonic() + 30
        while len(begun) < 41 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {read(store, job)["state"] for job in ids} == {"running"}, "they were not claimed ahead"
        while time.monotonic() < deadline and store.db.jobs.count_documents({"state": "queued"}) < 7:
            worker.give_back_overdue()
            time.sleep(0.02)
        others = claim_many(store, 16)
        assert {job.id for job in others} == set(ids) - {begun[40]}
        release.set()
        slow.result(30)
    assert read(store, begun[40])["state"] == "done"
    assert all(read(store, job.id)["lease_id"] == job.lease_id for job in others)


def test_one_wake_up_for_many_slow_jobs_brings_other_threads(store: Store) -> None:
    url = store.settings.redis_queue_url.get_secret_value
    make_huey("default", url).storage.flush_queue()
    enqueue(store, *(new_job() for _ in range(3)))
    woken: list[int] = []

    def run(job: Job, _: Context) -> None:
        woken.append(int(make_huey("default", url).storage.queue_size()))

    Worker(store, Registry([Handler("nothing", run)]), Waker(url), Queue.DEFAULT).drain()
    assert woken[0] == 1
