"""The change stream brings every change once, whatever happens to the stream or the server."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pymongo import MongoClient
from pymongo.errors import AutoReconnect, PyMongoError

from quern.analytics import follow
from quern.analytics.integrity import verify
from quern.analytics.manifest import NoWarehouseError
from quern.config import Settings
from quern.embedded.mongod import Mongod
from quern.migrations import migrate
from quern.store import clock
from quern.store.connection import Document, is_away
from tests.app.analytics.desk import RESULTS, Desk, moment, yesterday
from tests.app.api.client import until


def _token(desk: Desk) -> dict[str, Any]:
    token = desk.manifest.source.token
    assert token is not None
    return token


def test_events_that_come_twice_change_nothing(desk: Desk) -> None:
    desk.submit(moment("2026-03-07"), {"code": "a"})
    desk.run()
    before = _token(desk)
    response = desk.submit(moment(yesterday()), {"code": "b"})
    desk.finish(response, RESULTS)
    assert desk.run().events >= 4
    rows = desk.rows("fact_response")
    desk.go_on_from(before)
    again = desk.run()
    assert again.events >= 4
    assert desk.rows("fact_response") == rows
    assert desk.holds()


def test_a_token_that_is_too_old_falls_back_to_a_range_and_says_so(desk: Desk) -> None:
    old = desk.submit(moment("2026-03-07"), {"code": "a"})
    erased = desk.submit(moment("2026-03-08"), {"code": "b"})
    desk.run()
    desk.submit(clock.now(), {"code": "c"})
    desk.finish(old, RESULTS)
    desk.erase(erased)
    desk.lose_the_token()
    report = desk.run()
    assert any("rewritten instead" in line for line in report.said)
    assert desk.holds()
    assert len(desk.rows("fact_response")) == 4
    assert desk.run().said == []


def test_a_token_that_the_oplog_has_lost_is_noticed(run_directory: Path, tmp_path: Path) -> None:
    with (
        Mongod(run_directory / "m", oplog_megabytes=10) as server,
        MongoClient[Document](server.uri, tz_aware=True, w="majority", journal=True) as client,
    ):
        db = client["quern"]
        migrate(db)
        desk = Desk(db, tmp_path)
        desk.publish()
        desk.submit(moment("2026-03-07"), {"code": "a"})
        desk.run()
        late = desk.submit(moment("2026-03-07"), {"code": "b"})
        desk.finish(late, RESULTS)
        oplog, began = client["local"]["oplog.rs"], clock.now()
        limit = time.monotonic() + 300
        while oplog.find_one(sort=[("$natural", 1)])["wall"] < began:  # type: ignore[index]
            assert time.monotonic() < limit, "the oplog never let go of its oldest entries"
            for _ in range(4):
                db["filler"].insert_one({"bytes": random.randbytes(1 << 20)})
            # Only what a checkpoint holds is let go.
            client.admin.command("fsync")
        report = desk.run()
        assert any("rewritten instead" in line for line in report.said)
        assert desk.holds()
        assert len(desk.rows("fact_response")) == 2


def test_a_form_that_changes_changes_its_dimension(desk: Desk) -> None:
    desk.submit(moment("2026-03-07"), {"code": "a"})
    desk.run()
    desk.publish([{"name": "code", "type": "number"}])
    desk.run()
    versions = {row["version"]: row for row in desk.rows("dim_form")}
    assert [versions[1]["current"], versions[2]["current"]] == [False, True]
    assert versions[1]["valid_to"] == versions[2]["valid_from"]
    kinds = {row["version"]: row["kind"] for row in desk.rows("dim_field", "path = 'code'")}
    assert kinds == {1: "text", 2: "number"}


def test_a_dropped_collection_rewrites_everything(desk: Desk) -> None:
    desk.submit(moment("2026-03-07"), {"code": "a"})
    desk.run()
    desk.db.responses.drop()
    migrate(desk.db)
    desk.submit(moment("2026-03-09"), {"code": "b"})
    report = desk.run()
    assert any("dropped" in line for line in report.said)
    assert [row["day"] for row in desk.rows("fact_response")] == [date(2026, 3, 9)]


@pytest.fixture
def own_mongod(run_directory: Path) -> Iterator[Mongod]:
    with Mongod(run_directory / "m") as server:
        yield server


def test_through_restarts_of_mongod_it_is_equal_in_the_end(own_mongod: Mongod, tmp_path: Path) -> None:
    with MongoClient[Document](own_mongod.uri, tz_aware=True, w="majority", journal=True) as client:
        db = client["quern"]
        migrate(db)
        desk = Desk(db, tmp_path)
        desk.publish()
        stop, made = threading.Event(), list[str]()

        def write() -> None:
            while not stop.is_set():
                try:
                    made.append(desk.submit(clock.now(), {"code": f"{len(made)}"}))
                except PyMongoError:
                    # What was not acknowledged may be there or not; the warehouse must say the same as MongoDB.
                    time.sleep(0.1)
                time.sleep(0.01)

        def run() -> None:
            while not stop.is_set():
                try:
                    desk.run()
                except PyMongoError:
                    # As the nightly job does: again later.
                    time.sleep(0.2)

        threads = [threading.Thread(target=write), threading.Thread(target=run)]
        for thread in threads:
            thread.start()
        try:
            for kill in (True, False, True):
                time.sleep(1.5)
                if kill:
                    own_mongod.kill()
                else:
                    own_mongod.stop()
                own_mongod.start()
        finally:
            time.sleep(1.0)
            stop.set()
            for thread in threads:
                thread.join(120)
        until(lambda: _has_run(desk))
        assert desk.holds()
        assert {row["response"] for row in desk.rows("fact_response")} >= set(made)
        assert len(made) > 10


def _has_run(desk: Desk) -> bool:
    """Whether MongoDB was there for a run."""
    try:
        desk.run()
    except PyMongoError as error:
        if not is_away(error):
            raise
        return False
    return True


def test_following_outlives_restarts_of_mongod_and_brings_what_came_after_them(
    own_mongod: Mongod, settings: Settings, tmp_path: Path
) -> None:
    with MongoClient[Document](own_mongod.uri, tz_aware=True, w="majority", journal=True) as client:
        db = client["quern"]
        migrate(db)
        desk = Desk(db, tmp_path)
        desk.publish()
        environment = {
            **os.environ,
            "QUERN_MONGODB_URI": own_mongod.uri,
            "QUERN_MONGODB_DATABASE": db.name,
            "QUERN_REDIS_QUEUE_URL": settings.redis_queue_url.get_secret_value(),
            "QUERN_ANALYTICS__WAREHOUSE": str(desk.settings.warehouse),
            "QUERN_ANALYTICS__EXTRACT": str(desk.settings.extract),
            "QUERN_ANALYTICS__FOLLOW_SECONDS": "0.1",
        }
        command = [sys.executable, "-m", "quern.cli.main", "etl", "run", "--follow"]
        said = tmp_path / "said"
        with said.open("wb") as errors, subprocess.Popen(command, env=environment, stderr=errors) as following:
            try:
                made = {desk.submit(clock.now(), {"code": "before"})}
                until(lambda: _published(desk, made))
                for number, killed in enumerate((True, False, True), 1):
                    (own_mongod.kill if killed else own_mongod.stop)()
                    # It has noticed, and goes on.
                    until(partial(_says_so, said, number))
                    own_mongod.start()
                    made.add(until(lambda: _submitted(desk)))
                    until(lambda: _published(desk, made))
                    assert following.poll() is None, said.read_text()
            finally:
                following.terminate()
            assert following.wait(60) == 0, said.read_text()
        assert desk.holds()


def _says_so(said: Path, times: int) -> bool:
    return said.read_text().count("MongoDB is away") >= times


def _submitted(desk: Desk) -> str | None:
    try:
        return desk.submit(clock.now(), {"code": "after"})
    except PyMongoError:
        return None


def _published(desk: Desk, made: set[str]) -> bool:
    """Whether the warehouse has these responses, and all else that MongoDB has: a run has nothing to do."""
    try:
        manifest = desk.manifest
    except NoWarehouseError:
        return False
    if verify(desk.db, manifest).changed_since:
        return False
    return {row["response"] for row in desk.rows("fact_response")} >= made


def test_a_stream_that_never_reaches_the_present_is_tried_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit(moment("2026-03-07"), {"code": "a"})
    desk.run()
    with monkeypatch.context() as slow:
        slow.setattr(follow, "_PATIENCE", -1.0)
        # Greater than any token, whose `_data` is of hexadecimal digits.
        slow.setattr(follow, "_at", lambda db, moment: {"_data": "Z"})
        with pytest.raises(PyMongoError, match="expected the change stream to reach the present") as caught:
            desk.run()
    assert is_away(caught.value)
    assert desk.run().outcome == "unchanged"


@pytest.mark.parametrize(
    ("hello", "what"),
    [
        # As mongod 6.0 answers: before it has found its set again, and where it belongs to none.
        ({"isWritablePrimary": False, "isreplicaset": True, "secondary": False}, AutoReconnect),
        ({"isWritablePrimary": False, "setName": "rs0", "secondary": False}, AutoReconnect),
        ({"isWritablePrimary": True}, follow.TokenLostError),
    ],
)
def test_a_member_that_is_only_starting_is_waited_for(hello: dict[str, Any], what: type[Exception]) -> None:
    db = SimpleNamespace(client=SimpleNamespace(admin=SimpleNamespace(command=lambda _: hello)))
    with pytest.raises(what, match="expected a member of a replica set"):
        follow.head(cast("Any", db))
