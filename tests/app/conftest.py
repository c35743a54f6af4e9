"""The real services that the tests run against, one of each for the whole session."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from pymongo import MongoClient
from pymongo.database import Database

from quern.config import LiveSettings, Settings
from quern.embedded.mongod import Mongod
from quern.embedded.receiver import Receiver
from quern.embedded.redis_server import RedisServer
from quern.embedded.smtp_sink import SmtpSink
from quern.embedded.stack import temporary_stack
from quern.migrations import migrate
from quern.store.connection import Store
from tests.app.accounts import ApplianceAccounts, refused
from tests.app.api.client import Client, House
from tests.app.observe.collector import Collector

# The same examples in every run, and no limit on the time of one: a busy machine must not fail a test.
hypothesis.settings.register_profile("quern", derandomize=True, deadline=None)
hypothesis.settings.load_profile("quern")


#: Databases, models and releases of a whole run, in bytes, rounded up.
_NEEDED = 3 * 2**30


def pytest_sessionstart() -> None:
    """Say at once that the folder for temporary files is too small: many tests would fail for reasons of their own."""
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < _NEEDED:
        expected = f"expected {_NEEDED / 2**30:.0f} GiB free in {folder}, found {free / 2**30:.1f}"
        pytest.exit(f"{expected}; make room, or name another folder: TMPDIR=/var/tmp make test", returncode=2)


def _short_directory() -> Iterator[Path]:
    # pytest's own temporary folders are too deep for a UNIX socket, whose path ends at 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="q-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def run_directory() -> Iterator[Path]:
    """A fresh folder with a path short enough for UNIX sockets."""
    yield from _short_directory()


@pytest.fixture(scope="session")
def session_directory() -> Iterator[Path]:
    """As `run_directory`, for the session's own services."""
    yield from _short_directory()


@pytest.fixture(scope="session")
def mongod(session_directory: Path) -> Iterator[Mongod]:
    """The session's mongod. A test that kills it starts one of its own."""
    with Mongod(session_directory / "mongod") as server:
        yield server


@pytest.fixture(scope="session")
def mongo_client(mongod: Mongod) -> Iterator[MongoClient[dict[str, Any]]]:
    """A client of the session's mongod, with aware UTC times."""
    with MongoClient[dict[str, Any]](mongod.uri, tz_aware=True) as client:
        yield client


@pytest.fixture
def mongo_db(mongo_client: MongoClient[dict[str, Any]]) -> Iterator[Database[dict[str, Any]]]:
    """An empty database of this test's own, dropped afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    yield mongo_client[name]
    mongo_client.drop_database(name)


@pytest.fixture(scope="session")
def redis_queue(session_directory: Path) -> Iterator[RedisServer]:
    """The session's durable Redis."""
    with RedisServer(session_directory / "queue", role="queue") as server:
        yield server


@pytest.fixture(scope="session")
def settings(mongod: Mongod, redis_queue: RedisServer) -> Settings:
    """Of a service on the session's own stores."""
    return Settings(
        mongodb_uri=SecretStr(mongod.uri),
        mongodb_database="quern_tests",
        redis_queue_url=SecretStr(redis_queue.url),
        secret_keys=SecretStr(Fernet.generate_key().decode()),
        audit_key=SecretStr(secrets.token_hex(32)),
    )


@pytest.fixture(scope="session")
def migrated_store(settings: Settings) -> Store:
    """A database with every index, made once: `store` is what a test asks for."""
    store = Store(LiveSettings(settings))
    migrate(store.db)
    return store


@pytest.fixture
def store(migrated_store: Store) -> Store:
    """A migrated database without a document in it."""
    for name in migrated_store.db.list_collection_names(filter={"type": "collection"}):
        if not name.startswith("system."):
            migrated_store.db[name].delete_many({})
    return migrated_store


@pytest.fixture(scope="session")
def redis_cache(session_directory: Path) -> Iterator[RedisServer]:
    """The session's forgetful Redis."""
    with RedisServer(session_directory / "cache", role="cache") as server:
        yield server


@pytest.fixture
def smtp_sink() -> Iterator[SmtpSink]:
    """A plain SMTP server that keeps what it gets."""
    with SmtpSink() as sink:
        yield sink


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A plain HTTP server that records and answers by script."""
    with Receiver() as server:
        yield server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Receives the spans of the session's stack."""
    with Collector() as server:
        yield server


@pytest.fixture(scope="session")
def house(collector: Collector) -> Iterator[House]:
    """All of Quern but the engine, behind nginx, one for the session. A test that stops a part starts it again."""
    settings = {
        "QUERN_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "300",
        "QUERN_JOB__BACKOFF_BASE": "0.5",
        "QUERN_API_RECEIVE_SECONDS": "3",
    }
    with temporary_stack(with_engine=False, settings=settings, accounts=ApplianceAccounts()) as stack:
        yield House(stack)
        assert refused(stack) == []


@pytest.fixture
def owner(house: House) -> Client:
    """A new tenant without a limit, by a key with every scope."""
    return house.client()
