"""Erasure: the person's words vanish wherever they went, whatever runs at that moment, and the log says so."""

import threading
from typing import Any

from quern.audit import chain
from quern.embedded.receiver import Answer, Receiver
from quern.embedded.smtp_sink import SmtpSink
from quern.jobs import queue, turns
from quern.jobs.model import Queue, State
from quern.jobs.worker import Worker
from quern.responses import response as responses
from quern.workflows import relay, run
from quern.workflows.definition import parsed
from tests.app.workflows.course import TENANT, Course, email, webhook

WORDS = "Zarathustra spoke of his knee"


def seal(course: Course) -> chain.Verification:
    key = chain.KeyRing(course.runtime.settings.required("audit_key"))
    while chain.seal_pending(course.db, key):
        pass
    return chain.verify(course.db, key)


def test_nothing_of_a_persons_words_is_left_in_the_database(
    course: Course, receiver: Receiver, smtp_sink: SmtpSink
) -> None:
    """Even where a receiver quoted them in its refusal, and a job failed because of them."""
    receiver.script(Answer(status=500, body=f"cannot take {WORDS}".encode()))
    form = course.publish(
        email("mail", to={"field": "email"}), webhook("hook", course.endpoint()), email("late", needs=["hook"])
    )
    response = course.submit(form, key="k", comment=WORDS, email="zara@example.org")
    course.work()
    assert b"Zarathustra" in course.everything()
    assert course.db.webhook_deliveries.count_documents({"excerpt": {"$regex": "Zarathustra"}}) == 1
    assert course.erase(response) is True
    left = course.everything()
    assert b"Zarathustra" not in left
    assert b"zara@" not in left
    document = course.response(response)
    assert document.keys() == {"_id", "tenant", "form", "version", "created", "status", "erased"}
    # A dead one is cancelled: it could not be replayed, and would be alarmed on for ever.
    assert {job["state"] for job in course.db.jobs.find({"subject": response})} <= {"done", "cancelled"}
    assert course.db.jobs.count_documents({"subject": response, "forget": {"$exists": False}}) == 0


def test_the_chain_holds_after_an_erasure_and_says_that_it_happened(course: Course) -> None:
    form = course.publish(email("mail"))
    kept, gone = course.submit(form, comment="keep me"), course.submit(form, comment=WORDS)
    course.work()
    before = seal(course)
    assert (before.problems, before.contents_checked) == ([], 2)
    course.erase(gone)
    after = seal(course)
    assert after.problems == []
    assert (after.contents_checked, after.contents_erased) == (1, 1)
    assert course.db.audit.count_documents({"subject": gone, "action": "response.erased"}) == 1
    assert course.response(kept)["answers"] == {"comment": "keep me"}


def test_erasing_again_is_no_error_and_no_second_entry(course: Course) -> None:
    response = course.submit(course.publish(email("mail")), comment=WORDS)
    assert course.erase(response) is True
    assert course.erase(response) is False
    assert course.db.audit.count_documents({"action": "response.erased"}) == 1


def test_another_tenants_response_is_not_erased(course: Course) -> None:
    response = course.submit(course.publish(email("mail")), comment=WORDS)

    def work(session: Any) -> bool | None:
        return responses.erase(course.db, "ten_other", response, "key", None, session)

    assert queue.transact(course.runtime.store, work) is None
    assert course.response(response)["answers"] == {"comment": WORDS}


def test_an_erased_response_that_was_never_relayed_is_still_in_the_log(course: Course, smtp_sink: SmtpSink) -> None:
    response = course.submit(course.publish(email("mail")), comment=WORDS)
    course.erase(response)
    course.work()
    actions = {entry["action"] for entry in course.db.audit.find({"subject": response})}
    assert actions == {"response.submitted", "response.erased"}
    assert smtp_sink.messages == []
    assert seal(course).problems == []


def test_a_relay_that_held_the_outbox_makes_no_job_after_the_erasure(course: Course, smtp_sink: SmtpSink) -> None:
    """It read the response, then the response was erased, then it writes the jobs."""
    response = course.submit(course.publish(email("mail"), email("more", needs=["mail"])), comment=WORDS)
    held = course.response(response)
    version = course.runtime.versions.get(course.db, TENANT, held["form"], 1)
    assert version is not None
    course.erase(response)
    turns.open_many(course.db, queue.insert(course.db, run.jobs(parsed(version.workflow), held)))
    course.work()
    assert {job["state"] for job in course.db.jobs.find({"subject": response})} == {"cancelled"}
    assert course.db.jobs.count_documents({}) == 2
    assert smtp_sink.messages == []


def test_a_step_that_runs_during_the_erasure_writes_nothing(course: Course, receiver: Receiver) -> None:
    receiver.script(Answer(status=500, body=f"no {WORDS}".encode(), delay=1.5))
    response = course.submit(course.publish(webhook("hook", course.endpoint())), comment=WORDS)
    course.relay()
    running = threading.Thread(target=course.work, daemon=True)
    running.start()
    receiver.wait_for(lambda _: True)
    course.erase(response)
    running.join(60)
    assert b"Zarathustra" not in course.everything()
    assert course.job(response, "hook")["state"] == "cancelled"
    assert "results" not in course.response(response)


def test_a_job_that_finds_its_response_erased_is_cancelled_and_not_dead(course: Course) -> None:
    """What is listed and alarmed on as dead is what somebody can mend."""
    response = course.submit(course.publish(email("mail")), comment=WORDS)
    course.relay()
    course.db.responses.update_one({"_id": response}, {"$set": {"erased": True}, "$unset": {"answers": ""}})
    course.work()
    assert course.job(response, "mail")["state"] == "cancelled"


def test_a_claimed_job_of_an_erased_response_cannot_be_settled(course: Course) -> None:
    response = course.submit(course.publish(email("mail")), comment=WORDS)
    course.relay()
    job = queue.claim(course.db, "default", 60)
    assert job is not None
    course.erase(response)
    try:
        queue.settle(course.runtime.store, course.runtime.registry, job, State.DONE, result={"text": WORDS})
    except queue.LeaseLostError:
        pass
    else:
        raise AssertionError("the lease went with the response")
    assert b"Zarathustra" not in course.everything()


def test_erasing_ends_the_jobs_streams(course: Course) -> None:
    response = course.submit(course.publish(email("mail")), comment=WORDS)
    course.relay()
    course.erase(response)
    assert [entry["type"] for entry in course.job(response, "mail")["log"]] == ["queued", "cancelled"]


def test_several_relays_and_an_erasure_at_once_leave_no_job_waiting(course: Course) -> None:
    form = course.publish(email("mail"), email("more", needs=["mail"]))
    ids = [course.submit(form, comment=WORDS) for _ in range(30)]
    store, versions, waker = course.runtime.store, course.runtime.versions, course.runtime.waker
    threads = [threading.Thread(target=relay.drain, args=(store, versions, waker)) for _ in range(3)]
    threads += [threading.Thread(target=lambda: [course.erase(response) for response in ids[::2]])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    worker = Worker(store, course.runtime.registry, waker, Queue.DEFAULT)
    course.relay()
    worker.drain()
    erased = {job["state"] for job in course.db.jobs.find({"subject": {"$in": ids[::2]}})}
    assert erased <= {"cancelled", "done"}
    assert course.db.jobs.count_documents({"state": {"$in": ["blocked", "queued", "running"]}}) == 0
    assert course.db.jobs.count_documents({}) == 60
