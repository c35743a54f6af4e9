"""The accounts of MongoDB and Redis that the roles make: what nobody needs is refused, and the documents say so."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from quern.embedded.mongod import Mongod
from quern.embedded.redis_server import RedisServer
from quern.migrations import migrate, missing
from quern.store.connection import Db, Document
from tests.app import accounts

_PASSWORD = "only-for-this-test"
_NAMES = [account["name"] for account in accounts.mongodb()["mongodb_accounts"]]
_ACTIONS: dict[str, Callable[[Db, str], object]] = {
    "find": lambda db, name: db[name].find_one({"_id": "nothing"}),
    "insert": lambda db, name: db[name].insert_one({"_id": "mark", "subject": "mark"}),
    "update": lambda db, name: db[name].update_one({"_id": "nothing"}, {"$set": {"x": 1}}),
    "remove": lambda db, name: db[name].delete_one({"_id": "mark"}),
}
_ALL = {"operator"}
_READ = {"etl", "backup", "operator"}
#: Who may do what with what is worth most to a thief, or must not be changed. Everybody else is refused.
_MAY = {
    # Digests of keys.
    "keys": {"find": {"api", "events"} | _READ, "insert": {"api"} | _ALL, "update": {"api", "events"} | _ALL},
    "tenants": {"find": {"api", "events"} | _READ},
    # What proves that nobody changed anything: written once, sealed by one, never removed.
    "audit": {
        "find": {"api", "scheduler"} | _READ,
        "insert": {"api", "events", "relay", "scheduler", "default", "webhooks", "batched"} | _ALL,
        "update": {"scheduler"} | _ALL,
    },
    # What people answered.
    "responses": {
        "find": {"api", "relay", "scheduler", "default", "webhooks", "batched"} | _READ,
        "insert": {"api"} | _ALL,
        "update": {"api", "relay", "scheduler", "default", "webhooks", "batched"} | _ALL,
    },
    "vectors": {"find": {"api"} | _READ, "insert": {"batched"} | _ALL, "update": {"batched"} | _ALL, "remove": {"api"}},
    "idempotency": {"find": {"api"} | _READ, **dict.fromkeys(("insert", "update", "remove"), {"api"} | _ALL)},
    # Secrets of webhooks, sealed by a key that MongoDB does not have.
    "webhook_endpoints": {
        "find": {"api", "events", "scheduler", "high", "webhooks", "low", "batched"} | _READ,
        "insert": {"api"} | _ALL,
        "update": {"api", "webhooks"} | _ALL,
        "remove": {"api"},
    },
    "forms": {"find": {"api"} | _READ, "insert": {"api"} | _ALL, "update": {"api"} | _ALL},
}


@pytest.fixture(scope="module")
def guarded(session_directory: Path) -> Iterator[Mongod]:
    """A mongod with the appliance's roles and accounts, migrated by the operator's."""
    with Mongod(session_directory / "guarded", guarded=True) as server:
        accounts.create_mongodb(server, _PASSWORD)
        with _client(server, "quern-operator") as client:
            migrate(client.quern)
            assert missing(client.quern) == []
        yield server


def _client(server: Mongod, account: str) -> MongoClient[Document]:
    return MongoClient[Document](server.uri_of(account, _PASSWORD), tz_aware=True, w="majority")


def _is_refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except OperationFailure as error:
        # Whom a document of the same identifier stops has come further than the door.
        assert error.code in (13, 11000), error
        return error.code == 13
    return False


@pytest.mark.parametrize("account", _NAMES)
def test_an_account_of_mongodb_does_what_is_listed_and_nothing_else(guarded: Mongod, account: str) -> None:
    short = account.removeprefix("quern-")
    with _client(guarded, account) as client:
        for collection, may in _MAY.items():
            for action, act in _ACTIONS.items():
                refused = _is_refused(partial(act, client.quern, collection))
                assert refused != (short in may.get(action, set()) | _ALL), (collection, action)


@pytest.mark.parametrize("account", [name for name in _NAMES if name != "quern-operator"])
def test_only_the_operators_account_makes_and_drops_collections_and_indexes(guarded: Mongod, account: str) -> None:
    with _client(guarded, account) as client:
        db = client.quern
        for act in (
            lambda: db.responses.create_index("x"),
            lambda: db.responses.drop_index("recent"),
            lambda: db.responses.drop(),
            lambda: db.create_collection("mine", check_exists=False),
            lambda: db.mine.insert_one({}),
            lambda: db.command("collMod", "audit"),
            lambda: db.command("profile", 0),
        ):
            assert _is_refused(act)


@pytest.mark.parametrize("account", _NAMES)
def test_no_account_manages_the_server_or_looks_into_another_database(guarded: Mongod, account: str) -> None:
    with _client(guarded, account) as client:
        for act in (
            lambda: client.other.things.find_one(),
            lambda: client.admin["system.users"].find_one(),
            lambda: client.admin.command("createUser", "mine", pwd="x", roles=[]),
            lambda: client.admin.command("grantRolesToUser", account, roles=["root"]),
            lambda: client.admin.command("usersInfo", "owner"),
            lambda: client.local["oplog.rs"].find_one(),
            lambda: client.admin.command("setParameter", 1, quiet=True),
            lambda: client.admin.command("shutdown"),
            lambda: client.quern.command("dropDatabase"),
        ):
            assert _is_refused(act)
        assert _is_refused(lambda: client.admin.command("serverStatus")) == (account != "quern-scheduler")


def _backup() -> ModuleType:
    path = accounts.ROLES / "backup/files/quern_backup.py"
    specification = importlib.util.spec_from_file_location("quern_backup", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_copy_is_made_by_the_account_that_only_reads_and_brought_back_by_the_operators(
    guarded: Mongod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python finds the module beside it on a host: in the folder of the program that was started.
    monkeypatch.syspath_prepend(str(accounts.ROLES / "backup/files"))
    backup, folder = _backup(), tmp_path / "copy"
    folder.mkdir()
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))

    def become(account: str) -> None:
        (tmp_path / "credentials/quern_mongodb_uri").write_text(guarded.uri_of(account, _PASSWORD))

    with _client(guarded, "quern-operator") as client:
        client.quern.forms.insert_one({"_id": "frm_kept", "name": "Kept"})
        become("quern-backup")
        assert backup.dump(folder)["collections"]["forms"]["count"] == 1
        with pytest.raises(OperationFailure, match="not authorized"):
            backup.load(folder)
        client.quern.forms.delete_many({})
        become("quern-operator")
        assert backup.load(folder)["forms"] == 1
        assert client.quern.forms.find_one() == {"_id": "frm_kept", "name": "Kept"}
        assert missing(client.quern) == []


@pytest.fixture(scope="module")
def queue(redis_queue: RedisServer) -> RedisServer:
    accounts.create_redis(redis_queue, "queue", _PASSWORD)
    return redis_queue


@pytest.fixture(scope="module")
def cache(redis_cache: RedisServer) -> RedisServer:
    accounts.create_redis(redis_cache, "cache", _PASSWORD)
    return redis_cache


def _as(server: RedisServer, account: str) -> Redis:
    return Redis.from_url(server.url.replace("unix://", f"unix://{account}:{_PASSWORD}@"))


#: Of every account but the administrator's and the monitor's.
_WORKING = [name for name in accounts.redis("queue") if name not in ("quern-admin", "quern-monitor")]
_NEVER = [
    "KEYS *",
    "SCAN 0",
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG SET maxmemory 1",
    "ACL LIST",
    "ACL SETUSER quern-api on",
    "SHUTDOWN",
    "MONITOR",
    "CLIENT LIST",
    "SAVE",
    "REPLICAOF localhost 1",
    "MODULE LIST",
    "FUNCTION LIST",
    "SELECT 1",
]


@pytest.mark.parametrize("account", _WORKING)
def test_an_account_of_redis_neither_changes_the_server_nor_sees_other_keys(queue: RedisServer, account: str) -> None:
    with _as(queue, account) as client:
        assert client.ping()
        for command in _NEVER:
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))
        for command in ("LPUSH", "LLEN"):
            with pytest.raises(NoPermissionError):
                client.execute_command(command, "sessions:somebody", *(["x"] if command == "LPUSH" else []))
        # Keys that a script names are asked for, too.
        with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)perm"):
            client.eval("return redis.call('LLEN', KEYS[1])", 1, "sessions:somebody")


#: Who may not touch what others keep in the same instance.
_OTHERS = {
    "quern-relay": ["GET limit:ten_x", "LRANGE quern:deltas:x 0 -1", "PUBLISH quern:deltas x"],
    "quern-scheduler": ["GET limit:ten_x", "RPOP huey.redis.quern_low", "PUBLISH quern:deltas x"],
    "quern-api": ["RPOP huey.redis.quern_low", "LRANGE quern:deltas:x 0 -1", "SUBSCRIBE quern:deltas"],
    "quern-events": ["RPUSH quern:deltas:x y", "PUBLISH quern:deltas x", "RPOP huey.redis.quern_low"],
    "quern-webhooks": ["GET limit:ten_x", "LRANGE quern:deltas:x 0 -1", "SUBSCRIBE quern:deltas"],
    "quern-low": ["GET limit:ten_x", "RPUSH quern:deltas:x y"],
    "quern-default": ["GET limit:ten_x", "RPUSH quern:deltas:x y"],
    "quern-high": ["GET limit:ten_x", "SUBSCRIBE quern:deltas"],
    "quern-batched": ["GET limit:ten_x", "SUBSCRIBE quern:deltas"],
}


@pytest.mark.parametrize(("account", "commands"), _OTHERS.items())
def test_an_account_of_redis_leaves_alone_what_is_others(queue: RedisServer, account: str, commands: list[str]) -> None:
    with _as(queue, account) as client:
        for command in commands:
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))


def test_who_measures_redis_sees_no_key_and_who_manages_it_only_sets_accounts(queue: RedisServer) -> None:
    with _as(queue, "quern-monitor") as client:
        assert "used_memory" in client.info()
        for command in (*_NEVER, "GET limit:ten_x", "LLEN huey.redis.quern_low", "DBSIZE"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))
    with _as(queue, "quern-admin") as client:
        for command in ("KEYS *", "GET limit:ten_x", "CONFIG GET *", "INFO", "ACL LIST", "ACL GETUSER quern-api"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))


def test_the_cache_knows_the_analytics_service_and_no_process_of_the_queue(cache: RedisServer) -> None:
    assert set(accounts.redis("cache")) == {"quern-analytics", "quern-admin", "quern-monitor"}
    with _as(cache, "quern-analytics") as client:
        client.set("quern:analytics:x", "kept", ex=60)
        for command in ("GET huey.redis.quern_low", "SET mine x", "KEYS *", "FLUSHALL", "CONFIG GET *"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))


def test_the_documents_table_of_accounts_is_what_the_role_grants() -> None:
    text = (accounts.ROLES.parent / "docs/security.md").read_text()
    found = re.search(r"^\| account of MongoDB .*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, "expected a table of MongoDB's accounts in docs/security.md"
    assert found[1].splitlines() == accounts.table()
