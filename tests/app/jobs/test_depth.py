"""How many jobs stand where: right, and without looking at the ended ones, which are most of the collection."""

from datetime import timedelta
from typing import Any

from quern.jobs import queue
from quern.jobs.handler import Registry
from quern.jobs.model import COUNTED_BY, Queue, State
from quern.store import clock
from quern.store.connection import Store
from tests.app.jobs.making import enqueue, new_job, read


def test_jobs_are_counted_by_queue_and_state(store: Store) -> None:
    enqueue(store, new_job(), new_job(queue=Queue.LOW), new_job(state=State.BLOCKED), new_job(state=State.SKIPPED))
    claimed = queue.claim(store.db, "low", 60)
    assert claimed is not None
    enqueue(store, new_job(queue=Queue.LOW))
    counts = queue.depth(store.db)
    assert counts["default"] == {"queued": 1, "blocked": 1}
    assert counts["low"] == {"queued": 1, "running": 1}
    assert counts["batched"] == {}
    queue.settle(store, Registry(), claimed, State.DEAD, error="because")
    assert queue.depth(store.db)["low"] == {"queued": 1, "dead": 1}


def test_counting_looks_at_no_job_that_is_done(store: Store) -> None:
    for _ in range(20):
        enqueue(store, new_job())
        job = queue.claim(store.db, "default", 60)
        assert job is not None
        queue.settle(store, Registry(), job, State.DONE)
    enqueue(store, new_job(), new_job(state=State.BLOCKED))
    examined = 0
    for state, index in COUNTED_BY.items():
        command: dict[str, Any] = {
            "aggregate": "jobs",
            "pipeline": [{"$match": {"state": state.value}}, {"$group": {"_id": "$queue", "n": {"$sum": 1}}}],
            "hint": index,
            "cursor": {},
        }
        plan = store.db.command("explain", command, verbosity="executionStats")
        stats = plan.get("executionStats") or plan["stages"][0]["$cursor"]["executionStats"]
        examined += stats["totalDocsExamined"]
    assert examined <= 2


def test_what_never_ran_is_forgotten_too(store: Store) -> None:
    (skipped,) = enqueue(store, new_job(state=State.SKIPPED))
    assert read(store, skipped)["forget"] > clock.now()


def test_a_step_that_comes_back_with_a_replay_is_not_killed_by_its_old_deadline(store: Store) -> None:
    past = clock.now() - timedelta(hours=1)
    (skipped,) = enqueue(store, new_job(state=State.SKIPPED, deadline=past))
    (blocked,) = enqueue(store, new_job(state=State.BLOCKED, deadline=past))
    queue.transact(store, lambda session: queue._unblock(store.db, [skipped, blocked], session))
    assert read(store, skipped)["state"] == "queued"
    assert "deadline" not in read(store, skipped)
    assert read(store, blocked)["deadline"] == past
