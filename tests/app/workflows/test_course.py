"""A response's course with real mail and webhooks: a failed step loses nothing of the others, and everything ends."""

import threading
import time
from datetime import timedelta
from pathlib import Path

import orjson
import pytest
from pydantic import SecretStr
from pymongo import UpdateOne
from pymongo.errors import PyMongoError

from quern.config import LiveSettings, Settings
from quern.embedded.mongod import Mongod
from quern.embedded.receiver import Answer, Receiver
from quern.embedded.smtp_sink import SmtpSink
from quern.jobs import queue, reconciler, turns
from quern.jobs.model import Queue
from quern.jobs.worker import Worker
from quern.migrations import migrate
from quern.store import clock
from quern.store.connection import Db, Document, Store
from quern.webhooks.handler import resend
from quern.workflows import outbox, relay
from quern.workflows.replay import replay
from tests.app.workflows.course import TENANT, Course, email, webhook


def test_the_relay_makes_a_job_for_each_step_and_one_audit_entry(course: Course) -> None:
    response = course.submit(course.publish(email("one"), email("two", needs=["one"])), comment="hi")
    course.relay()
    assert course.job(response, "one")["state"] == "queued"
    assert course.job(response, "two")["state"] == "blocked"
    assert course.job(response, "one")["request_id"] == "req_course"
    assert "outbox" not in course.response(response)
    assert [entry["action"] for entry in course.db.audit.find({"subject": response})] == ["response.submitted"]


def test_relaying_twice_makes_nothing_twice(course: Course) -> None:
    """A relay that died before it cleared the outbox, and the next one."""
    response = course.submit(course.publish(email("one")), comment="hi")
    outbox = course.response(response)["outbox"]
    course.relay()
    course.work()
    course.db.responses.update_one({"_id": response}, {"$set": {"outbox": outbox}})
    course.work()
    assert course.db.jobs.count_documents({}) == 1
    assert course.job(response, "one")["attempt"] == 1
    assert course.db.audit.count_documents({"subject": response, "action": "response.submitted"}) == 1


