"""`quern analytics`, `sql`, `report`: the service that answers questions, and two ways to look without it."""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.store.clock import rfc3339

# The engine and Arrow are large: only a command that needs them loads them.
if TYPE_CHECKING:
    from quern.analytics.manifest import Manifest
    from quern.analytics.service import ProcessSettings


@click.command("analytics")
def analytics() -> None:
    """Serve questions over the warehouse (QUERN_ANALYTICS__SERVICE__SOCKET, QUERN_ANALYTICS__WAREHOUSE)."""
    # A process of its own, that loads nothing of MongoDB: this one has already.
    os.execv(sys.executable, [sys.executable, "-m", "quern.analytics"])  # noqa: S606


def _settings() -> "tuple[ProcessSettings, Path]":
    from pydantic import ValidationError

    from quern.analytics.service import ProcessSettings

    try:
        settings = ProcessSettings()
    except ValidationError as error:
        faults = [f"QUERN_{'__'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors()]
        fail("the configuration is not usable:\n" + "\n".join(faults))
    root = settings.analytics.warehouse
    if root is None:
        fail("expected the folder of the warehouse in QUERN_ANALYTICS__WAREHOUSE, found it not set")
    return settings, root


@click.command("sql")
@click.argument("statement", required=False)
@click.option("--tenant", "tenant_id", help="Only this tenant's rows are in reach; default: all tenants'.")
@click.option("--rows", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many.")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 3600), default=30.0, show_default=True, help="How long it may take."
)
@click.option("--memory", type=click.IntRange(64, 1 << 20), default=512, show_default=True, help="In MB.")
@json_option
def sql(statement: str | None, tenant_id: str | None, rows: int, seconds: float, memory: int, as_json: bool) -> None:
    """Run one SELECT over the warehouse; STATEMENT, or standard input. Nothing can be written.

    Tables: fact_response, fact_answer, fact_embedding, fact_audit, fact_job, dim_user, dim_form, dim_field, dim_time.
    """
    from quern.analytics import sandbox
    from quern.analytics.manifest import Manifest, NoWarehouseError

    _, root = _settings()
    text = sys.stdin.read() if statement is None else statement
    try:
        manifest = Manifest.load(root)
        tenants = _in_reach(manifest, tenant_id)
        found = sandbox.run(text, manifest, tenants, sandbox.Limits(seconds, memory, rows))
    except (NoWarehouseError, sandbox.SqlError, sandbox.SandboxError) as error:
        fail(str(error))
    if as_json:
        shown = {"columns": found.columns, "types": found.types, "rows": found.rows, "more": found.more}
        emit_json(shown | {"complete_until": rfc3339(manifest.freshness) if manifest.freshness else None})
        return
    names = _distinct(found.columns)
    emit([dict(zip(names, row, strict=True)) for row in found.rows], names, False, "No rows.", verbatim=True)
    more = "; there are more, see --rows" if found.more else ""
    fresh = rfc3339(manifest.freshness) if manifest.freshness else "-"
    rows_ = "1 row" if len(found.rows) == 1 else f"{len(found.rows)} rows"
    Console(stderr=True).print(f"{rows_}{more}; complete until {fresh}", style="dim")


def _in_reach(manifest: "Manifest", tenant: str | None) -> list[str]:
    """Whose rows are asked for: one tenant's, or all. Ends the command for one that the warehouse does not have."""
    if tenant is None:
        return list(manifest.tenants)
    if tenant not in manifest.tenants:
        fail(f"expected a tenant with rows in the warehouse, found {tenant!r}; `quern tenant list` has them all")
    return [tenant]


def _distinct(columns: list[str]) -> list[str]:
    """The names, each once: two columns may have the same."""
    made: list[str] = []
    for name in columns:
        made.append(name if name not in made else f"{name}_{len(made)}")
    return made


@click.command("report")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tenant", "tenant_id", help="Of this tenant; default: of all together.")
@click.option("--days", type=click.IntRange(1, 3660), default=90, show_default=True, help="Up to the last full day.")
@click.option("--zone", default="UTC", show_default=True, help="IANA time zone of its days.")
@json_option
def report(target: Path, tenant_id: str | None, days: int, zone: str, as_json: bool) -> None:
    """Write one HTML file with the usual questions and their plots to TARGET."""
    from pydantic import ValidationError

    from quern.analytics.answer import Warehouse
    from quern.analytics.engine import EngineError
    from quern.analytics.manifest import NoWarehouseError
    from quern.analytics.report import write_report
    from quern.analytics.service import make_engine

    settings, root = _settings()
    warehouse = Warehouse(root, make_engine(settings), seconds=settings.analytics.service.seconds * 5)
    try:
        _in_reach(warehouse.current(), tenant_id)
        until = (warehouse.current().freshness or datetime.now(UTC)).replace(minute=0, second=0, microsecond=0)
        made = write_report(warehouse, tenant_id, until - timedelta(days=days), until, zone)
    except (NoWarehouseError, EngineError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(item["msg"] for item in error.errors()))
    target.write_text(made, encoding="utf-8")
    target.chmod(0o640)
    size = len(made.encode())
    emit_outcome({"file": str(target), "bytes": size, "outcome": f"{target}: {size // 1024} KB"}, as_json)
