"""What the process that holds waiting clients promises: bounds, drains, and nothing lost while MongoDB is killed."""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from quern.embedded.mongod import Mongod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pymongo.database import Database

    from tests.app.events.conftest import EventsServer, Jobs, Start

    Until = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def mortal(run_directory: Path) -> Iterator[Mongod]:
    """A mongod that the test may kill."""
    with Mongod(run_directory / "db") as server:
        yield server


def terminate(server: EventsServer) -> psutil.Process:
    process = psutil.Process(server.process.pid)
    process.send_signal(signal.SIGTERM)
    return process


def test_no_event_is_lost_or_repeated_while_mongod_is_killed(
    start: Start, mortal: Mongod, mongo_db: Database[dict[str, Any]], make_jobs: Callable[[Any], Jobs], until: Until
) -> None:
    server = start(mortal)
    events, followers = 40, 20
    with MongoClient[dict[str, Any]](mortal.uri, serverSelectionTimeoutMS=500) as client:
        jobs = make_jobs(client[mongo_db.name].jobs)
        job = jobs.new()
        streams = [server.follow(job) for _ in range(followers)]
        assert all(stream.next() for stream in streams)
        written = threading.Event()

        def work() -> None:
            for number in range(2, events + 1):
                end = number == events
                while True:
                    try:
                        jobs.append(job, number, "done" if end else "progress", state="done" if end else None)
                        break
                    except PyMongoError:
                        time.sleep(0.05)
                time.sleep(0.05)
            written.set()

        writer = threading.Thread(target=work, daemon=True)
        writer.start()
        dice = random.Random(7)
        for outlasts_the_drivers_patience in (False, True, False):
            assert not written.wait(dice.uniform(0.1, 0.5)), "the job ended before mongod was killed three times"
            mortal.kill()
            if outlasts_the_drivers_patience:
                until(lambda: server.metric("quern_event_hub_breaks_total") > 0)
            mortal.start()
        for stream in streams:
            assert [event.id for event in stream.rest()] == list(range(2, events + 1))
        writer.join()


def test_what_was_written_while_the_change_stream_was_broken_is_sent(
    start: Start, mortal: Mongod, mongo_db: Database[dict[str, Any]], make_jobs: Callable[[Any], Jobs], until: Until
) -> None:
    server = start(mortal)
    with MongoClient[dict[str, Any]](mortal.uri) as client:
        jobs = make_jobs(client[mongo_db.name].jobs)
        job = jobs.new()
        stream = server.follow(job)
        assert stream.next() is not None
        mortal.kill()
        until(lambda: server.metric("quern_event_hub_breaks_total") > 0)
        process = psutil.Process(server.process.pid)
        process.suspend()
        try:
            mortal.start()
            jobs.append(job, 2, "done", state="done")
        finally:
            process.resume()
        assert [event.id for event in stream.rest()] == [2]


def test_without_mongod_new_clients_are_told_to_come_back_and_old_ones_stay(
    start: Start, mortal: Mongod, mongo_db: Database[dict[str, Any]], make_jobs: Callable[[Any], Jobs], until: Until
) -> None:
    server = start(mortal, heartbeat=0.2)
    with MongoClient[dict[str, Any]](mortal.uri) as client:
        job = make_jobs(client[mongo_db.name].jobs).new()
        stream = server.follow(job)
        assert stream.next() is not None
        mortal.kill()
        until(lambda: server.ask("/readyz", None).status == 503)
        assert server.ask("/healthz", None).status == 200
        answer = server.follow(job)
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        answer.problem()
        stream.await_comment()

        mortal.start()
        until(lambda: server.ask("/readyz", None).status == 200)
        assert server.follow(job).status == 200
        make_jobs(client[mongo_db.name].jobs).append(job, 2, "done", state="done")
        assert [event.id for event in stream.rest()] == [2]


def test_a_dropped_collection_does_not_end_the_hub(
    start: Start, jobs: Jobs, mongo_db: Database[dict[str, Any]], until: Until
) -> None:
    server = start()
    mongo_db.create_collection("jobs")
    gone = server.follow(jobs.new())
    assert gone.next() is not None
    mongo_db.jobs.drop()
    assert gone.next() is None
    until(lambda: server.ask("/readyz", None).status == 200)
    job = jobs.new()
    stream = server.follow(job)
    assert stream.next() is not None
    jobs.append(job, 2, "done", state="done")
    assert [event.id for event in stream.rest()] == [2]


def test_200_clients_wait_and_each_gets_its_own(start: Start, jobs: Jobs, until: Until) -> None:
    server = start()
    followed = [jobs.new(owner, "queued") for owner in ["ten_anna"] * 60 + ["ten_bert"] * 40]
    streams = [
        (job, server.follow(job, "anna" if number < 60 else "bert"))
        for _ in range(2)
        for number, job in enumerate(followed)
    ]
    assert all(stream.status == 200 for _, stream in streams)
    assert server.metric("quern_event_streams") == 200
    assert server.metric("quern_event_jobs_watched") == 100
    for job in followed:
        jobs.append(job, 2, "done", state="done", mine=job)
    for job, stream in streams:
        got = stream.rest()
        assert [event.id for event in got] == [1, 2]
        assert got[1].data["data"] == {"mine": job}
    until(lambda: server.metric("quern_event_streams") == 0)
    assert server.metric("quern_event_jobs_watched") == 0


def test_silence_is_broken_by_comments(start: Start, jobs: Jobs) -> None:
    stream = start(heartbeat=0.1).follow(jobs.new())
    for _ in range(3):
        stream.await_comment()


