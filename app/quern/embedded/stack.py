"""All of Quern on one machine, as child processes in one folder: for the demo, the tests and the benches."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import httpcore2
from cryptography.fernet import Fernet

from quern.config import LiveSettings, Settings
from quern.embedded.certificate import ServerCertificate, issue_certificate
from quern.embedded.mongod import Mongod
from quern.embedded.nginx import Nginx
from quern.embedded.process import ChildProcess
from quern.embedded.receiver import Receiver
from quern.embedded.redis_server import RedisServer
from quern.embedded.smtp_sink import SmtpSink
from quern.inference.client import EngineClient, EngineError
from quern.migrations import migrate
from quern.runtime import Runtime

QUEUES = ("high", "default", "webhooks", "low", "batched")


class Accounts(Protocol):
    """What gives each process an account of its own in databases that ask for one."""

    def create(self, mongod: Mongod, queue: RedisServer, cache: RedisServer) -> None:
        """Make the accounts, in databases that run and that hold nothing yet."""

    def environment(self, process: str) -> Mapping[str, str]:
        """By what settings a process (`api`, `worker-low`) is known to them."""


@dataclass
class Stack:
    """The processes, in the order in which they start. `settings` adds to, or overrides, the environment of all.

    With `accounts` each process comes to the databases by its own; without, nobody is asked.
    """

    directory: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    api_workers: int = 2
    queues: tuple[str, ...] = QUEUES
    with_engine: bool = True
    announce: Callable[[str], None] = lambda _: None
    accounts: Accounts | None = None

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        certificate: ServerCertificate = issue_certificate(self.directory / "tls")
        self.smtp = SmtpSink(tls="starttls", certificate=certificate)
        self.receiver = Receiver(certificate=certificate)
        self.certificate = certificate
        guarded = self.accounts is not None
        self.mongod = Mongod(self.directory / "mongod", guarded=guarded)
        self.redis = RedisServer(self.directory / "redis", role="queue", guarded=guarded)
        self.cache = RedisServer(self.directory / "cache", role="cache", guarded=guarded)
        self.processes: dict[str, ChildProcess] = {}

    @cached_property
    def environment(self) -> dict[str, str]:
        """What every Quern process is configured with. Made when the databases and the sinks are up."""
        authority = str(self.certificate.authority)
        own = {
            "QUERN_MONGODB_URI": self.mongod.uri,
            "QUERN_REDIS_QUEUE_URL": self.redis.url,
            "QUERN_REDIS_CACHE_URL": self.cache.url,
            "QUERN_ANALYTICS__WAREHOUSE": str(self.directory / "warehouse"),
            "QUERN_ANALYTICS__SERVICE__SOCKET": str(self._socket("analytics")),
            "QUERN_SECRET_KEYS": Fernet.generate_key().decode(),
            "QUERN_AUDIT_KEY": Fernet.generate_key().decode(),
            "QUERN_API_BIND": f"unix:{self._socket('api')}",
            "QUERN_EVENTS_BIND": f"unix:{self._socket('events')}",
            "QUERN_ENGINE_SOCKET": str(self._socket("engine")),
            "QUERN_API_WORKERS": str(self.api_workers),
            "QUERN_MAIL__HOST": self.smtp.host,
            "QUERN_MAIL__PORT": str(self.smtp.port),
            "QUERN_MAIL__TLS": "starttls",
            "QUERN_MAIL__CA_FILE": authority,
            "QUERN_MAIL__FROM_ADDRESS": "forms@quern.example",
            "QUERN_WEBHOOK__CA_FILE": authority,
            "QUERN_WEBHOOK__ALLOW_NETWORKS": '["127.0.0.0/8"]',
            "QUERN_WEBHOOK__ALLOW_PORTS": f'["{self.receiver.port}"]',
            "QUERN_METRICS_DIR": str(self.directory / "metrics"),
        }
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("QUERN_") or name == "QUERN_CACHE"
        }
        return {**kept, **own, **self.settings}

    def start(self) -> None:
        """Start everything and wait until it serves. Raises ServiceError with the log of what does not."""
        self.smtp.start()
        self.receiver.start()
        for name, service in (("mongod", self.mongod), ("redis", self.redis), ("cache", self.cache)):
            self.announce(f"starting {name}")
            service.start()
            self.processes[name] = service
        if self.accounts is not None:
            self.accounts.create(self.mongod, self.redis, self.cache)
        self.announce("creating indexes")
        migrate(self.runtime.store.db)
        self._spawn_all()
        for name, process in self.processes.items():
            self.announce(f"waiting for {name}")
            process.wait_ready()
        # nginx last: its port is the sign that everything serves.
        self.front = Nginx(
            self.directory / "nginx", api_socket=self._socket("api"), events_socket=self._socket("events")
        )
        self.front.start()

    def _spawn_all(self) -> None:
        self._spawn("api", ["api"], lambda: self._serves("api"))
        self._spawn("events", ["events"], lambda: self._serves("events"))
        self._spawn("relay", ["relay"], lambda: True)
        self._spawn("scheduler", ["scheduler"], lambda: True)
        self._spawn("analytics", ["analytics"], self._socket("analytics").exists)
        if self.with_engine:
            self._spawn("engine", ["engine", "--socket", str(self._socket("engine"))], self._engine_ready)
        for queue in self.queues:
            self._spawn(f"worker-{queue}", ["worker", queue], lambda: True)

    def _spawn(self, name: str, arguments: list[str], ready: Callable[[], bool]) -> None:
        self.announce(f"starting {name}")
        own = {} if self.accounts is None else self.accounts.environment(name)
        process = ChildProcess(
            f"quern {' '.join(arguments)}",
            [sys.executable, "-m", "quern.cli.main", *arguments],
            log=self.directory / f"{name}.log",
            ready=ready,
            environment={"QUERN_METRICS_BIND": f"unix:{self._socket(f'metrics-{name}')}", **self.environment, **own},
            directory=self.directory,
        )
        process.start(wait=False)
        self.processes[name] = process

    def _socket(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def _serves(self, name: str) -> bool:
        # `settings` may have moved it from its socket to a port.
        bind = self.environment[f"QUERN_{name.upper()}_BIND"]
        socket, host = (bind.removeprefix("unix:"), "localhost") if bind.startswith("unix:") else (None, bind)
        try:
            with httpcore2.ConnectionPool(uds=socket) as pool:
                url = f"http://{host}/healthz"
                return pool.request("GET", url, extensions={"timeout": {"read": 2.0}}).status == 200
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
            return False

    def _engine_ready(self) -> bool:
        try:
            return EngineClient(self._socket("engine"), timeout=5).health().status == "ready"
        except EngineError:
            return False

    @property
    def url(self) -> str:
        """The base URL of everything, without a trailing slash."""
        return self.front.url

    @cached_property
    def runtime(self) -> Runtime:
        """This process's own way into the stack's stores, for checks and for making tenants."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return Runtime(LiveSettings(Settings()))
        finally:
            os.environ.clear()
            os.environ.update(before)

    def stop(self) -> None:
        """Stop everything, the databases last."""
        front = getattr(self, "front", None)
        if front is not None:
            front.stop()
        for name in reversed(list(self.processes)):
            if name not in ("mongod", "redis", "cache"):
                self.processes[name].stop()
        for service in (self.cache, self.redis, self.mongod):
            service.stop()
        self.receiver.stop()
        self.smtp.stop()


@contextmanager
def temporary_stack(**options: object) -> Iterator[Stack]:
    """A running stack in a fresh short-named folder, stopped and removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="quern-"))
    stack = Stack(directory, **options)  # type: ignore[arg-type]
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(directory, ignore_errors=True)
