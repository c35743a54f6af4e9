"""Every job of a tenant comes into `fact_job`, also what changes after its response; what still moves is no fault."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from quern.analytics import integrity
from quern.analytics.answer import Warehouse
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.etl import MismatchError
from quern.analytics.flatten import job_rows
from quern.analytics.follow import head
from quern.analytics.question import Question
from quern.audit.entry import entry
from quern.jobs import queue, turns
from quern.jobs.handler import Registry
from quern.jobs.model import Job, NewJob, Queue, State
from quern.openai.ledger import Asked
from quern.store import clock, identifier
from quern.store.connection import Document, Store
from quern.webhooks import TEST_KIND
from quern.webhooks.handler import resend
from tests.app.analytics.desk import RESULTS, Desk, moment, yesterday

DAY = "2026-03-07"


def _put(desk: Desk, job: NewJob, created: datetime | None = None) -> str:
    turns.open_many(desk.db, queue.insert(desk.db, [job]))
    if created is not None:
        desk.db.jobs.update_one({"_id": job.id}, {"$set": {"created": created}})
    return job.id


def _claim(desk: Desk, name: Queue) -> Job:
    job = queue.claim(desk.db, name, 60)
    assert job is not None
    return job


def _end(store: Store, job: Job, state: State = State.DONE) -> None:
    queue.settle(store, Registry([]), job, state)


def _ask(desk: Desk) -> NewJob:
    """The job that a request to /v1/chat/completions makes."""
    return Asked(identifier.new("air"), desk.tenant, "key_desk", "chat", clock.now(), {}, 1).job()


def _row(desk: Desk, job: str) -> dict[str, Any]:
    (found,) = desk.rows("fact_job", f"job = '{job}'")
    return found


def _processed(desk: Desk, day: str = DAY) -> tuple[str, Document]:
    """A response that has ended with all its jobs, and one of these."""
    response = desk.submit(moment(day), {"code": "a"})
    desk.db.jobs.update_many({"subject": response}, {"$set": {"state": "done", "ended": clock.now()}})
    desk.finish(response, RESULTS)
    job = desk.db.jobs.find_one({"subject": response})
    assert job is not None
    return response, job


def _resend(desk: Desk, of: Document) -> str:
    return _put(desk, resend(of, "whd_1 run_1", request_id="req_1", traceparent="00-0"))


def test_a_delivery_that_is_sent_again_comes_into_its_responses_day(desk: Desk, store: Store) -> None:
    response, job = _processed(desk)
    desk.run()
    again = _resend(desk, job)
    assert desk.run().days == 1
    assert desk.holds()
    assert (_row(desk, again)["response"], _row(desk, again)["state"]) == (response, "queued")
    claimed = _claim(desk, Queue.WEBHOOKS)
    assert queue.put_back(desk.db, claimed, after=0, reason="503", charged=True)
    # It is tried again, which is nothing that differs.
    assert desk.run().outcome == "unchanged"
    assert desk.holds()
    turns.open_many(desk.db, [("webhooks", claimed.priority, desk.tenant, clock.now())])
    _end(store, _claim(desk, Queue.WEBHOOKS))
    assert integrity.verify(desk.db, desk.manifest).holds
    assert desk.run().days == 1
    assert (_row(desk, again)["state"], _row(desk, again)["attempts"]) == ("done", 2)
    assert desk.holds()
    assert desk.run().outcome == "unchanged"


def test_a_dead_job_that_is_replayed_and_dies_again_is_counted_so(desk: Desk, store: Store) -> None:
    _, job = _processed(desk)
    again = _resend(desk, job)
    _end(store, _claim(desk, Queue.WEBHOOKS), State.DEAD)
    desk.run()
    assert _row(desk, again)["attempts"] == 1
    queue.replay(store, desk.tenant, again)
    _end(store, _claim(desk, Queue.WEBHOOKS), State.DEAD)
    assert desk.run().days == 1
    assert (_row(desk, again)["state"], _row(desk, again)["attempts"]) == ("dead", 2)
    assert desk.holds()


def test_a_retry_that_waits_is_not_taken_for_a_difference(desk: Desk) -> None:
    response = desk.submit(moment(DAY), {"code": "a"})
    desk.run()
    desk.db.jobs.update_many({"subject": response}, {"$inc": {"attempt": 3, "failures": 3}})
    assert desk.run().outcome == "unchanged"
    assert desk.holds()


def test_attempts_of_an_ended_job_that_differ_are_named(desk: Desk) -> None:
    _, job = _processed(desk)
    desk.run()
    desk.db.jobs.update_one({"_id": job["_id"]}, {"$inc": {"attempt": 1}})
    found = integrity.verify(desk.db, desk.manifest)
    (finding,) = found.findings
    assert f"job {job['_id']} differs" in finding.problems


def test_a_job_that_is_left_out_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit(moment(DAY), {"code": "a"})
    left_out: list[str] = []

    def careless(jobs: list[Document], responses: dict[str, Document]) -> Any:
        left_out.append(jobs[0]["_id"])
        return job_rows(jobs[1:], responses)

    monkeypatch.setattr("quern.analytics.build.job_rows", careless)
    with pytest.raises(MismatchError) as caught:
        desk.run()
    assert f"job {left_out[0]} is missing in the warehouse" in " ".join(caught.value.report.problems)


def test_what_a_chat_completion_costs_is_in_the_measures_by_tenant(desk: Desk, store: Store) -> None:
    desk.submit(moment(yesterday()), {"code": "a"})
    desk.run()
    chat = _put(desk, _ask(desk))
    # The response's own day is left alone.
    assert desk.run().days == 1
    assert (_row(desk, chat)["response"], _row(desk, chat)["day"]) == (None, clock.now().date())
    claimed = _claim(desk, Queue.HIGH)
    _end(store, claimed)
    ended = desk.db.jobs.find_one({"_id": chat})
    assert ended is not None
    assert desk.run().days == 1
    assert desk.holds()
    began, over = (next(entry["at"] for entry in ended["log"] if entry["type"] == kind) for kind in ("running", "done"))
    engine = DuckDbEngine(desk.root / "warehouse", threads=1, memory_megabytes=300)
    warehouse = Warehouse(desk.root / "warehouse", engine, seconds=60)
    question = Question.model_validate(
        {
            "measure": "job_run",
            "dimensions": ["tenant", "queue", "kind"],
            "statistics": ["count", "sum"],
            "filters": [{"dimension": "queue", "values": ["batched", "high"]}],
        }
    )
    rows = warehouse.answer(question, None).table.to_pylist()
    assert [(row["tenant"], row["queue"], row["kind"], row["count"]) for row in rows] == [
        (desk.tenant, "high", "openai_chat", 1)
    ]
    assert rows[0]["sum"] == pytest.approx((over - began).total_seconds())
    engine.close()


def test_jobs_without_a_response_come_by_the_day_on_which_they_were_made(desk: Desk) -> None:
    for day, kind in ((DAY, TEST_KIND), ("2026-03-09", "forget"), ("2026-03-09", "openai_notice")):
        job = NewJob(identifier.new("job"), desk.tenant, Queue.LOW, kind)
        _put(desk, job, moment(day))
    # The service's own are nobody's.
    _put(desk, NewJob(identifier.new("job"), "quern", Queue.LOW, "analytics.prune"), moment(DAY))
    desk.run()
    assert sorted((str(row["day"]), row["kind"]) for row in desk.rows("fact_job")) == [
        (DAY, TEST_KIND),
        ("2026-03-09", "forget"),
        ("2026-03-09", "openai_notice"),
    ]
    assert desk.manifest.tenants == [desk.tenant]
    assert desk.holds()
    assert desk.run().outcome == "unchanged"


def test_a_job_without_a_response_that_is_lost_is_noticed(desk: Desk) -> None:
    _put(desk, _ask(desk), moment(DAY))
    desk.run()
    lost = _put(desk, _ask(desk), moment(DAY))
    # Behind the ETL's back, as if the stream had not told of it.
    desk.go_on_from(head(desk.db))
    (finding,) = integrity.verify(desk.db, desk.manifest).findings
    assert f"job {lost} is missing in the warehouse" in finding.problems


def test_jobs_without_a_response_stay_after_mongodb_has_forgotten_them(desk: Desk) -> None:
    kept, other = (_put(desk, _ask(desk), moment(DAY)) for _ in range(2))
    desk.run()
    desk.db.jobs.delete_one({"_id": kept})
    # The day is rewritten for another's sake.
    desk.submit(moment(DAY), {"code": "a"})
    desk.run()
    assert {row["job"] for row in desk.rows("fact_job", "response IS NULL")} == {kept, other}
    assert desk.holds()


def test_after_a_lost_token_jobs_that_were_made_or_replayed_since_are_found(desk: Desk, store: Store) -> None:
    _, job = _processed(desk)
    again = _resend(desk, job)
    _end(store, _claim(desk, Queue.WEBHOOKS), State.DEAD)
    desk.run()
    queue.replay(store, desk.tenant, again)
    _end(store, _claim(desk, Queue.WEBHOOKS))
    chat = _put(desk, _ask(desk), datetime.now(UTC) - timedelta(days=1))
    desk.db.audit.insert_one(entry(desk.tenant, "operator", "job.replayed", again))
    desk.lose_the_token()
    report = desk.run()
    assert any("rewritten instead" in line for line in report.said)
    assert _row(desk, again)["state"] == "done"
    assert _row(desk, chat)["kind"] == "openai_chat"
    assert desk.holds()
