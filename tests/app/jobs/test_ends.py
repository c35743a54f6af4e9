"""How a job ends, or does not yet: success, retries with backoff, dead letters, cancel, deadline, replay."""

import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo.client_session import ClientSession

from quern.config import LiveSettings, Settings
from quern.jobs import backoff, queue, reconciler
from quern.jobs.handler import Context, Followup, Handler, Obsolete, Refused, Registry, RetryLater, Run
from quern.jobs.model import Job, Queue, State
from quern.jobs.wake import Waker
from quern.jobs.worker import Worker
from quern.store import clock
from quern.store.connection import Db, Store
from tests.app.jobs.making import enqueue, events, new_job, read


class Hook:
    """An `on_end` that writes what it was told into the database, inside the transaction that it is given."""

    def __init__(self, followup: Followup | None = None, fail: bool = False) -> None:
        self._followup, self._fail = followup or Followup(), fail

    def __call__(
        self, db: Db, session: ClientSession, job: Job, state: State, result: dict[str, Any] | None, error: str | None
    ) -> Followup:
        db.ends.insert_one({"job": job.id, "state": state.value, "error": error}, session=session)
        if self._fail:
            raise RuntimeError("the hook is broken")
        return self._followup


def ends(store: Store, job_id: str) -> list[str]:
    return [str(row["state"]) for row in store.db.ends.find({"job": job_id})]


@pytest.fixture
def patient(store: Store, settings: Settings) -> Store:
    """The same database with short leases and few chances."""
    job = settings.job.model_copy(update={"lease": 1.0, "max_failures": 3, "max_lost_leases": 2, "backoff_base": 60.0})
    if "ends" not in store.db.list_collection_names():
        store.db.create_collection("ends")
    return Store(LiveSettings(settings.model_copy(update={"job": job})))


@pytest.fixture(scope="session")
def waker(settings: Settings) -> Waker:
    return Waker(settings.redis_queue_url.get_secret_value)


Work = Callable[..., Worker]


@pytest.fixture
def worker(patient: Store, waker: Waker) -> Work:
    def make(*handlers: Handler) -> Worker:
        return Worker(patient, Registry(handlers), waker, Queue.DEFAULT)

    return make


def doing(run: Run, hook: Hook | None = None, **options: Any) -> Handler:
    return Handler("nothing", run, hook or Hook(), **options)


def raising(error: Exception) -> Run:
    def run(job: Job, context: Context) -> dict[str, Any] | None:
        raise error

    return run


def test_a_done_job_keeps_its_result(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job())
    worker(doing(lambda job, context: {"$odd": {"a.b": 1}})).drain()
    document = read(patient, identity)
    assert (document["state"], document["result"]) == ("done", {"$odd": {"a.b": 1}})
    assert ends(patient, identity) == ["done"]
    assert document["forget"] > clock.now()
    assert not document.keys() & {"lease_id", "lease_until", "wake"}


def test_a_failure_waits_longer_each_time_and_is_then_dead(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job())
    failing = worker(doing(raising(ValueError("with a person's words"))))
    waits = []
    for attempt in (1, 2, 3):
        failing.drain()
        document = read(patient, identity)
        assert document["failures"] == min(attempt, 2)
        if attempt < 3:
            assert document["state"] == "queued"
            waits.append((document["due"] - clock.now()).total_seconds())
            patient.db.jobs.update_one({"_id": identity}, {"$set": {"due": clock.now()}})
            patient.db.turns.update_many({}, {"$set": {"ready": clock.now()}})
    assert 25 < waits[0] <= 60
    assert 55 < waits[1] <= 120
    assert (document["state"], document["error"]) == ("dead", "unexpected ValueError")
    assert ends(patient, identity) == ["dead"]
    assert "person" not in repr(document)


def test_an_uncharged_failure_costs_no_chance(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job())
    waiting = worker(doing(raising(RetryLater("the engine is away", after=0, charged=False))))
    tries = threading.Thread(target=waiting.drain, daemon=True)
    tries.start()
    deadline = time.monotonic() + 30
    while read(patient, identity)["attempt"] < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting._stopping = lambda: True
    tries.join(30)
    document = read(patient, identity)
    assert document["attempt"] >= 6
    assert (document["state"], document["failures"]) == ("queued", 0)
    assert ends(patient, identity) == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Refused("it can never succeed"), "dead"),
        (RetryLater("its schedule is exhausted", last=True), "dead"),
        (Obsolete("the response was erased"), "cancelled"),
    ],
)
def test_a_verdict_ends_a_job_at_once(patient: Store, worker: Work, error: Exception, state: str) -> None:
    [identity] = enqueue(patient, new_job())
    worker(doing(raising(error))).drain()
    document = read(patient, identity)
    assert (document["state"], document["attempt"], document["error"]) == (state, 1, str(error))
    assert ends(patient, identity) == [state]


