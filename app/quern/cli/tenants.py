"""`quern tenant` and `quern key`."""

from typing import Any

import click

from quern.audit.entry import entry, record
from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.cli.runtime import open_runtime
from quern.jobs.queue import transact
from quern.tenants import keys
from quern.tenants import tenant as tenants


@click.group()
def tenant() -> None:
    """Whose forms, responses and keys are whose."""


@tenant.command("create")
@click.argument("name")
@click.option(
    "--requests-per-minute",
    type=click.IntRange(0, 1_000_000),
    help="For all of its keys together; 0: no limit. Default: QUERN_REQUESTS_PER_MINUTE.",
)
@json_option
def create_tenant(name: str, requests_per_minute: int | None, as_json: bool) -> None:
    """Make a tenant called NAME, and its first secret key (shown once)."""
    store = open_runtime().store

    def work(session: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
        made = tenants.create(store.db, name, requests_per_minute=requests_per_minute, session=session)
        key, whole = keys.create(store.db, made["_id"], "first", session=session)
        record(store.db, entry(made["_id"], "operator", "tenant.created", made["_id"]), session)
        record(store.db, entry(made["_id"], "operator", "key.created", key["_id"]), session)
        return made, key, whole

    made, key, whole = transact(store, work)
    if as_json:
        emit_json({"id": made["_id"], "name": name, "key_id": key["_id"], "key": whole})
    else:
        click.echo(f"tenant {made['_id']}\nkey    {whole}\n")
        click.echo("The key cannot be shown again. It has every scope; make narrower ones with `quern key create`.")


@tenant.command("list")
@json_option
def list_tenants(as_json: bool) -> None:
    """List tenants."""
    rows = [{"id": row.pop("_id"), **row} for row in tenants.listing(open_runtime().store.db)]
    emit(
        rows,
        ["id", "name", "created", "suspended", "requests_per_minute"],
        as_json,
        "No tenants. `quern tenant create NAME`",
    )


def _suspend(identity: str, suspended: bool, as_json: bool) -> None:
    store = open_runtime().store

    def work(session: Any) -> Any:
        found = tenants.suspend(store.db, identity, suspended, session)
        if found:
            action = "tenant.suspended" if suspended else "tenant.resumed"
            record(store.db, entry(identity, "operator", action, identity), session)
        return found

    if transact(store, work) is None:
        fail(f"there is no tenant {identity}; `quern tenant list` shows them")
    outcome = "suspended: its keys are refused within two seconds" if suspended else "resumed"
    emit_outcome({"id": identity, "suspended": suspended, "outcome": outcome}, as_json)


@tenant.command("suspend")
@click.argument("identity")
@json_option
def suspend_tenant(identity: str, as_json: bool) -> None:
    """Refuse every key of a tenant; nothing is deleted."""
    _suspend(identity, True, as_json)


@tenant.command("resume")
@click.argument("identity")
@json_option
def resume_tenant(identity: str, as_json: bool) -> None:
    """Accept a suspended tenant's keys again."""
    _suspend(identity, False, as_json)


@click.group()
def key() -> None:
    """API keys: made, listed, revoked."""


@key.command("create")
@click.option("--tenant", "tenant_id", required=True, help="Whose.")
@click.option("--name", required=True, help="What it is for.")
@click.option("--publishable", is_flag=True, help="For web pages: can only submit.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(sorted(keys.SCOPES)), help="Repeat; default: all.")
@click.option(
    "--requests-per-minute",
    type=click.IntRange(0, 1_000_000),
    help="Its own limit; above the tenant's it replaces that, 0: no limit. Default: the tenant's.",
)
@json_option
def create_key(
    tenant_id: str,
    name: str,
    publishable: bool,
    scopes: tuple[str, ...],
    requests_per_minute: int | None,
    as_json: bool,
) -> None:
    """Make a key; it is shown once."""
    store = open_runtime().store
    if tenants.get(store.db, tenant_id) is None:
        fail(f"there is no tenant {tenant_id}; `quern tenant list` shows them")

    def work(session: Any) -> tuple[dict[str, Any], str]:
        made, whole = keys.create(
            store.db,
            tenant_id,
            name,
            kind="publishable" if publishable else "secret",
            scopes=list(scopes) or None,
            requests_per_minute=requests_per_minute,
            session=session,
        )
        record(store.db, entry(tenant_id, "operator", "key.created", made["_id"]), session)
        return made, whole

    try:
        made, whole = transact(store, work)
    except keys.UnknownScopeError as error:
        fail(str(error))
    if as_json:
        emit_json({"id": made["_id"], "key": whole})
    else:
        click.echo(whole)


@key.command("list")
@click.option("--tenant", "tenant_id", required=True)
@json_option
def list_keys(tenant_id: str, as_json: bool) -> None:
    """List a tenant's keys (never the secrets)."""
    rows = [
        {"id": row["_id"], **{name: row[name] for name in row if name not in ("_id", "hash")}}
        for row in keys.listing(open_runtime().store.db, tenant_id, limit=10_000)
    ]
    emit(rows, ["id", "name", "kind", "hint", "created", "last_used", "revoked"], as_json, "No keys.")


@key.command("revoke")
@click.option("--tenant", "tenant_id", required=True)
@click.argument("identity")
@json_option
def revoke_key(tenant_id: str, identity: str, as_json: bool) -> None:
    """Refuse a key from now on."""
    store = open_runtime().store

    def work(session: Any) -> Any:
        found = keys.revoke(store.db, tenant_id, identity, session)
        if found:
            record(store.db, entry(tenant_id, "operator", "key.revoked", identity), session)
        return found

    if transact(store, work) is None:
        fail(f"tenant {tenant_id} has no key {identity}; `quern key list --tenant {tenant_id}` shows them")
    outcome = "revoked: refused everywhere within two seconds"
    emit_outcome({"id": identity, "revoked": True, "outcome": outcome}, as_json)
