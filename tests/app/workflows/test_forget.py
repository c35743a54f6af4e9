"""After an erasure the engine is asked to forget until it has, and once more when nobody can still hold the words."""

import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from quern.inference.client import EngineClient
from quern.jobs.handler import Context, RetryLater
from quern.jobs.model import Job
from quern.store import clock
from quern.store.connection import Store
from quern.workflows import forget


def _job() -> Job:
    new = forget.forgetting("ten_a", clock.now(), 60.0)
    return Job.from_document(new.document(clock.now()))


def test_erasures_of_one_minute_share_a_job_that_runs_after_every_lease_of_theirs() -> None:
    first = datetime(2026, 11, 22, 12, 0, 1, tzinfo=UTC)
    last = first + timedelta(seconds=58.9)
    one, two = forget.forgetting("ten_a", first, 60.0), forget.forgetting("ten_a", last, 60.0)
    assert one.id == two.id
    assert two.due is not None
    assert two.due >= last + timedelta(seconds=60)
    assert forget.forgetting("ten_b", first, 60.0).id != one.id
    assert forget.forgetting("ten_a", first + timedelta(minutes=1), 60.0).id != one.id


def test_an_engine_that_hangs_is_asked_again_and_no_job_is_blamed(store: Store, run_directory: Path) -> None:
    path = run_directory / "hanging.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        handler = forget.handler(EngineClient(path, timeout=0.3))
        with pytest.raises(RetryLater) as caught:
            handler.run(_job(), Context(store))
    assert not caught.value.charged


def test_an_engine_that_is_not_there_holds_nothing(store: Store, run_directory: Path) -> None:
    handler = forget.handler(EngineClient(run_directory / "absent.sock", timeout=0.3))
    assert handler.run(_job(), Context(store)) == {"forgotten": True, "engine": "away"}


def test_the_engine_is_asked_for_the_jobs_tenant_only(store: Store, run_directory: Path) -> None:
    path = run_directory / "engine.sock"
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(1 << 16))

        far_end = threading.Thread(target=answer)
        far_end.start()
        with pytest.raises(RetryLater):
            forget.handler(EngineClient(path, timeout=5)).run(_job(), Context(store))
        far_end.join()
    assert b'"ten_a"' in asked[0]
    assert b'"purge"' in asked[0]
