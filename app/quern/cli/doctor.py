"""`quern doctor`: every dependency, one after the other, and what to run where one is not well."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import click
import pymongo
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from quern.cli.output import emit, emit_json, json_option
from quern.cli.runtime import open_runtime
from quern.inference.client import EngineError
from quern.jobs import capacity
from quern.jobs.model import Queue
from quern.store import clock
from quern.store.redis_connection import connect
from quern.workflows import outbox

#: Seconds that one check may take.
_PATIENCE = 3.0
#: Of each exchange with the relay: one that looks up who asks takes longer to greet than a service of the host.
_RELAY_PATIENCE = 10.0
_LEAST_FREE = 0.1
#: Seconds after which a relay is late.
_LATE = 10.0
_SEALED_LATE = timedelta(minutes=1)


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[], str]
    """Returns what it found; raises when that is not well."""
    run: str
    needs: str | None = None
    """The check without which this one cannot be made."""


@click.command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Check every dependency; say what is wrong and what to run. Exits 1 when something is."""
    rows: list[dict[str, Any]] = []
    wrong: set[str] = set()
    for check in CHECKS:
        if check.needs in wrong:
            wrong.add(check.name)
            rows.append({"check": check.name, "ok": False, "found": f"not looked at: {check.needs} first", "run": ""})
            continue
        try:
            with pymongo.timeout(_PATIENCE):
                rows.append({"check": check.name, "ok": True, "found": check.look(), "run": ""})
        except (PyMongoError, RedisError, EngineError, OSError, RuntimeError) as error:
            wrong.add(check.name)
            found = str(error) if isinstance(error, RuntimeError | EngineError) else type(error).__name__
            rows.append({"check": check.name, "ok": False, "found": found, "run": check.run})
    if as_json:
        emit_json(rows)
    else:
        shown = [{**row, "ok": "ok" if row["ok"] else "WRONG"} for row in rows]
        emit(shown, ["check", "ok", "found", "run"], False, "")
    if wrong:
        raise SystemExit(1)


def _check_mongodb() -> str:
    return f"version {open_runtime().store.client.server_info()['version']}"


def _check_replica_set() -> str:
    hello = open_runtime().store.client.admin.command("hello")
    if not hello.get("setName"):
        raise RuntimeError("expected a replica set, found a single server")
    return str(hello["setName"])


def _check_indexes() -> str:
    from quern.migrations import missing

    absent = missing(open_runtime().store.db)
    if absent:
        raise RuntimeError(f"expected all indexes, found missing: {', '.join(absent)}")
    return "all there"


def _redis() -> Any:
    return connect(open_runtime().store.redis_queue_url)


def _check_redis() -> str:
    return f"version {_redis().info('server')['redis_version']}"


def _check_redis_policy() -> str:
    found = _redis().config_get("maxmemory-policy", "appendonly")
    if found.get("maxmemory-policy") != "noeviction" or found.get("appendonly") != "yes":
        raise RuntimeError(f"expected noeviction and AOF, found {found}")
    return "noeviction, AOF"


def _check_engine() -> str:
    health = open_runtime().engine.health()
    if health.status != "ready":
        raise RuntimeError(f"expected ready, found {health.status} {health.detail}".strip())
    return "ready"


def _check_mail() -> str:
    from quern.mail.send import MailError, probe

    settings = open_runtime().settings.mail
    if settings is None:
        raise RuntimeError("no relay is configured; email steps will fail")
    bounded = settings.model_copy(update={"timeout_seconds": min(settings.timeout_seconds, _RELAY_PATIENCE)})
    try:
        probe(bounded)
    except MailError as error:
        raise RuntimeError(str(error)) from None
    way = "answers" if settings.username is None else "lets us in"
    return f"{settings.host}:{settings.port} {way}"


def _http_get(bind: str, path: str) -> bytes:
    """The status line's answer of a local service on `unix:/path` or host:port."""
    if bind.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(3)
        connection.connect(bind.removeprefix("unix:"))
    else:
        host, port = bind.rsplit(":", 1)
        connection = socket.create_connection((host, int(port)), timeout=3)
    with connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return connection.recv(4096)


def _answers(bind: str) -> str:
    line = _http_get(bind, "/readyz").split(b"\r\n", 1)[0].decode("latin-1")
    if " 200" not in line:
        raise RuntimeError(f"expected 200 from /readyz, found {line!r}")
    return "ready"


def _check_api() -> str:
    return _answers(open_runtime().settings.api_bind)