def test_a_broken_hook_leaves_nothing_half_written(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job())
    with pytest.raises(RuntimeError, match="the hook is broken"):
        worker(doing(lambda job, context: {"a": 1}, Hook(fail=True))).drain()
    document = read(patient, identity)
    assert document["state"] == "running"
    assert "result" not in document
    assert ends(patient, identity) == []


def test_a_job_that_cannot_be_ended_does_not_keep_others_from_rescue(patient: Store) -> None:
    broken, sound = new_job("broken"), new_job("nothing")
    enqueue(patient, broken, sound)
    registry = Registry(
        [Handler("broken", lambda job, context: None, Hook(fail=True)), doing(lambda job, context: None)]
    )
    for _ in range(2):
        assert queue.claim(patient.db, "default", 60) is not None
    past = clock.now() - timedelta(seconds=5)
    patient.db.jobs.update_many({}, {"$set": {"lease_until": past, "lost": 1}})
    reconciler.rescue(patient, registry)
    assert read(patient, sound.id)["state"] == "dead"
    assert read(patient, broken.id)["state"] == "running"
    assert read(patient, broken.id)["lease_until"] > clock.now(), "it must not be tried again at every pass"


def test_too_many_lost_leases_bury_a_job(patient: Store) -> None:
    [identity] = enqueue(patient, new_job())
    registry = Registry([doing(lambda job, context: None)])
    for _ in range(2):
        assert queue.claim(patient.db, "default", 60) is not None
        patient.db.jobs.update_one({"_id": identity}, {"$set": {"lease_until": clock.now() - timedelta(seconds=1)}})
        reconciler.rescue(patient, registry)
    document = read(patient, identity)
    assert document["state"] == "dead"
    assert "vanished 2 times" in document["error"]
    assert ends(patient, identity) == ["dead"]


def test_a_job_that_this_version_does_not_know_waits(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job("of tomorrow"))
    worker().drain()
    document = read(patient, identity)
    assert (document["state"], document["failures"], document["attempt"]) == ("queued", 0, 1)
    assert document["due"] > clock.now()


@pytest.mark.parametrize("state", [State.QUEUED, State.BLOCKED])
def test_a_waiting_job_dies_at_its_deadline(patient: Store, state: State) -> None:
    soon, later = clock.now() - timedelta(seconds=1), clock.now() + timedelta(hours=1)
    late, early = new_job(deadline=soon, state=state), new_job(deadline=later, state=state)
    enqueue(patient, late, early)
    assert reconciler.expire(patient, Registry([doing(lambda job, context: None)])) == 1
    assert read(patient, late.id)["state"] == "dead"
    assert "deadline" in read(patient, late.id)["error"]
    assert ends(patient, late.id) == ["dead"]
    assert read(patient, early.id)["state"] == state.value


def test_a_job_is_not_begun_after_its_deadline(patient: Store, worker: Work) -> None:
    ran: list[str] = []
    [identity] = enqueue(patient, new_job(deadline=clock.now() - timedelta(seconds=1)))
    worker(doing(lambda job, context: ran.append(job.id))).drain()
    assert read(patient, identity)["state"] == "dead"
    assert ran == []


def test_ended_jobs_with_a_deadline_are_not_looked_at_again(patient: Store) -> None:
    """What the reconciler does twice a second must not grow with what lies behind."""
    past = clock.now() - timedelta(hours=1)
    enqueue(patient, *(new_job(deadline=past, state=State.SKIPPED) for _ in range(200)))
    overdue = {"state": {"$in": ["queued", "blocked"]}, "deadline": {"$lt": clock.now()}}
    plan = patient.db.jobs.find(overdue).hint("overdue").explain()
    assert plan["executionStats"]["totalKeysExamined"] < 5


@pytest.mark.parametrize("state", [State.QUEUED, State.BLOCKED])
def test_a_waiting_job_is_cancelled_at_once(patient: Store, worker: Work, state: State) -> None:
    [identity] = enqueue(patient, new_job(state=state))
    registry = Registry([doing(lambda job, context: None)])
    assert queue.cancel(patient, registry, "ten_a", identity) is not None
    assert read(patient, identity)["state"] == "cancelled"
    assert ends(patient, identity) == ["cancelled"]
    ran: list[str] = []
    worker(doing(lambda job, context: ran.append(job.id))).drain()
    assert ran == []
    with pytest.raises(queue.NotPossibleError, match="cancelled"):
        queue.cancel(patient, registry, "ten_a", identity)


def test_a_running_job_is_told_to_stop_and_then_cancelled(patient: Store, worker: Work) -> None:
    started = threading.Event()

    def run(job: Job, context: Context) -> dict[str, Any] | None:
        started.set()
        if not context.stop.wait(60):
            raise AssertionError("nobody said stop")
        raise RetryLater("stopped", after=0)

    handler = doing(run)
    [identity] = enqueue(patient, new_job())
    running = threading.Thread(target=worker(handler).drain, daemon=True)
    running.start()
    assert started.wait(30)
    assert queue.cancel(patient, Registry([handler]), "ten_a", identity) is not None
    assert read(patient, identity)["cancel"] is True
    running.join(60)
    assert read(patient, identity)["state"] == "cancelled"
    assert ends(patient, identity) == ["cancelled"]


