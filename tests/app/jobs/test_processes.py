"""The queue as processes: what is killed, stopped or emptied costs seconds, never a job."""

import itertools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from quern.config import Settings
from quern.embedded.process import ChildProcess
from quern.embedded.redis_server import RedisServer
from quern.jobs import capacity
from quern.jobs.model import CONCURRENCY, NewJob, Queue
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, events, new_job, read

ROOT = Path(__file__).parents[3]
_numbers = itertools.count()


@pytest.fixture
def own_redis(run_directory: Path) -> Iterator[RedisServer]:
    """A Redis that a test may kill."""
    with RedisServer(run_directory / "redis", role="queue") as server:
        yield server


@pytest.fixture
def environment(settings: Settings, own_redis: RedisServer) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{ROOT / 'app'}",
        "QUERN_MONGODB_URI": settings.mongodb_uri.get_secret_value(),
        "QUERN_MONGODB_DATABASE": settings.mongodb_database,
        "QUERN_REDIS_QUEUE_URL": own_redis.url,
        "QUERN_SECRET_KEYS": ",".join(settings.required("secret_keys")),
        "QUERN_AUDIT_KEY": secrets.token_hex(32),
        "QUERN_JOB__LEASE": "2",
        "QUERN_JOB__RECONCILE_EVERY": "0.1",
        "QUERN_JOB__DRAIN_TIMEOUT": "2",
    }


Start = Callable[[str], ChildProcess]


@pytest.fixture
def start(environment: dict[str, str], run_directory: Path) -> Iterator[Start]:
    """Starts a process of `serve.py`; all are killed afterwards."""
    started: list[ChildProcess] = []

    def run(what: str) -> ChildProcess:
        process = ChildProcess(
            what,
            [sys.executable, "-m", "tests.app.jobs.serve", what],
            log=run_directory / f"{what}-{next(_numbers)}.log",
            ready=lambda: True,
            environment=environment,
            directory=ROOT,
        )
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


def all_done(store: Store, ids: list[str]) -> bool:
    return store.db.jobs.count_documents({"_id": {"$in": ids}, "state": "done"}) == len(ids)


def is_running(store: Store, identity: str) -> bool:
    document = read(store, identity)
    return document["state"] == "running" and store.db.effects.find_one({"job": identity}) is not None


def test_a_killed_workers_jobs_are_done_by_the_next(store: Store, start: Start) -> None:
    start("scheduler")
    first = start("worker")
    [identity] = enqueue(store, new_job("nap", payload={"seconds": 1.0}))
    wait_until(lambda: is_running(store, identity), "the job to begin")
    first.kill()
    start("worker")
    wait_until(lambda: all_done(store, [identity]), "the job to be done by another worker")
    assert events(read(store, identity)) == ["queued", "running", "rescued", "running", "done"]


def test_a_worker_that_slept_through_its_lease_writes_nothing(store: Store, start: Start) -> None:
    """A suspended machine, a long stall: it wakes up and believes that the job is still its own."""
    start("scheduler")
    sleeper = start("worker")
    [identity] = enqueue(store, new_job("nap", payload={"seconds": 1.0, "stubborn": True}))
    wait_until(lambda: is_running(store, identity), "the job to begin")
    assert sleeper.pid is not None
    os.kill(sleeper.pid, signal.SIGSTOP)
    start("worker")
    wait_until(lambda: all_done(store, [identity]), "the job to be done by another worker")
    done = read(store, identity)
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_until(lambda: "lost the lease" in sleeper.log.read_text(), "the sleeper to notice")
    assert read(store, identity) == done


