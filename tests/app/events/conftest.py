"""The events process, and a client that reads its streams."""

import http.client
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from cryptography.fernet import Fernet
from pymongo import WriteConcern
from pymongo.collection import Collection
from pymongo.database import Database

from quern.embedded.mongod import Mongod
from quern.embedded.process import ChildProcess
from quern.store import clock, identifier

_PATIENCE_SECONDS = 60.0


def until(promise: Callable[[], Any]) -> Any:
    """Poll until `promise()` is true, and return it."""
    limit = time.monotonic() + _PATIENCE_SECONDS
    while not (kept := promise()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)
    return kept


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_PATIENCE_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Event(NamedTuple):
    """One event as a client got it."""

    id: int
    type: str
    data: dict[str, Any]


class Answer:
    """An answer whose body is read when asked for."""

    def __init__(self, path: Path, method: str, target: str, headers: dict[str, str]) -> None:
        self._connection = _UnixConnection(path)
        self._connection.request(method, target, headers=headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = self._response.headers
        self.retry: int | None = None
        self.comments = 0

    def next(self) -> Event | None:
        """The next event, or None at the orderly end of the stream. Notes comments and retry hints on the way."""
        fields: dict[str, str] = {}
        limit = time.monotonic() + _PATIENCE_SECONDS
        while line := self._response.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if not line.strip():
                if "data" in fields:
                    return Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))
                fields = {}
            elif name == "":
                self.comments += 1
                assert time.monotonic() < limit, "nothing but comments"
            elif name == "retry":
                self.retry = int(value)
            else:
                fields[name] = value
        return None

    def rest(self) -> list[Event]:
        """All events up to the end."""
        events = []
        while event := self.next():
            events.append(event)
        return events

    def await_comment(self) -> None:
        """Read until a comment came."""
        while not (line := self._response.readline()).startswith(b":"):
            assert line, "the stream ended"
        self.comments += 1

    def problem(self) -> dict[str, Any]:
        """The body, which must be a problem document of this answer's status."""
        assert self.headers["Content-Type"] == "application/problem+json"
        document: dict[str, Any] = json.loads(self._response.read())
        assert document["status"] == self.status
        return document

    def text(self) -> str:
        """The whole body."""
        return self._response.read().decode()

    def leave(self) -> None:
        """Close the connection without another word."""
        self._response.close()
        self._connection.close()


class EventsServer:
    """The events process over a UNIX socket, with two tenants' keys."""

    def __init__(self, directory: Path, mongod: Mongod, database: str, event: dict[str, Any]) -> None:
        self.socket = directory / "events.sock"
        self._keys = directory / "keys.json"
        self.write_keys(
            {
                "Bearer anna": {"tenant": "ten_anna", "scopes": ["jobs:read", "forms:read"]},
                "Bearer bert": {"tenant": "ten_bert", "scopes": ["jobs:read"]},
                "Bearer form": {"tenant": "ten_anna", "scopes": ["responses:submit"]},
            }
        )
        settings = directory / "settings.json"
        document = {
            "mongodb_uri": mongod.uri,
            "mongodb_database": database,
            "redis_queue_url": "unix:///nowhere.sock",
            "secret_keys": Fernet.generate_key().decode(),
            "audit_key": "a" * 32,
            "events_bind": f"unix:{self.socket}",
            "event": event,
        }
        settings.write_text(json.dumps(document))
        serve = Path(__file__).with_name("serve.py")
        self.process = ChildProcess(
            "events", [sys.executable, serve, settings, self._keys], log=directory / "events.log", ready=self._is_ready
        )

    def write_keys(self, keys: dict[str, Any] | None) -> None:
        """Replace the keys that are good. None: nobody can tell which are."""
        fresh = self._keys.with_suffix(".new")
        fresh.write_text(json.dumps(keys))
        fresh.rename(self._keys)

    def ask(self, target: str, key: str | None = "anna", *, method: str = "GET", **headers: str) -> Answer:
        """Send a request; underscores in header names stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            named["Authorization"] = f"Bearer {key}"
        return Answer(self.socket, method, target, named)

    def follow(self, job: str, key: str | None = "anna", **headers: str) -> Answer:
        """Ask for a job's event stream."""
        return self.ask(f"/api/v1/jobs/{job}/events", key, **headers)

    def metric(self, name: str) -> float:
        """A metric's value as of now."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("/metrics", None).text(), re.MULTILINE)
        assert found, name
        return float(found[1])

    def sockets(self) -> int:
        """Client connections that the process holds on its socket, beside the one that listens."""
        connections = psutil.Process(self.process.pid).net_connections("unix")
        return len([one for one in connections if str(one.laddr) == str(self.socket)]) - 1

    def _is_ready(self) -> bool:
        try:
            return self.ask("/readyz", None).status == 200
        except OSError:
            return False


class Jobs:
    """Writes jobs as workers do."""

    def __init__(self, collection: Collection[dict[str, Any]]) -> None:
        self._jobs = collection.with_options(write_concern=WriteConcern("majority", j=True))

    def new(self, tenant: str = "ten_anna", *types: str, **data: Any) -> str:
        """A job whose log holds `types` (by default, one `queued`), with `data` in each."""
        job = identifier.new("job")
        types = types or ("queued",)
        log = [
            {"seq": number, "type": kind, "at": clock.now(), "data": data} for number, kind in enumerate(types, start=1)
        ]
        self._jobs.insert_one({"_id": job, "tenant": tenant, "state": types[-1], "log": log})
        return job

    def append(self, job: str, number: int, kind: str, state: str | None = None, **data: Any) -> None:
        """Append the event `number`, unless an attempt that seemed to fail had done so."""
        entry = {"seq": number, "type": kind, "at": clock.now(), "data": data}
        change: dict[str, Any] = {"$push": {"log": entry}}
        if state:
            change["$set"] = {"state": state}
        self._jobs.update_one({"_id": job, "log.seq": {"$ne": number}}, change)


Start = Callable[..., EventsServer]


@pytest.fixture
def start(run_directory: Path, mongod: Mongod, mongo_db: Database[dict[str, Any]]) -> Iterator[Start]:
    """Starts the events process on this test's database (or on a mongod of its own), with these `event` settings."""
    with ExitStack() as started:

        def start_one(own: Mongod | None = None, **event: Any) -> EventsServer:
            server = EventsServer(run_directory, own or mongod, mongo_db.name, event)
            started.enter_context(server.process)
            return server

        yield start_one


@pytest.fixture
def jobs(mongo_db: Database[dict[str, Any]]) -> Jobs:
    """This test's jobs."""
    return Jobs(mongo_db.jobs)


@pytest.fixture
def make_jobs() -> type[Jobs]:
    """Jobs in another collection."""
    return Jobs


@pytest.fixture(name="until")
def provide_until() -> Callable[[Callable[[], Any]], Any]:
    """Polls until a promise holds."""
    return until
