"""The ETL's own account of MongoDB: what roles/mongodb gives it is enough for every command, and for no write."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from quern.analytics import integrity
from quern.analytics.etl import Etl
from quern.embedded.mongod import Mongod
from quern.migrations import migrate
from quern.store.connection import Document
from tests.app import accounts
from tests.app.analytics.desk import RESULTS, Desk, moment

_PASSWORD = "only-for-this-test"


@pytest.fixture
def guarded(run_directory: Path) -> Iterator[Mongod]:
    with Mongod(run_directory / "m", guarded=True) as server:
        accounts.create_mongodb(server, _PASSWORD)
        yield server


def test_the_account_of_the_etl_reads_and_cannot_write(guarded: Mongod, tmp_path: Path) -> None:
    with (
        MongoClient[Document](guarded.uri, tz_aware=True, w="majority") as writing,
        MongoClient[Document](guarded.uri_of("quern-etl", _PASSWORD), tz_aware=True) as reading,
    ):
        migrate(writing["quern"])
        desk = Desk(writing["quern"], tmp_path)
        desk.publish()
        desk.finish(desk.submit(moment("2026-03-07"), {"sector": "health"}), RESULTS)
        etl, db = Etl(reading["quern"], desk.settings), reading["quern"]
        assert etl.run().outcome == "published"
        desk.submit(moment("2026-03-08"), {"sector": "retail"})
        # By the change stream, then all anew, and compared.
        assert etl.run().events > 0
        assert etl.run(everything=True).documents > 0
        assert integrity.verify(db, desk.manifest).holds
        for write in (lambda: db.responses.insert_one({"_id": "x"}), lambda: db.responses.drop(), lambda: db.x.drop()):
            with pytest.raises(OperationFailure, match="not authorized"):
                write()
        with pytest.raises(OperationFailure, match="not authorized"):
            reading["other"].things.find_one()
