"""Periodic jobs: once a tick whoever schedules, and a missed tick is caught up."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from quern.jobs import queue, schedule, scheduler
from quern.jobs.enqueue import Enqueuer
from quern.jobs.handler import Registry, Tick
from quern.jobs.model import NewJob, Queue
from quern.jobs.wake import Waker
from quern.store.connection import Store


def nightly(name: str = "nightly", every: int = 1440, at: int = 90) -> Tick:
    def make(moment: datetime) -> NewJob:
        identity = NewJob.derived_id("system", name, moment.isoformat())
        return NewJob(id=identity, tenant="system", queue=Queue.LOW, kind=name, payload={"at": moment.isoformat()})

    return Tick(name, make, every, at)


def made(store: Store) -> list[str]:
    return sorted(str(job["payload"]["at"]) for job in store.db.jobs.find())


def run_due(store: Store, now: datetime) -> None:
    schedule.run_due(store, Enqueuer(store, Waker(store.redis_queue_url)), [nightly()], now)


NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@given(
    now=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    every=st.integers(1, 10_000),
    at=st.integers(0, 10_000),
)
def test_the_latest_tick_is_the_last_one_that_was_due(now: datetime, every: int, at: int) -> None:
    tick = schedule.latest_tick(nightly(every=every, at=at), now)
    assert now - timedelta(minutes=every) < tick <= now
    assert (int(tick.timestamp()) // 60 - at) % every == 0
    assert tick.second == tick.microsecond == 0


def test_several_schedulers_make_one_job_a_tick(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: run_due(store, NOON), range(12)))
    assert made(store) == ["2026-11-22T01:30:00+00:00"]


def test_a_tick_is_made_once_though_it_is_looked_at_often(store: Store) -> None:
    for minute in range(5):
        run_due(store, NOON + timedelta(minutes=minute))
    assert len(made(store)) == 1
    assert queue.claim(store.db, "low", 60) is not None
    assert queue.claim(store.db, "low", 60) is None


def test_a_missed_tick_is_caught_up_once(store: Store) -> None:
    run_due(store, NOON)
    run_due(store, NOON + timedelta(days=3))
    assert made(store) == ["2026-11-22T01:30:00+00:00", "2026-11-25T01:30:00+00:00"]


def test_a_scheduler_that_died_before_it_took_note_changes_nothing(store: Store) -> None:
    run_due(store, NOON)
    store.db.schedule.delete_many({})
    run_due(store, NOON)
    assert len(made(store)) == 1


def test_one_leads_until_its_lease_ends(store: Store) -> None:
    assert schedule.take_lead(store, "seal", "one", 60)
    assert not schedule.take_lead(store, "seal", "two", 60)
    assert schedule.take_lead(store, "seal", "one", -1)
    assert schedule.take_lead(store, "seal", "two", 60)
    assert not schedule.take_lead(store, "seal", "one", 60)


def test_a_broken_tick_or_chore_stops_no_other(store: Store) -> None:
    def broken(_: datetime) -> NewJob:
        raise RuntimeError("broken")

    stop = threading.Event()
    ticks = [Tick("broken", broken, 1), nightly()]
    chores = [
        scheduler.Chore("broken", 1, lambda: broken(NOON)),
        scheduler.Chore("sound", 1, stop.set),
    ]
    main = threading.Thread(
        target=scheduler.main,
        args=(store, Registry(), Waker(store.settings.redis_queue_url.get_secret_value), ticks, chores, stop),
        daemon=True,
    )
    main.start()
    assert stop.wait(60)
    main.join(60)
    assert len(made(store)) == 1