def test_a_cancellation_outlives_the_worker_that_it_was_meant_for(patient: Store) -> None:
    [identity] = enqueue(patient, new_job())
    registry = Registry([doing(lambda job, context: None)])
    assert queue.claim(patient.db, "default", 60) is not None
    queue.cancel(patient, registry, "ten_a", identity)
    patient.db.jobs.update_one({"_id": identity}, {"$set": {"lease_until": clock.now() - timedelta(seconds=1)}})
    reconciler.rescue(patient, registry)
    assert read(patient, identity)["state"] == "cancelled"
    assert ends(patient, identity) == ["cancelled"]


def test_a_cancellation_is_not_forgotten_by_a_retry(patient: Store, worker: Work) -> None:
    handler: Handler

    def run(job: Job, context: Context) -> dict[str, Any] | None:
        queue.cancel(patient, Registry([handler]), "ten_a", job.id)
        raise RetryLater("failed before it heard of it", after=0)

    handler = doing(run)
    [identity] = enqueue(patient, new_job())
    worker(handler).drain()
    document = read(patient, identity)
    assert (document["state"], document["attempt"]) == ("cancelled", 1)


def test_a_job_of_another_tenant_is_not_there(patient: Store) -> None:
    [identity] = enqueue(patient, new_job(state=State.BLOCKED))
    assert queue.cancel(patient, Registry(), "ten_b", identity) is None
    assert queue.replay(patient, "ten_b", identity) is None
    assert queue.get(patient.db, "ten_b", identity) is None
    assert read(patient, identity)["state"] == "blocked"


def test_a_replayed_job_starts_with_a_clean_record(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job())
    worker(doing(raising(Refused("not today")))).drain()
    document = queue.replay(patient, "ten_a", identity)
    assert document is not None
    assert (document["state"], document["failures"], document["lost"]) == ("queued", 0, 0)
    worker(doing(lambda job, context: {"ok": True})).drain()
    assert read(patient, identity)["result"] == {"ok": True}
    assert events(read(patient, identity)) == ["queued", "running", "dead", "replayed", "running", "done"]
    with pytest.raises(queue.NotPossibleError, match="only a dead job"):
        queue.replay(patient, "ten_a", identity)


def test_what_worked_on_something_erased_is_not_replayed(patient: Store, worker: Work) -> None:
    [identity] = enqueue(patient, new_job())
    worker(doing(raising(Refused("no")))).drain()
    patient.db.jobs.update_one({"_id": identity}, {"$set": {"erased": clock.now()}})
    with pytest.raises(queue.NotPossibleError, match="erased"):
        queue.replay(patient, "ten_a", identity)


def test_an_end_releases_skips_and_makes_jobs_in_one_go(patient: Store, worker: Work) -> None:
    released, skipped = new_job("other", state=State.BLOCKED), new_job("other", state=State.BLOCKED)
    fresh, first = new_job("other"), new_job()
    enqueue(patient, first, released, skipped)
    hook = Hook(Followup(release=[released.id], skip=[skipped.id], enqueue=[fresh]))
    ran: list[str] = []
    worker(doing(lambda job, context: None, hook), Handler("other", lambda job, context: ran.append(job.id))).drain()
    assert sorted(ran) == sorted([released.id, fresh.id])
    assert read(patient, skipped.id)["state"] == "skipped"


def test_follow_ups_are_found_though_their_worker_died_before_it_told(patient: Store, worker: Work) -> None:
    """A crash after the commit and before the turns were opened."""
    fresh, first = new_job("other"), new_job()
    enqueue(patient, first)
    job = queue.claim(patient.db, "default", 60)
    assert job is not None
    registry = Registry([doing(lambda job, context: None, Hook(Followup(enqueue=[fresh])))])
    queue.settle(patient, registry, job, State.DONE)
    patient.db.turns.delete_many({})
    assert queue.claim(patient.db, "default", 60) is None
    patient.db.jobs.update_one({"_id": fresh.id, "wake": {"$exists": True}}, {"$set": {"wake": clock.now()}})
    assert reconciler.reopen(patient) == 1
    found = queue.claim(patient.db, "default", 60)
    assert found is not None
    assert found.id == fresh.id


@given(failures=st.integers(1, 1000), base=st.floats(0.001, 600), cap=st.floats(0.001, 86_400), seed=st.integers(0, 9))
def test_backoff_doubles_up_to_its_cap_with_jitter(failures: int, base: float, cap: float, seed: int) -> None:
    ceiling = min(cap, base * 2.0 ** min(failures - 1, 60))
    assert ceiling / 2 <= backoff.delay(failures, base, cap, random.Random(seed)) <= ceiling
