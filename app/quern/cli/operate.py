"""`quern form`, `job`, `queue`, `dead`, `audit`, `status`, `doctor`: what an operator asks over SSH."""

import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pymongo
from cryptography.fernet import Fernet
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from quern.audit import chain
from quern.audit.entry import entry, record
from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.cli.runtime import open_runtime
from quern.inference.client import EngineError
from quern.jobs import estimate, queue
from quern.jobs.model import Queue
from quern.migrations import migrate as run_migrations
from quern.store import clock
from quern.store.redis_connection import connect

JOB_COLUMNS = ["id", "tenant", "queue", "kind", "state", "attempt", "created", "error"]


@click.command("migrate")
@json_option
def migrate_command(as_json: bool) -> None:
    """Create what this version needs in the database. Safe at any time."""
    made = run_migrations(open_runtime().store.db)
    emit([{"index": name} for name in made], ["index"], as_json, "Nothing to do.")


@click.command("secret-key")
@json_option
def secret_key(as_json: bool) -> None:
    """Print a fresh key for QUERN_SECRET_KEYS or QUERN_AUDIT_KEY."""
    made = Fernet.generate_key().decode()
    emit_outcome({"outcome": made}, as_json)


@click.group("form")
def form_group() -> None:
    """Forms of all tenants."""


