"""`quern analytics`, `ask`, `sql`, `report`: the service that answers questions, and three ways to look without it."""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import click
from rich.console import Console

from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.store.clock import rfc3339

# The engine and Arrow are large: only a command that needs them loads them.
if TYPE_CHECKING:
    from pydantic import ValidationError

    from quern.analytics.answer import Answer, Warehouse
    from quern.analytics.chart import ChartFormat
    from quern.analytics.manifest import Manifest
    from quern.analytics.question import AnswerPage, Question
    from quern.analytics.render import Format
    from quern.analytics.service import ProcessSettings

#: How many times as long as a client's question one of the operator may take.
_PATIENCE: Final = 5
#: What is no text, and so nothing for a screen.
_BINARY: Final = frozenset({"parquet", "arrow", "png"})


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


def _warehouse() -> "Warehouse":
    """The published warehouse with the engine that the settings name; ends the command where there is none."""
    from quern.analytics.answer import Warehouse
    from quern.analytics.service import NotConfiguredError, make_engine

    settings, root = _settings()
    try:
        return Warehouse(root, make_engine(settings), seconds=settings.analytics.service.seconds * _PATIENCE)
    except NotConfiguredError as error:
        fail(str(error))


@click.command("ask")
@click.argument("question")
@click.option("--tenant", "tenant_id", help="Of this tenant; default: of all, who are then the dimension `tenant`.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "parquet", "arrow", "svg", "png"]),
    default="table",
    show_default=True,
    help="What is printed or written.",
)
@click.option(
    "--rows", type=click.IntRange(1, 200_000), default=100, show_default=True, help="At most so many, of a table."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of standard output.")
@json_option
def ask(question: str, tenant_id: str | None, form: str, rows: int, output: Path | None, as_json: bool) -> None:
    """Answer one QUESTION: JSON as the API takes it (docs/analytics.md), or `-` for standard input.

    A table ends after --rows; whatever else is printed has every row.
    """
    from quern.analytics.answer import TooManyRowsError
    from quern.analytics.engine import EngineError
    from quern.analytics.manifest import NoWarehouseError
    from quern.analytics.plan import AskError

    form = "json" if as_json else form
    if output is None and form in _BINARY and sys.stdout.isatty():
        fail(f"expected --output FILE or a pipe for {form}, found a terminal")
    if output is not None and form == "table":
        fail("expected --format json, csv, parquet, arrow, svg or png with --output, found a table")
    asked = _question(sys.stdin.read() if question == "-" else question)
    warehouse = _warehouse()
    try:
        _in_reach(warehouse.current(), tenant_id)
        answer = warehouse.answer(asked, tenant_id)
    except (NoWarehouseError, EngineError, AskError, TooManyRowsError) as error:
        fail(str(error))
    if form == "table":
        shown = _page(asked, answer, rows).model_dump(mode="json")["rows"]
        names = asked.columns
        emit([dict(zip(names, row, strict=True)) for row in shown], names, False, "No rows.", verbatim=True)
    elif output is None:
        click.echo(_rendered(asked, answer, form), nl=False)
    else:
        _write(output, _rendered(asked, answer, form))
    count = answer.table.num_rows
    _say_how_many(
        min(count, rows) if form == "table" else count,
        form == "table" and count > rows,
        answer.freshness.complete_until,
    )


def _question(text: str) -> "Question":
    """The question of a text; ends the command for one that is none, with what was expected and found of each part."""
    from pydantic import ValidationError

    from quern.analytics.question import Question

    try:
        return Question.model_validate_json(text)
    except ValidationError as error:
        fail("the question is not usable:\n" + "\n".join(_faults(error)))


def _faults(error: "ValidationError") -> list[str]:
    made = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"]))
        found = f", found {str(item['input'])[:100]!r}" if isinstance(item["input"], str | int | float) else ""
        made.append(f"{place}: {item['msg']}{found}" if place else f"{item['msg']}{found}")
    return made


def _page(question: "Question", answer: "Answer", rows: int) -> "AnswerPage":
    """The first rows as the API gives them."""
    from quern.analytics.answer import columns
    from quern.analytics.desk import plain_rows
    from quern.analytics.question import AnswerPage

    return AnswerPage(
        columns=columns(question, answer.table.schema),
        rows=plain_rows(answer.table.slice(0, rows)),
        total_rows=answer.table.num_rows,
        freshness=answer.freshness,
        cached=False,
        next_cursor=None,
    )


def _rendered(question: "Question", answer: "Answer", form: str) -> bytes:
    if form == "json":
        return _page(question, answer, answer.table.num_rows).model_dump_json(indent=2).encode() + b"\n"
    if form == "svg" or form == "png":
        from quern.analytics.chart import chart

        return chart(question, answer.table, cast("ChartFormat", form), until=answer.freshness.complete_until)
    from quern.analytics.render import render

    return render(answer, cast("Format", form))


def _write(target: Path, made: bytes) -> None:
    """A file that others cannot read."""
    target.write_bytes(made)
    target.chmod(0o640)


def _say_how_many(rows: int, more: bool, until: datetime | None) -> None:
    beyond = "; there are more, see --rows" if more else ""
    fresh = rfc3339(until) if until else "-"
    Console(stderr=True).print(
        f"{'1 row' if rows == 1 else f'{rows} rows'}{beyond}; complete until {fresh}", style="dim"
    )


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

    Tables: fact_response, fact_answer, fact_embedding, fact_audit, fact_job, dim_user, dim_form, dim_field, dim_time;
    wide_<form>_<version>: one version's responses with a column for each field.
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
    _say_how_many(len(found.rows), found.more, manifest.freshness)


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

    from quern.analytics.engine import EngineError
    from quern.analytics.manifest import NoWarehouseError
    from quern.analytics.report import write_report

    warehouse = _warehouse()
    try:
        _in_reach(warehouse.current(), tenant_id)
        until = (warehouse.current().freshness or datetime.now(UTC)).replace(minute=0, second=0, microsecond=0)
        made = write_report(warehouse, tenant_id, until - timedelta(days=days), until, zone)
    except (NoWarehouseError, EngineError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(item["msg"] for item in error.errors()))
    _write(target, made.encode())
    size = len(made.encode())
    emit_outcome({"file": str(target), "bytes": size, "outcome": f"{target}: {size // 1024} KB"}, as_json)