def _check_events() -> str:
    return _answers(open_runtime().settings.events_bind)


def _check_scheduler() -> str:
    lead = open_runtime().store.db.leads.find_one({"_id": "seal the audit log"})
    if lead is None or lead["until"] < clock.now():
        raise RuntimeError("expected a living scheduler, found none that leads")
    return f"led by {lead['holder']}"


def _check_workers() -> str:
    db = open_runtime().store.db
    found = {name.value: capacity.of(db, name.value) for name in Queue}
    if idle := [name for name, at_once in found.items() if not at_once]:
        raise RuntimeError(f"expected a worker of each queue, found none of: {', '.join(idle)}")
    return ", ".join(f"{name} {at_once}" for name, at_once in found.items())


def _check_relay() -> str:
    first = open_runtime().store.db.responses.find_one(
        {"outbox.at": {"$exists": True}}, {"outbox.at": 1}, sort=[("outbox.at", 1)]
    )
    age = (clock.now() - first["outbox"]["at"]).total_seconds() if first else 0.0
    if age > _LATE:
        raise RuntimeError(f"expected outboxes to be relayed at once, found one that waits for {age:.0f} s")
    return f"lag {age:.1f} s"


def _check_outboxes() -> str:
    if broken := outbox.count_unrelayed(open_runtime().store.db):
        raise RuntimeError(f"expected none set aside, found {broken} responses without jobs")
    return "none set aside"


def _check_sealer() -> str:
    before = clock.now() - _SEALED_LATE
    if late := open_runtime().store.db.audit.find_one({"pending": True, "at": {"$lt": before}}, {"at": 1}):
        raise RuntimeError(
            f"expected entries to be sealed at once, found one of {clock.rfc3339(late['at'])} that waits"
        )
    return "up to date"


def _check_dead() -> str:
    count = open_runtime().store.db.jobs.count_documents({"state": "dead"})
    if count:
        raise RuntimeError(f"expected none, found {count}")
    return "none"


def _enough(free: float) -> str:
    if free < _LEAST_FREE:
        raise RuntimeError(f"expected {_LEAST_FREE:.0%} free, found {free:.0%}")
    return f"{free:.0%} free"


def _check_disk() -> str:
    stats = os.statvfs("/")
    return _enough(stats.f_bavail / stats.f_blocks)


def _check_database_disk() -> str:
    # As mongod sees it: its files may lie on a disk of their own, which this account cannot look at.
    stats = open_runtime().store.db.command("dbStats")
    total = stats["fsTotalSize"]
    return _enough(1 - stats["fsUsedSize"] / total) if total else "nothing stored yet"


CHECKS = [
    Check("MongoDB", _check_mongodb, "systemctl status mongod; check QUERN_MONGODB_URI"),
    Check("replica set", _check_replica_set, "rs.initiate() once: transactions need a replica set", "MongoDB"),
    Check("indexes", _check_indexes, "quern migrate", "MongoDB"),
    Check("Redis queue", _check_redis, "systemctl status redis@queue; check QUERN_REDIS_QUEUE_URL"),
    Check(
        "Redis policy",
        _check_redis_policy,
        "set `maxmemory-policy noeviction` and `appendonly yes` for Redis `queue`",
        "Redis queue",
    ),
    Check("engine", _check_engine, "systemctl status quern-engine; check QUERN_ENGINE_SOCKET"),
    Check(
        "mail relay",
        _check_mail,
        "set QUERN_MAIL__HOST and QUERN_MAIL__FROM_ADDRESS (on a host: app_mail), or check the relay",
    ),
    Check("API", _check_api, "systemctl status quern-api@1; check QUERN_API_BIND"),
    Check("events", _check_events, "systemctl status quern-events; check QUERN_EVENTS_BIND"),
    Check("scheduler", _check_scheduler, "systemctl status quern-scheduler", "MongoDB"),
    Check("workers", _check_workers, "systemctl status 'quern-worker@*'", "MongoDB"),
    Check("relay", _check_relay, "systemctl status quern-relay", "MongoDB"),
    Check("outboxes", _check_outboxes, "journalctl -u quern-relay says why; then quern outbox retry --all", "MongoDB"),
    Check("audit log", _check_sealer, "journalctl -u quern-scheduler", "MongoDB"),
    Check("dead letters", _check_dead, "quern dead list", "MongoDB"),
    Check("disk", _check_disk, "free or add space on /"),
    Check("database's disk", _check_database_disk, "free or add space where the database lives", "MongoDB"),
]
