"""The real services that the tests run against, one of each for the whole session."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from pymongo import MongoClient
from pymongo.database import Database

from quern.embedded.mongod import Mongod
from quern.embedded.receiver import Receiver
from quern.embedded.redis_server import RedisServer
from quern.embedded.smtp_sink import SmtpSink

# The same examples in every run, and no limit on the time of one: a busy machine must not fail a test.
hypothesis.settings.register_profile("quern", derandomize=True, deadline=None)
hypothesis.settings.load_profile("quern")


def _short_directory() -> Iterator[Path]:
    # pytest's own temporary folders are too deep for a UNIX socket, whose path ends at 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="q-", dir="/tmp"))
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