def test_a_client_that_leaves_frees_its_place_and_its_job(start: Start, jobs: Jobs, until: Until) -> None:
    server = start()
    job = jobs.new()
    stays, leaves = server.follow(job), server.follow(job)
    other = server.follow(jobs.new())
    assert server.metric("quern_event_streams") == 3
    leaves.leave()
    until(lambda: server.metric("quern_event_streams") == 2)
    assert server.metric("quern_event_jobs_watched") == 2
    other.leave()
    until(lambda: server.metric("quern_event_jobs_watched") == 1)
    jobs.append(job, 2, "done", state="done")
    assert [event.id for event in stays.rest()] == [1, 2]


def test_a_client_that_leaves_before_it_is_answered_frees_its_place(start: Start, jobs: Jobs, until: Until) -> None:
    server, job = start(), jobs.new()
    for _ in range(50):
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(server.socket))
            head = f"GET /api/v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer anna\r\n\r\n"
            hasty.sendall(head.encode())
    until(lambda: server.metric("quern_event_streams") == 0 and server.metric("quern_event_jobs_watched") == 0)


def test_a_client_that_does_not_read_is_cut_off_and_holds_no_other_up(start: Start, jobs: Jobs, until: Until) -> None:
    # Longer than a busy machine may hold up the client that does read.
    server = start(send_timeout=5)
    # Far more than the kernel and the server buffer for one connection.
    job = jobs.new("ten_anna", *["progress"] * 80, padding="x" * 100_000)
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(str(server.socket))
        head = f"GET /api/v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer anna\r\n\r\n"
        stuck.sendall(head.encode())
        until(lambda: server.metric("quern_event_streams") == 1)
        reader = server.follow(job)
        assert [reader.next().id for _ in range(80)] == list(range(1, 81))  # type: ignore[union-attr]
        until(lambda: server.metric("quern_event_streams_cut_total") == 1)
        until(lambda: server.metric("quern_event_streams") == 1)
        # Its connection is gone as well, though the client still holds its own end; what is left is the reader's.
        until(lambda: server.sockets() == 1)
        jobs.append(job, 81, "done", state="done")
        assert [event.id for event in reader.rest()] == [81]


def test_a_full_process_and_a_full_tenant_refuse_clearly_and_recover(start: Start, jobs: Jobs, until: Until) -> None:
    server = start(max_streams=3, max_streams_per_tenant=2)
    annas, berts = jobs.new("ten_anna"), jobs.new("ten_bert")
    first, second = server.follow(annas), server.follow(annas)
    assert (first.status, second.status) == (200, 200)
    third = server.follow(annas)
    assert third.status == 429
    assert int(third.headers["Retry-After"]) > 0
    third.problem()

    fits = server.follow(berts, "bert")
    assert fits.status == 200
    full = server.follow(berts, "bert")
    assert full.status == 503
    assert int(full.headers["Retry-After"]) > 0
    full.problem()

    first.leave()
    until(lambda: server.metric("quern_event_streams") == 2)
    assert server.follow(annas).status == 200


def test_a_stopping_process_ends_its_streams_with_a_hint_and_the_next_one_resumes(start: Start, jobs: Jobs) -> None:
    server, job = start(), jobs.new("ten_anna", "queued", "running")
    streams = [server.follow(job) for _ in range(20)]
    for stream in streams:
        assert [stream.next().id, stream.next().id] == [1, 2]  # type: ignore[union-attr]
    ending = terminate(server)
    for stream in streams:
        assert stream.next() is None
        assert stream.retry is not None and 500 <= stream.retry <= 5000
    assert ending.wait(60) == 0

    server.process.stop()
    server.process.start()
    resumed = server.follow(job, Last_Event_ID="2")
    jobs.append(job, 3, "done", state="done")
    assert [event.id for event in resumed.rest()] == [3]


def test_a_client_that_does_not_read_cannot_keep_the_process_from_stopping(
    start: Start, jobs: Jobs, until: Until
) -> None:
    server = start(send_timeout=2)
    job = jobs.new("ten_anna", *["progress"] * 80, padding="x" * 100_000)
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(str(server.socket))
        head = f"GET /api/v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer anna\r\n\r\n"
        stuck.sendall(head.encode())
        until(lambda: server.metric("quern_event_streams") == 1)
        assert terminate(server).wait(60) == 0


def test_a_stream_outlives_a_while_in_which_its_key_cannot_be_checked(start: Start, jobs: Jobs) -> None:
    server, job = start(heartbeat=0.1, reauthenticate=0.1), jobs.new()
    stream = server.follow(job)
    assert stream.next() is not None
    server.write_keys(None)
    for _ in range(4):
        stream.await_comment()
    refused = server.follow(job)
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) > 0
    jobs.append(job, 2, "done", state="done")
    assert [event.id for event in stream.rest()] == [2]


def test_a_revoked_key_loses_its_stream(start: Start, jobs: Jobs) -> None:
    server, job = start(heartbeat=0.1, reauthenticate=0.2), jobs.new()
    stream = server.follow(job)
    assert stream.next() is not None
    stream.await_comment()
    server.write_keys({})
    assert stream.next() is None
    assert server.follow(job).status == 401


def test_a_client_that_never_finishes_its_request_is_let_go(start: Start) -> None:
    server = start()
    with socket.socket(socket.AF_UNIX) as slow:
        slow.settimeout(60)
        slow.connect(str(server.socket))
        slow.sendall(b"GET /api/v1/jobs/job_")
        assert slow.recv(1) == b""