@pytest.mark.parametrize(("number", "stubborn"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_stopped_worker_hands_its_leases_back_at_once(
    store: Store, start: Start, number: signal.Signals, stubborn: bool
) -> None:
    """No scheduler runs, so nothing but the worker itself can give the job back; a handler that does not listen is
    left behind, and with SIGINT the drain's time runs out first."""
    first = start("worker")
    [identity] = enqueue(store, new_job("nap", payload={"seconds": 600, "stubborn": stubborn}))
    wait_until(lambda: is_running(store, identity), "the job to begin")
    assert first.pid is not None
    os.kill(first.pid, number)
    wait_until(lambda: first.pid is None, "the worker to end")
    document = read(store, identity)
    assert (document["state"], document["failures"], document["lost"]) == ("queued", 0, 0)
    assert "lease_id" not in document
    assert capacity.of(store.db, "default") == 0


def test_a_drained_worker_finishes_what_it_can(store: Store, start: Start) -> None:
    first = start("worker")
    [identity] = enqueue(store, new_job("nap", payload={"seconds": 1.0, "stubborn": True}))
    wait_until(lambda: is_running(store, identity), "the job to begin")
    assert first.pid is not None
    os.kill(first.pid, signal.SIGINT)
    wait_until(lambda: first.pid is None, "the worker to end")
    assert read(store, identity)["state"] == "done"


def test_threads_that_wait_for_a_wake_up_do_not_keep_a_worker_from_ending(store: Store, start: Start) -> None:
    patient = start("patient")
    ids = enqueue(store, new_job("nothing"))
    wait_until(lambda: all_done(store, ids), "the worker to be at work")
    assert patient.pid is not None
    os.kill(patient.pid, signal.SIGINT)
    wait_until(lambda: patient.pid is None, "the worker to end")


def test_emptying_redis_at_any_time_loses_nothing(store: Store, start: Start, own_redis: RedisServer) -> None:
    start("scheduler")
    start("worker")
    ids = enqueue(store, new_job("nothing"))
    wait_until(lambda: all_done(store, ids), "the worker to be at work")
    with Redis.from_url(own_redis.url) as redis:
        for _ in range(30):
            ids += enqueue(store, *(new_job("nothing", tenant=f"ten_{number}") for number in range(5)))
            redis.flushall()
            time.sleep(0.02)
    wait_until(lambda: all_done(store, ids), "all jobs to be done")
    assert store.db.effects.count_documents({}) == len(ids)


def test_jobs_go_on_after_redis_was_killed(store: Store, start: Start, own_redis: RedisServer) -> None:
    start("scheduler")
    start("worker")
    before = enqueue(store, *(new_job("nothing") for _ in range(5)))
    wait_until(lambda: all_done(store, before), "the first jobs")
    own_redis.kill()
    during = enqueue(store, *(new_job("nothing") for _ in range(5)))
    own_redis.start()
    wait_until(lambda: all_done(store, during), "jobs that came while Redis was away")


def test_an_enqueue_that_dies_between_commit_and_wake_up_finishes(
    store: Store, start: Start, environment: dict[str, str]
) -> None:
    start("scheduler")
    start("worker")
    identity = NewJob.derived_id("ten_a", "killed")
    answer = subprocess.run(
        [sys.executable, "-m", "tests.app.jobs.serve", "die", identity], env=environment, cwd=ROOT, timeout=120
    )
    assert answer.returncode == -signal.SIGKILL
    wait_until(lambda: all_done(store, [identity]), "the job that nobody was told of")


def test_periodic_and_urgent_work_is_done_by_the_workers_of_its_queue(store: Store, start: Start) -> None:
    """Two schedulers make the night's job, once; it missed its minute long ago, and is caught up."""
    for process in ("scheduler", "scheduler", "worker:low", "worker:high"):
        start(process)
    [urgent] = enqueue(store, new_job("nothing", queue=Queue.HIGH))
    wait_until(lambda: all_done(store, [urgent]), "the urgent job")
    nightly = {"queue": "low", "kind": "nothing", "tenant": "quern"}
    wait_until(lambda: store.db.jobs.count_documents({**nightly, "state": "done"}) == 1, "the periodic job")
    assert store.db.jobs.count_documents(nightly) == 1
    assert store.db.effects.count_documents({}) == 2
    assert capacity.of(store.db, "low") > 0


def test_a_worker_in_a_flood_of_one_tenant_comes_to_another_after_a_few_jobs(store: Store, start: Start) -> None:
    """Four at a time: ahead of the single one are those that were claimed when it came, and few turns."""
    flood = [new_job("nap", tenant="ten_flood", payload={"seconds": 0.05}) for _ in range(10_000)]
    enqueue(store, *flood)
    start("worker")
    wait_until(lambda: store.db.effects.estimated_document_count() > 20, "the worker to be in the flood")
    [single] = enqueue(store, new_job("nap", tenant="ten_single", payload={"seconds": 0.05}))
    came = clock.now()
    wait_until(lambda: store.db.effects.find_one({"job": single}) is not None, "the other tenant's job")
    done = store.db.effects.find_one({"job": single})
    assert done is not None
    ahead = store.db.effects.count_documents({"at": {"$gt": came, "$lt": done["at"]}})
    assert ahead <= 3 * CONCURRENCY[Queue.DEFAULT]


def test_a_worker_says_how_much_it_does_at_once(store: Store, start: Start) -> None:
    start("worker")
    wait_until(lambda: capacity.of(store.db, "default") == 4, "the worker to announce itself")


def test_a_worker_that_was_stopped_while_it_started_ends(start: Start) -> None:
    process = start("stopped")
    wait_until(lambda: process.pid is None, "the worker to end")