def test_an_outbox_is_never_cleared_without_its_jobs_though_mongod_is_killed_between(
    settings: Settings,
    smtp_sink: SmtpSink,
    receiver: Receiver,
    run_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver repeats the clearing on the next mongod, which has of the first one what its journal had."""
    with Mongod(run_directory / "db") as mortal:
        own = settings.model_copy(update={"mongodb_uri": SecretStr(mortal.uri)})
        migrate(Store(LiveSettings(own)).db)
        course = Course(own, smtp_sink, receiver)
        form = course.publish(email("one"), email("two", needs=["one"]))
        clear = relay._clear

        def clear_after_a_crash(db: Db, done: list[UpdateOne]) -> None:
            mortal.kill()
            mortal.start()
            clear(db, done)

        monkeypatch.setattr(relay, "_clear", clear_after_a_crash)
        for _ in range(3):
            response = course.submit(form, comment="hi")
            try:
                relay.drain(course.runtime.store, course.runtime.versions, course.runtime.waker)
            except PyMongoError:
                # Then it is all done again, as the relay's loop does.
                continue
            jobs = course.db.jobs.count_documents({"subject": response})
            entries = course.db.audit.count_documents({"subject": response})
            assert (jobs, entries) == (2, 1) or "outbox" in course.response(response)
        monkeypatch.setattr(relay, "_clear", clear)
        course.relay()
        assert course.db.jobs.count_documents({}) == 6
        assert course.db.responses.count_documents({"outbox": {"$exists": True}}) == 0


def test_an_outbox_that_cannot_be_relayed_holds_up_no_other(course: Course) -> None:
    form = course.publish(email("one"))
    poisoned = course.submit(form, comment="broken")
    course.db.responses.update_one({"_id": poisoned}, {"$set": {"version": 99}})
    sound = course.submit(form, comment="sound")
    course.relay()
    assert course.job(sound, "one")["state"] == "queued"
    document = course.response(poisoned)
    assert "outbox" not in document
    assert "unrelayed" in document, "it is kept, for whoever mends what is wrong with it"
    assert [row["_id"] for row in outbox.unrelayed(course.db, 10)] == [poisoned]
    course.db.responses.update_one({"_id": poisoned}, {"$set": {"version": 1}})
    assert outbox.bring_back(course.db, [sound]) == 0
    assert outbox.bring_back(course.db) == 1
    course.work()
    assert course.response(poisoned)["status"] == "processed"
    assert outbox.count_unrelayed(course.db) == 0


def test_a_relay_that_starts_tries_again_what_was_set_aside(course: Course) -> None:
    response = course.submit(course.publish(email("one")), comment="broken")
    course.db.responses.update_one({"_id": response}, {"$set": {"version": 99}})
    course.relay()
    course.db.responses.update_one({"_id": response}, {"$set": {"version": 1}})
    stop = threading.Event()
    process = threading.Thread(target=relay.main, args=(course.runtime.store, course.runtime.waker, stop))
    process.start()
    try:
        limit = time.monotonic() + 60
        while course.db.jobs.find_one({"subject": response}) is None:
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        stop.set()
        process.join()


def test_a_replayed_step_puts_its_response_under_way_again(course: Course, receiver: Receiver) -> None:
    receiver.script(Answer(status=410))
    response = course.submit(course.publish(webhook("hook", course.endpoint())), comment="x")
    course.work()
    assert (course.response(response)["status"], course.job(response, "hook")["state"]) == ("incomplete", "dead")
    course.db.webhook_endpoints.update_many({}, {"$set": {"enabled": True, "disabled_reason": None}})
    job = course.job(response, "hook")["_id"]
    queue.transact(course.runtime.store, lambda session: replay(course.runtime.store, TENANT, job, session))
    document = course.response(response)
    assert (document["status"], document["steps"]) == ("processing", {"hook": "queued"})
    assert "processed" not in document
    turns.open_many(course.db, queue.opening(course.job(response, "hook")))
    course.work()
    assert course.response(response)["status"] == "processed"


def test_one_message_has_one_content_however_often_it_is_sent(course: Course, receiver: Receiver) -> None:
    """Also when another step ended between two attempts, and when it is sent once more afterwards."""
    receiver.script(Answer(status=500))
    form = course.publish(webhook("hook", course.endpoint()), email("mail", to={"field": "email"}))
    response = course.submit(form, comment="x", email="a@example.org")
    course.relay()
    Worker(course.runtime.store, course.runtime.registry, course.runtime.waker, Queue.WEBHOOKS).drain()
    course.work()
    assert course.response(response)["steps"] == {"hook": "queued", "mail": "done"}
    course.make_due()
    course.work()
    again = resend(course.job(response, "hook"), "once more", request_id="req_2", traceparent="00-0-0-01")
    turns.open_many(course.db, queue.insert(course.db, [again]))
    course.work()
    sent = [(request.headers["webhook-id"], request.body) for request in receiver.requests]
    assert len(sent) == 3
    assert len(set(sent)) == 1


def test_a_response_that_is_locked_holds_up_no_other(course: Course) -> None:
    form = course.publish(email("one"))
    stuck, free = course.submit(form, comment="stuck"), course.submit(form, comment="free")
    with course.runtime.store.client.start_session() as session:
        session.start_transaction()
        course.db.responses.update_one({"_id": stuck}, {"$set": {"touched": True}}, session=session)
        relay.drain(course.runtime.store, course.runtime.versions, course.runtime.waker)
        assert "outbox" not in course.response(free)
        assert "outbox" in course.response(stuck)
        assert course.job(stuck, "one")["state"] == "queued"
        session.abort_transaction()
    course.relay()
    assert "outbox" not in course.response(stuck)


def test_all_steps_done_makes_a_response_processed(course: Course, smtp_sink: SmtpSink, receiver: Receiver) -> None:
    form = course.publish(email("mail"), webhook("hook", course.endpoint(), needs=["mail"]))
    response = course.submit(form, comment="hello")
    course.work()
    document = course.response(response)
    assert (document["status"], document["steps"]) == ("processed", {"mail": "done", "hook": "done"})
    assert document["results"].keys() == {"mail", "hook"}
    assert course.db.audit.count_documents({"subject": response, "action": "response.processed"}) == 1
    assert len(smtp_sink.messages) == 1
    [request] = receiver.requests
    assert orjson.loads(request.body)["data"]["results"]["mail"]["sent"] is True


def test_a_failed_step_never_loses_the_others_results(course: Course, smtp_sink: SmtpSink, receiver: Receiver) -> None:
    form = course.publish(
        email("good"),
        email("bad", subject="{{ answers.nobody.knows }}"),
        email("after_bad", needs=["bad"]),
        webhook("hook", course.endpoint(), needs=["good", "bad", "after_bad"], after_failure="run"),
    )
    response = course.submit(form, comment="hello")
    course.work()
    document = course.response(response)
    assert document["steps"] == {"good": "done", "bad": "dead", "after_bad": "skipped", "hook": "done"}
    assert document["status"] == "incomplete"
    assert document["results"]["good"]["sent"] is True
    [request] = receiver.requests
    data = orjson.loads(request.body)["data"]
    assert data["steps"] == {"good": "done", "bad": "dead", "after_bad": "skipped"}
    assert data["results"]["good"]["sent"] is True
    assert len(smtp_sink.messages) == 1


def test_replaying_a_dead_step_brings_back_what_was_skipped(course: Course, smtp_sink: SmtpSink) -> None:
    form = course.publish(email("first"), email("second", needs=["first"]))
    smtp_sink.refuse_next("550 5.1.1 Unknown")
    response = course.submit(form, comment="hello")
    course.work()
    assert course.response(response)["steps"] == {"first": "dead", "second": "skipped"}
    queue.replay(course.runtime.store, TENANT, course.job(response, "first")["_id"])
    course.work()
    assert course.response(response)["steps"] == {"first": "done", "second": "done"}
    assert course.response(response)["status"] == "processed"
    assert len(smtp_sink.messages) == 2


def test_a_step_whose_condition_does_not_hold_is_skipped(course: Course, smtp_sink: SmtpSink) -> None:
    when = {"path": "answers.comment", "op": "contains", "value": "refund"}
    form = course.publish(email("desk", when=when))
    calm, angry = course.submit(form, comment="all fine"), course.submit(form, comment="REFUND now")
    course.work()
    assert course.response(calm)["steps"] == {"desk": "skipped"}
    assert course.response(calm)["status"] == "processed"
    assert course.job(calm, "desk")["state"] == "skipped"
    assert course.response(angry)["steps"] == {"desk": "done"}
    assert len(smtp_sink.messages) == 1


def test_a_step_dies_at_its_deadline_and_the_others_go_on(course: Course) -> None:
    form = course.publish(email("slow", deadline_seconds=1), email("other"))
    response = course.submit(form, comment="hello")
    course.relay()
    course.db.jobs.update_one(
        {"_id": course.job(response, "slow")["_id"]}, {"$set": {"deadline": clock.now() - timedelta(seconds=1)}}
    )
    reconciler.expire(course.runtime.store, course.runtime.registry)
    course.work()
    assert course.response(response)["steps"] == {"slow": "dead", "other": "done"}


def test_a_cancelled_step_skips_what_needs_it(course: Course) -> None:
    form = course.publish(email("first"), email("second", needs=["first"]), email("other"))
    response = course.submit(form, comment="hello")
    course.relay()
    queue.cancel(course.runtime.store, course.runtime.registry, TENANT, course.job(response, "first")["_id"])
    course.work()
    assert course.response(response)["steps"] == {"first": "cancelled", "second": "skipped", "other": "done"}
    assert course.response(response)["status"] == "incomplete"


def test_an_ai_step_waits_for_an_engine_that_is_away(course: Course) -> None:
    form = course.publish({"name": "mood", "type": "sentiment"}, email("other"))
    response = course.submit(form, comment="hello")
    course.relay()
    course.work([Queue.BATCHED, Queue.DEFAULT])
    job = course.job(response, "mood")
    assert (job["state"], job["failures"], job["error"]) == ("queued", 0, "the engine is away")
    assert course.response(response)["steps"] == {"mood": "queued", "other": "done"}
    assert course.response(response)["status"] == "processing"


def test_an_email_keeps_its_message_id_over_repetitions(course: Course, smtp_sink: SmtpSink) -> None:
    """A worker that was killed after the relay had accepted the message."""
    response = course.submit(course.publish(email("mail")), comment="hello")
    course.work()
    again: Document = {"state": "queued", "due": clock.now(), "wake": clock.now()}
    course.db.jobs.update_one({"_id": course.job(response, "mail")["_id"]}, {"$set": again})
    reconciler.reopen(course.runtime.store)
    course.work()
    first, second = (received.message["Message-ID"] for received in smtp_sink.messages)
    assert first == second
