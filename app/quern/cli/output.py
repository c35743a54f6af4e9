"""What the command prints: tables for people, JSON for programs."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quern.store.clock import rfc3339

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def emit_json(value: Any) -> None:
    """One JSON value, indented."""

    def other(item: Any) -> Any:
        return rfc3339(item) if isinstance(item, datetime) else str(item)

    options = orjson.OPT_INDENT_2 | orjson.OPT_PASSTHROUGH_DATETIME
    click.echo(orjson.dumps(value, default=other, option=options).decode())


def emit(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, empty: str, *, verbatim: bool = False
) -> None:
    """Rows as a table with `columns`, or all of them as JSON; `verbatim`: the columns' names are somebody else's."""
    if as_json:
        emit_json(list(rows))
        return
    if not rows:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(_cell(column)) if verbatim else column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def emit_outcome(facts: Mapping[str, Any], as_json: bool) -> None:
    """What a command did: its `outcome` for people, all of `facts` as JSON."""
    if as_json:
        emit_json(dict(facts))
    else:
        click.echo(facts["outcome"])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return rfc3339(value)
    text = str(value)
    return "".join(character if character.isprintable() else "·" for character in text)


def fail(message: str) -> NoReturn:
    """End with what was expected, what was found and what to run."""
    raise click.ClickException(message)
