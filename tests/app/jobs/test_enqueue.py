"""Enqueueing one by one: durable when the call returns, and few trips however many threads call."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.monitoring import CommandListener, CommandStartedEvent

from quern.jobs import queue, turns
from quern.jobs.enqueue import Enqueuer
from quern.jobs.wake import Waker, make_huey
from quern.store import clock
from quern.store.connection import Document, Store
from tests.app.jobs.making import new_job, read


@pytest.fixture
def add(store: Store) -> Enqueuer:
    make_huey("default", store.settings.redis_queue_url.get_secret_value).storage.flush_queue()
    return Enqueuer(store, Waker(store.redis_queue_url))


def waiting(store: Store) -> int:
    return int(make_huey("default", store.settings.redis_queue_url.get_secret_value).storage.queue_size())


def test_what_returned_can_be_claimed_and_a_wake_up_waits(store: Store, add: Enqueuer) -> None:
    job = new_job()
    add(job)
    assert waiting(store) == 1
    [claimed] = queue.claim_many(store.db, "default", 60.0, 4).jobs
    assert claimed.id == job.id


def test_of_many_threads_that_enqueue_no_job_is_left_out(store: Store, add: Enqueuer) -> None:
    jobs = [new_job(tenant=f"ten_{number % 3}") for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, jobs))
    taken = []
    while claimed := queue.claim_many(store.db, "default", 60.0, 16).jobs:
        taken += [job.id for job in claimed]
    assert sorted(taken) == sorted(job.id for job in jobs)


def test_the_same_job_twice_stays_as_it_is(store: Store, add: Enqueuer) -> None:
    job = new_job()
    add(job)
    [claimed] = queue.claim_many(store.db, "default", 60.0, 4).jobs
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, [job, new_job(), job, new_job()]))
    assert read(store, job.id)["lease_id"] == claimed.lease_id
    assert len(queue.claim_many(store.db, "default", 60.0, 8).jobs) == 2


def test_a_write_that_failed_is_not_acknowledged(store: Store, add: Enqueuer, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> queue.Opened:
        raise PyMongoError("away")

    monkeypatch.setattr(queue, "insert", away)
    with pytest.raises(PyMongoError):
        add(new_job())
    assert waiting(store) == 0


class Counting(CommandListener):
    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.names.append(event.command_name)

    def succeeded(self, event: object) -> None: ...

    def failed(self, event: object) -> None: ...


def test_an_empty_queue_is_answered_in_one_trip_and_an_emptied_one_needs_no_second_look(store: Store) -> None:
    counting = Counting()
    uri = store.settings.mongodb_uri.get_secret_value()
    client: MongoClient[Document] = MongoClient(uri, event_listeners=[counting], w="majority", tz_aware=True)
    with client:
        db = client[store.settings.mongodb_database]
        assert queue.claim_many(db, "default", 60.0, 4) == queue.Claimed([], more=False)
        assert counting.names == ["find"]
        turns.open_many(store.db, queue.insert(store.db, [new_job(), new_job()]))
        counting.names.clear()
        claimed = queue.claim_many(db, "default", 60.0, 4)
        assert (len(claimed.jobs), claimed.more) == (2, False)
        assert counting.names == ["find", "find", "update", "delete"]
    assert turns.due(store.db, "default", clock.now(), most=1) == []


def test_work_that_comes_while_many_claim_is_never_overlooked(store: Store, add: Enqueuer) -> None:
    """Without a reconciler, and with a claimer that believes `more`: it looks again only when told to by a wake-up."""
    total = 300
    huey = make_huey("default", store.settings.redis_queue_url.get_secret_value, timeout=5.0)
    taken: list[str] = []

    def work(_: int) -> None:
        idle = 0
        while len(taken) < total and idle < 60:
            idle = 0 if huey.storage.dequeue() else idle + 1
            more = True
            while more:
                claimed = queue.claim_many(store.db, "default", 60.0, 4)
                taken.extend(job.id for job in claimed.jobs)
                more = claimed.more

    def feed(number: int) -> None:
        for _ in range(total // 3):
            add(new_job(tenant=f"ten_{number % 2}"))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda call: call[0](call[1]), [(work, 0), (work, 1), *((feed, number) for number in range(3))]))
    assert len(set(taken)) == len(taken) == total