@form_group.command("list")
@click.option("--tenant", "tenant_id", help="Only this tenant's.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@json_option
def list_forms(tenant_id: str | None, limit: int, as_json: bool) -> None:
    """List forms, newest first, with the number of their responses."""
    db = open_runtime().store.db
    rows = []
    for document in db.forms.find({"tenant": tenant_id} if tenant_id else {}).sort("_id", -1).limit(limit):
        count = db.responses.count_documents({"tenant": document["tenant"], "form": document["_id"]})
        shown = {name: document[name] for name in ("tenant", "name", "status", "version", "created")}
        rows.append({"id": document["_id"], **shown, "responses": count})
    emit(rows, ["id", "tenant", "name", "status", "version", "responses"], as_json, "No forms.")


@click.group("job")
def job_group() -> None:
    """Jobs: look at one, list, cancel."""


def _job_row(document: dict[str, Any]) -> dict[str, Any]:
    hidden = ("_id", "payload", "result", "log", "lease_id")
    return {"id": document["_id"], **{name: value for name, value in document.items() if name not in hidden}}


@job_group.command("list")
@click.option("--tenant", "tenant_id", help="Only this tenant's.")
@click.option("--state", help="queued, running, blocked, done, dead, cancelled or skipped.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_jobs(tenant_id: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List jobs."""
    found = queue.listing(open_runtime().store.db, tenant_id, state=state, limit=limit)
    emit([_job_row(document) for document in found], JOB_COLUMNS, as_json, "No such jobs.")


@job_group.command("show")
@click.argument("identity")
@json_option
def show_job(identity: str, as_json: bool) -> None:
    """Show a job, its place and its log."""
    db = open_runtime().store.db
    document = db.jobs.find_one({"_id": identity})
    if document is None:
        fail(f"there is no job {identity}; `quern job list` shows some")
    guess = estimate.estimate(db, document, clock.now())
    row = {**_job_row(document), "place": guess.place, "seconds_left": guess.seconds}
    if as_json:
        emit_json({**row, "log": document["log"]})
        return
    emit([{"name": name, "value": value} for name, value in row.items()], ["name", "value"], False, "")
    click.echo()
    emit(
        [{**event, "data": event["data"] or ""} for event in document["log"]], ["seq", "type", "at", "data"], False, ""
    )


@job_group.command("cancel")
@click.argument("identity")
@json_option
def cancel_job(identity: str, as_json: bool) -> None:
    """Cancel a waiting job, or ask a running one to stop."""
    runtime = open_runtime()
    document = runtime.store.db.jobs.find_one({"_id": identity}, {"tenant": 1})
    if document is None:
        fail(f"there is no job {identity}; `quern job list` shows some")
    try:
        found = queue.cancel(runtime.store, runtime.registry, document["tenant"], identity)
    except queue.NotPossibleError as error:
        fail(str(error))
    if found is None:
        fail(f"there is no job {identity}; `quern job list` shows some")
    after, opened = found
    runtime.waker.wake_all(opened)
    record(runtime.store.db, entry(document["tenant"], "operator", "job.cancelled", identity))
    outcome = "asked to stop" if after["state"] == "running" else "cancelled"
    emit_outcome({"id": identity, "outcome": outcome}, as_json)


@click.group("queue")
def queue_group() -> None:
    """The queues."""


@queue_group.command("list")
@json_option
def list_queues(as_json: bool) -> None:
    """How many jobs stand where."""
    emit(_queues(), ["queue", "blocked", "queued", "running", "dead"], as_json, "No queues.")


def _queues() -> list[dict[str, Any]]:
    counts = queue.depth(open_runtime().store.db)
    states = ("blocked", "queued", "running", "dead")
    return [{"queue": name.value, **{state: counts[name.value].get(state, 0) for state in states}} for name in Queue]


@click.group("dead")
def dead_group() -> None:
    """Dead letters: jobs that failed for good."""


@dead_group.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_dead(limit: int, as_json: bool) -> None:
    """List dead letters and why they died."""
    found = queue.listing(open_runtime().store.db, None, state="dead", limit=limit)
    emit([_job_row(document) for document in found], JOB_COLUMNS, as_json, "No dead letters.")


@dead_group.command("replay")
@click.argument("identities", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Replay every dead letter.")
@json_option
def replay_dead(identities: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Run dead letters again, by IDENTITIES or --all."""
    runtime = open_runtime()
    if everything == bool(identities):
        fail("expected either identifiers or --all; `quern dead list` shows them")
    chosen: Any = identities
    if everything:
        chosen = [row["_id"] for row in runtime.store.db.jobs.find({"state": "dead"}, {"_id": 1})]
    done: list[str] = []
    for identity in chosen:
        try:
            document = queue.replay(runtime.store, None, identity)
        except queue.NotPossibleError as error:
            if everything:
                click.echo(f"{identity}: {error}", err=True)
                continue
            fail(f"{identity}: {error}")
        if document is None:
            fail(f"there is no job {identity}; `quern dead list` shows the dead ones")
        record(runtime.store.db, entry(document["tenant"], "operator", "job.replayed", identity))
        runtime.waker.wake(document["queue"])
        done.append(identity)
    emit_outcome({"jobs": done, "outcome": f"queued again: {len(done)}"}, as_json)


@click.group("audit")
def audit_group() -> None:
    """The audit log."""


@audit_group.command("verify")
@click.option("--expect", help="SEQ:SEAL noted at an earlier time: finds a chain cut off and sealed anew.")
@json_option
def verify_audit(expect: str | None, as_json: bool) -> None:
    """Check the whole chain, and answers against what was recorded when they came. Exits 1 when something is wrong."""
    runtime = open_runtime()
    noted = None
    if expect:
        number, _, seal = expect.partition(":")
        if not number.isdigit() or len(seal) != 64:
            fail("--expect: expected SEQ:SEAL as an earlier `quern audit verify` printed it")
        noted = (int(number), seal)
    found = chain.verify(runtime.store.db, chain.KeyRing(runtime.settings.required("audit_key")), noted)
    if as_json:
        emit_json(asdict(found))
    else:
        click.echo(f"sealed entries    {found.sealed}")
        click.echo(f"not sealed yet    {found.unsealed}")
        click.echo(f"contents checked  {found.contents_checked}, erased {found.contents_erased}")
        click.echo(f"head              {found.sealed}:{found.head}")
        for problem in found.problems:
            click.secho(f"PROBLEM           {problem}", fg="red")
        if not found.problems:
            click.echo("The chain holds. Keep the head elsewhere to find a cut-off tail with --expect.")
    if found.problems:
        raise SystemExit(1)


@audit_group.command("list")
@click.option("--tenant", "tenant_id", help="Only this tenant's.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_audit(tenant_id: str | None, limit: int, as_json: bool) -> None:
    """List entries, newest first."""
    found = open_runtime().store.db.audit.find({"tenant": tenant_id} if tenant_id else {}).sort("at", -1).limit(limit)
    rows = [{"id": row.pop("_id"), **row} for row in found]
    emit(rows, ["at", "seq", "tenant", "actor", "action", "subject"], as_json, "No entries.")


@click.command("status")
@json_option
def status(as_json: bool) -> None:
    """One look: responses, queues, dead letters, what waits to be relayed or sealed, the engine."""
    runtime = open_runtime()
    db = runtime.store.db
    try:
        engine: dict[str, Any] = dict(runtime.engine.stats())
    except EngineError as error:
        engine = {"away": str(error)}
    facts: dict[str, Any] = {
        "tenants": db.tenants.estimated_document_count(),
        "responses": db.responses.estimated_document_count(),
        "waiting_to_be_relayed": db.responses.count_documents({"outbox.at": {"$exists": True}}),
        "waiting_to_be_sealed": db.audit.count_documents({"pending": True}),
        "queues": _queues(),
        "engine": engine,
    }
    if as_json:
        emit_json(facts)
        return
    for name in ("tenants", "responses", "waiting_to_be_relayed", "waiting_to_be_sealed"):
        click.echo(f"{name.replace('_', ' '):24}{facts[name]}")
    click.echo(f"{'engine':24}{'away: ' + str(engine['away']) if 'away' in engine else 'ready'}")
    click.echo()
    emit(facts["queues"], ["queue", "blocked", "queued", "running", "dead"], False, "")


@click.command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Check every dependency; say what is wrong and what to run. Exits 1 when something is."""
    checks: list[tuple[str, Callable[[], str], str]] = [
        ("MongoDB", _check_mongodb, "systemctl status mongod; check QUERN_MONGODB_URI"),
        ("replica set", _check_replica_set, "rs.initiate() once: transactions need a replica set"),
        ("indexes", _check_indexes, "quern migrate"),
        ("Redis queue", _check_redis, "systemctl status redis@queue; check QUERN_REDIS_QUEUE_URL"),
        (
            "Redis policy",
            _check_redis_policy,
            "set `maxmemory-policy noeviction` and `appendonly yes` for Redis `queue`",
        ),
        ("engine", _check_engine, "systemctl status quern-engine; check QUERN_ENGINE_SOCKET"),
        ("mail relay", _check_mail, "set QUERN_MAIL__HOST and QUERN_MAIL__FROM_ADDRESS, or check the relay"),
        ("API", _check_api, "systemctl status quern-api@1; check QUERN_API_BIND"),
        ("events", _check_events, "systemctl status quern-events; check QUERN_EVENTS_BIND"),
        ("scheduler", _check_scheduler, "systemctl status quern-scheduler"),
        ("relay", _check_relay, "systemctl status quern-relay"),
        ("dead letters", _check_dead, "quern dead list"),
        ("disk", _check_disk, "free or add space where the database lives"),
    ]
    rows = []
    for name, check, remedy in checks:
        try:
            with pymongo.timeout(3.0):
                rows.append({"check": name, "ok": True, "found": check(), "run": ""})
        except (PyMongoError, RedisError, EngineError, OSError, RuntimeError) as error:
            found = str(error) if isinstance(error, RuntimeError | EngineError) else type(error).__name__
            rows.append({"check": name, "ok": False, "found": found, "run": remedy})
    if as_json:
        emit_json(rows)
    else:
        shown = [{**row, "ok": "ok" if row["ok"] else "WRONG"} for row in rows]
        emit(shown, ["check", "ok", "found", "run"], False, "")
    if not all(row["ok"] for row in rows):
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
    settings = open_runtime().settings.mail
    if settings is None:
        raise RuntimeError("no relay is configured; email steps will fail")
    with socket.create_connection((settings.host, settings.port), timeout=3):
        return f"{settings.host}:{settings.port} answers"


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


def _check_relay() -> str:
    first = open_runtime().store.db.responses.find_one(
        {"outbox.at": {"$exists": True}}, {"outbox.at": 1}, sort=[("outbox.at", 1)]
    )
    age = (clock.now() - first["outbox"]["at"]).total_seconds() if first else 0.0
    if broken := open_runtime().store.db.responses.count_documents({"unrelayed.at": {"$exists": True}}):
        raise RuntimeError(
            f"expected none, found {broken} responses whose outbox cannot be relayed; see the relay's log"
        )
    if age > 10:
        raise RuntimeError(f"expected outboxes to be relayed at once, found one that waits for {age:.0f} s")
    return f"lag {age:.1f} s"


def _check_dead() -> str:
    count = open_runtime().store.db.jobs.count_documents({"state": "dead"})
    if count:
        raise RuntimeError(f"expected none, found {count}")
    return "none"


def _check_disk() -> str:
    path = Path("/")
    stats = os.statvfs(path)
    free = stats.f_bavail / stats.f_blocks
    if free < 0.1:
        raise RuntimeError(f"expected 10 % free, found {free:.0%}")
    return f"{free:.0%} free"
