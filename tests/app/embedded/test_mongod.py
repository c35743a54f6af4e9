import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient, WriteConcern
from pymongo.database import Database
from pymongo.errors import PyMongoError

from quern.embedded.mongod import Mongod

Document = dict[str, Any]


@pytest.fixture
def own_mongod(run_directory: Path) -> Iterator[Mongod]:
    with Mongod(run_directory) as server:
        yield server


def test_it_listens_on_no_tcp_port_unless_asked(mongod: Mongod) -> None:
    assert mongod.pid is not None
    connections = psutil.Process(mongod.pid).net_connections(kind="inet")
    assert [c for c in connections if c.status == psutil.CONN_LISTEN] == []
    assert mongod.socket.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="tcp=True"):
        _ = mongod.tcp_uri


def test_a_transaction_commits_over_the_unix_socket(mongo_db: Database[Document]) -> None:
    with mongo_db.client.start_session() as session, session.start_transaction():
        mongo_db.left.insert_one({"_id": 1}, session=session)
        mongo_db.right.insert_one({"_id": 1}, session=session)
    assert (mongo_db.left.count_documents({}), mongo_db.right.count_documents({})) == (1, 1)


def test_an_aborted_transaction_leaves_nothing(mongo_db: Database[Document]) -> None:
    with mongo_db.client.start_session() as session:
        session.start_transaction()
        mongo_db.left.insert_one({"_id": 1}, session=session)
        session.abort_transaction()
    assert mongo_db.left.count_documents({}) == 0


def test_change_streams_work_over_the_unix_socket(mongo_db: Database[Document]) -> None:
    with mongo_db.things.watch(max_await_time_ms=1000) as stream:
        mongo_db.things.insert_one({"_id": "new"})
        assert next(stream)["documentKey"] == {"_id": "new"}


def test_acknowledged_writes_survive_sigkill(own_mongod: Mongod) -> None:
    acknowledged: list[int] = []
    enough = threading.Event()
    killed = threading.Event()

    def write() -> None:
        with MongoClient[Document](own_mongod.uri, serverSelectionTimeoutMS=2000, retryWrites=False) as client:
            durable = client.shop.get_collection("things", write_concern=WriteConcern("majority", j=True))
            for number in range(1_000_000):
                try:
                    durable.insert_one({"_id": number})
                except PyMongoError:
                    break
                acknowledged.append(number)
                if len(acknowledged) >= 100:
                    enough.set()
        killed.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert enough.wait(120)
    own_mongod.kill()
    assert killed.wait(120)
    writer.join()
    own_mongod.start()
    with MongoClient[Document](own_mongod.uri) as client:
        stored = {document["_id"] for document in client.shop.things.find()}
    assert set(acknowledged) <= stored
    assert len(stored) <= len(acknowledged) + 1


def test_a_client_from_before_a_kill_goes_on_with_transactions_after_it(own_mongod: Mongod) -> None:
    with MongoClient[Document](own_mongod.uri) as client:
        client.shop.things.insert_one({"_id": 1})
        own_mongod.kill()
        own_mongod.start()
        with client.start_session() as session:
            session.with_transaction(lambda s: client.shop.things.insert_one({"_id": 2}, session=s))
        assert client.shop.things.count_documents({}) == 2


def test_data_can_be_served_under_another_socket_path(run_directory: Path) -> None:
    with Mongod(run_directory / "m") as first, MongoClient[Document](first.uri) as client:
        client.shop.things.insert_one({"_id": 1})
    with (
        Mongod(run_directory / "m", socket=run_directory / "elsewhere.sock") as second,
        MongoClient[Document](second.uri) as client,
    ):
        assert client.shop.things.count_documents({}) == 1


def test_it_can_be_reached_over_loopback_tcp_too(run_directory: Path) -> None:
    with Mongod(run_directory, tcp=True) as server, MongoClient[Document](server.tcp_uri) as client:
        client.shop.things.insert_one({"_id": 1})
        assert client.shop.things.count_documents({}) == 1


def test_a_socket_path_that_the_kernel_cannot_hold_is_refused_with_a_reason(run_directory: Path) -> None:
    with pytest.raises(ValueError, match="at most 107 bytes"):
        Mongod(run_directory / ("d" * 100))
