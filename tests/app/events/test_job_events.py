"""What a client that follows a job can rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quern.store import identifier

if TYPE_CHECKING:
    from pymongo.database import Database

    from tests.app.events.conftest import Answer, Jobs, Start


def numbers(answer: Answer) -> list[int]:
    return [event.id for event in answer.rest()]


def test_a_stream_sends_the_log_then_follows_to_the_end(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "running")
    stream = server.follow(job)
    assert stream.status == 200
    assert stream.headers["Content-Type"] == "text/event-stream"
    assert [stream.next().type, stream.next().type] == ["queued", "running"]  # type: ignore[union-attr]

    jobs.append(job, 3, "progress", share=0.5, note="line one\nline two\r\nünï")
    third = stream.next()
    assert third is not None
    assert (third.id, third.type) == (3, "progress")
    assert third.data["data"] == {"share": 0.5, "note": "line one\nline two\r\nünï"}
    assert third.data["at"].endswith("Z")

    jobs.append(job, 4, "done", state="done")
    last = stream.next()
    assert last is not None and (last.id, last.type) == (4, "done")
    assert stream.next() is None
    assert stream.retry == 2000


def test_every_end_of_a_job_ends_its_stream(start: Start, jobs: Jobs) -> None:
    server = start()
    for end in ("done", "dead", "cancelled", "skipped"):
        assert numbers(server.follow(jobs.new("ten_anna", "queued", end))) == [1, 2]


def test_a_client_resumes_after_the_event_that_it_saw_last(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "running", "retry", "running", "done")
    assert numbers(server.follow(job, Last_Event_ID="2")) == [3, 4, 5]
    assert numbers(server.follow(job, Last_Event_ID="0")) == [1, 2, 3, 4, 5]
    assert numbers(server.ask(f"/api/v1/jobs/{job}/events?last_event_id=3")) == [4, 5]
    # A browser repeats its first URL for ever; what it saw since stands in the header.
    assert numbers(server.ask(f"/api/v1/jobs/{job}/events?last_event_id=1", Last_Event_ID="4")) == [5]


def test_a_client_that_saw_the_end_is_told_not_to_come_back(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "done")
    assert server.follow(job, Last_Event_ID="1").status == 200
    assert server.follow(job, Last_Event_ID="2").status == 204


def test_a_job_that_was_replayed_is_followed_beyond_its_first_end(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "running", "dead", "replayed")
    stream = server.follow(job)
    assert [stream.next().id for _ in range(4)] == [1, 2, 3, 4]  # type: ignore[union-attr]
    jobs.append(job, 5, "done", state="done")
    assert numbers(stream) == [5]


def test_a_job_that_is_erased_ends_its_stream(start: Start, jobs: Jobs, mongo_db: Database[dict[str, Any]]) -> None:
    server, job = start(), jobs.new()
    stream = server.follow(job)
    assert stream.next() is not None
    mongo_db.jobs.delete_one({"_id": job})
    assert stream.next() is None
    assert server.follow(job).status == 404


def test_another_tenants_job_is_not_there(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "done")
    assert server.follow(job, "anna").status == 200
    stranger = server.follow(job, "bert")
    nobody = server.follow(identifier.new("job"), "bert")
    assert stranger.status == nobody.status == 404
    told, untold = stranger.problem(), nobody.problem()
    assert told.pop("request_id") != untold.pop("request_id")
    assert told == untold


def test_what_is_no_job_identifier_is_not_there(start: Start) -> None:
    server = start()
    for job in ("job_", "daily:2026", "%24where", "x" * 3000, "job_%00" + "a" * 25, "%ff"):
        answer = server.follow(job)
        assert answer.status == 404
        answer.problem()


def test_a_caller_without_a_good_key_or_the_scope_is_refused(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "done")
    assert server.follow(job, "anna").status == 200
    for key in (None, "wrong", "anna x"):
        answer = server.follow(job, key)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        answer.problem()
    answer = server.follow(job, "form")
    assert answer.status == 403
    assert "jobs:read" in answer.problem()["detail"]


def test_a_last_event_id_that_no_event_has_is_a_clear_error(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "done")
    for number in ("-1", "1.5", "abc", "9" * 16, "1" * 400, "²", "1 2"):
        answer = server.follow(job, Last_Event_ID=number)
        assert answer.status == 400
        assert "Last-Event-ID" in answer.problem()["detail"]


def test_other_methods_are_answered_without_a_stream(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new()
    target = f"/api/v1/jobs/{job}/events"
    head = server.ask(target, method="HEAD")
    assert (head.status, head.headers["Content-Type"], head.text()) == (200, "text/event-stream", "")
    post = server.ask(target, method="POST")
    assert post.status == 405
    assert "GET" in post.headers["Allow"]
    post.problem()


def test_a_request_keeps_its_identifier_or_gets_one(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "done")
    assert server.follow(job, X_Request_ID="abc-1").headers["X-Request-ID"] == "abc-1"
    assert server.follow(job, X_Request_ID='a"b').headers["X-Request-ID"].startswith("req_")
