"""Place and time left: what is promised to who asks. How good the guesses are is measured by `bench/estimates.py`."""

from datetime import timedelta

import pytest

from quern.jobs import capacity, estimate, queue
from quern.jobs.estimate import Estimate
from quern.jobs.model import State
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, new_job, read


@pytest.fixture
def at_work(store: Store) -> Store:
    """Two workers with two places each; a `slow` job takes 10 s and a `quick` one 1 s."""
    capacity.announce(store.db, "worker 1", "default", 2)
    capacity.announce(store.db, "worker 2", "default", 2)
    for _ in range(3):
        estimate.learn(store.db, "default", "slow", 10.0)
        estimate.learn(store.db, "default", "quick", 1.0)
    return store


def guess(store: Store, job_id: str) -> Estimate:
    return estimate.estimate(store.db, read(store, job_id), clock.now())


def test_a_place_counts_ones_own_and_the_turns_of_the_others(at_work: Store) -> None:
    mine = enqueue(at_work, *(new_job("slow", tenant="ten_a") for _ in range(3)))
    enqueue(at_work, *(new_job("slow", tenant="ten_b") for _ in range(100)))
    enqueue(at_work, new_job("slow", tenant="ten_c"))
    assert {guess(at_work, job).place for job in mine} == {3, 5, 7}


def test_all_of_a_better_priority_go_first_and_none_of_a_worse(at_work: Store) -> None:
    enqueue(at_work, *(new_job("slow", tenant="ten_b", priority=0) for _ in range(7)))
    enqueue(at_work, *(new_job("slow", tenant="ten_c", priority=9) for _ in range(7)))
    [mine] = enqueue(at_work, new_job("slow", tenant="ten_a"))
    assert guess(at_work, mine).place == 8


def test_the_place_is_the_number_of_claims_until_ones_own(at_work: Store) -> None:
    for number, tenant in enumerate(("ten_a", "ten_b", "ten_c")):
        jobs = enqueue(at_work, *(new_job("slow", tenant=tenant) for _ in range(4 + number)))
        if tenant == "ten_b":
            mine = jobs[2]
    place = guess(at_work, mine).place
    assert place is not None
    claims = 0
    while True:
        job = queue.claim(at_work.db, "default", 60)
        assert job is not None
        claims += 1
        if job.id == mine:
            break
    assert abs(claims - place) <= 2, "the turn that is under way may go either way for each other tenant"


def test_with_a_free_place_only_its_own_time_is_left(at_work: Store) -> None:
    enqueue(at_work, *(new_job("slow") for _ in range(3)))
    for _ in range(3):
        queue.claim(at_work.db, "default", 60)
    [mine] = enqueue(at_work, new_job("quick"))
    assert guess(at_work, mine).seconds == pytest.approx(1.0)


def test_behind_a_queue_the_work_is_shared_by_all_places(at_work: Store) -> None:
    enqueue(at_work, *(new_job("slow") for _ in range(40)))
    [mine] = enqueue(at_work, new_job("quick", due=clock.now() + timedelta(milliseconds=1)))
    seconds = guess(at_work, mine).seconds
    assert seconds is not None
    # 40 jobs of 10 s on 4 places take 100 s, and the first place falls free somewhat before that.
    assert 90 < seconds < 101


def test_a_running_job_needs_what_is_left_of_its_mean(at_work: Store) -> None:
    [mine] = enqueue(at_work, new_job("slow"))
    queue.claim(at_work.db, "default", 60)
    for ran, left in ((0, 10.0), (4, 6.0), (50, 2.5)):
        at_work.db.jobs.update_one({"_id": mine}, {"$set": {"started": clock.now() - timedelta(seconds=ran)}})
        found = guess(at_work, mine)
        assert found.place is None
        assert found.seconds == pytest.approx(left, abs=0.5)


def test_nobody_can_say_while_no_worker_lives(store: Store) -> None:
    [mine] = enqueue(store, new_job("slow"))
    assert guess(store, mine) == Estimate(1, None)


@pytest.mark.parametrize("state", [State.BLOCKED, State.DONE, State.DEAD])
def test_nobody_can_say_of_what_does_not_wait(at_work: Store, state: State) -> None:
    [mine] = enqueue(at_work, new_job("slow", state=state))
    assert guess(at_work, mine) == Estimate(None, None)


def test_a_later_job_waits_at_least_until_it_is_due(at_work: Store) -> None:
    [mine] = enqueue(at_work, new_job("quick", due=clock.now() + timedelta(seconds=100)))
    assert guess(at_work, mine).seconds == pytest.approx(101, abs=2)


def test_a_mean_follows_what_jobs_take_now(store: Store) -> None:
    for _ in range(5):
        estimate.learn(store.db, "default", "slow", 10.0)
    for _ in range(60):
        estimate.learn(store.db, "default", "slow", 2.0)
    found = store.db.durations.find_one({"kind": "slow"})
    assert found is not None
    assert found["mean"] == pytest.approx(2.0, abs=0.1)
