"""`quern form`, `audit`, `status`, `migrate`, `secret-key`: what an operator asks over SSH."""

from dataclasses import asdict
from typing import Any

import click
from cryptography.fernet import Fernet

from quern.audit import chain
from quern.cli.jobs import queues
from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.cli.runtime import open_runtime
from quern.inference.client import EngineError
from quern.migrations import migrate as run_migrations


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
        # Counted, for MongoDB's own figure is wrong after a power cut; by the index, for that is small.
        "tenants": db.tenants.count_documents({}, hint="_id_"),
        "responses": db.responses.count_documents({}, hint="_id_"),
        "waiting_to_be_relayed": db.responses.count_documents({"outbox.at": {"$exists": True}}),
        "waiting_to_be_sealed": db.audit.count_documents({"pending": True}),
        "queues": queues(),
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
