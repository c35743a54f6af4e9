"""`python -P -s -m quern.analytics.sandbox_child`: one statement, run by a process that gave everything else up.

Standard input: a line of JSON (the order), then the SQL until its end, which is read when the process is confined.
Standard output: an empty line when it is confined; then one JSON object: `ok`, and the columns, types and rows; or what
went wrong. No Arrow here: importing it starts threads, and a process of several cannot be confined as a whole.
"""

import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any, Final

import duckdb
import orjson

from quern.analytics.confine import CONFINED, CannotConfineError, confine
from quern.analytics.wide import FIELDS, name, named, quote, wide

_MEGABYTE: Final = 1 << 20
#: Types whose values JSON has; the others travel as the text that DuckDB makes of them.
_PLAIN: Final = frozenset(
    {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
    | {"FLOAT", "DOUBLE", "VARCHAR"}
)
#: Where memory ends, this process is the first to go (proc_pid_oom_score_adj(5)).
_GIVES_WAY: Final = "1000"
#: No more of EXPLAIN's options than this is understood, so that none can hide where the statement begins.
_EXPLAIN: Final = re.compile(r"\s*EXPLAIN\s*(?:ANALYZE\b|\([A-Z_,\s]*\))?", re.IGNORECASE | re.ASCII)


def main() -> None:
    """Read the order, be confined, run the statement, say what came of it."""
    # A unit's sandbox may refuse it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_GIVES_WAY)
    order = orjson.loads(sys.stdin.buffer.readline())
    answer = _carry_out(order)
    _say(orjson.dumps(answer, default=str))


def _say(said: bytes) -> None:
    sys.stdout.buffer.write(said)
    sys.stdout.buffer.flush()


def _carry_out(order: dict[str, Any]) -> dict[str, Any]:
    # Before the walls go up: DuckDB crashes where it may not read its control group's limits.
    database = open_database(order)
    _rows(database.sql("SELECT 1 AS one, 'x' AS text, now() AS at, 1.5 AS part, [1] AS list"), 1)
    memory = order["memory_megabytes"]
    try:
        # Half for the engine's buffers, half for what it does not count, and for Python.
        confine(
            [Path(file) for file in order["files"]],
            memory_bytes=2 * memory * _MEGABYTE,
            cpu_seconds=order["cpu_seconds"],
            open_files=order["open_files"],
        )
    except (CannotConfineError, OSError) as error:
        return {"ok": False, "kind": "confinement", "text": str(error)}
    _say(CONFINED)
    try:
        return _run(database, order, sys.stdin.buffer.read().decode())
    except duckdb.CatalogException as error:
        said = str(error)[:4000]
        if said.startswith("Catalog Error: Table"):
            # DuckDB's own suggestions are of its own tables.
            said = f"{said.splitlines()[0]} The tables are {', '.join(order['tables'])}; DESCRIBE shows one's columns."
        return {"ok": False, "kind": "sql", "text": said}
    except duckdb.Error as error:
        return {"ok": False, "kind": "sql", "text": str(error)[:4000]}
    except (MemoryError, RuntimeError) as error:
        said = f"expected to need at most {memory} MB of memory, found more ({type(error).__name__})"
        return {"ok": False, "kind": "sql", "text": said}


def _run(database: duckdb.DuckDBPyConnection, order: dict[str, Any], sql: str) -> dict[str, Any]:
    statements = database.extract_statements(sql)
    if len(statements) != 1:
        return {"ok": False, "kind": "sql", "text": f"expected one statement, found {len(statements)}"}
    if order["check"] and (refused := _refused(database, statements[0])):
        return {"ok": False, "kind": "sql", "text": refused}
    _add_wide(database, sql)
    found = database.sql(sql)
    if found is None:
        return {"ok": True, "columns": [], "types": [], "rows": [], "more": False}
    return {"ok": True, **_rows(found, int(order["rows"]))}


def _add_wide(database: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Make the views `wide_<form>_<version>` that a statement names, of what is in its reach alone."""
    for form, version in sorted(named(sql)):
        if fields := database.execute(FIELDS, [form, version]).fetchall():
            view = name(f"wide_{form}_{version}")
            database.execute(f"CREATE VIEW {view} AS {wide(form, version, fields)}")


def _refused(database: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> str | None:
    """Why a statement may not be run; None for a SELECT and for the EXPLAIN of one."""
    if statement.type == duckdb.StatementType.EXPLAIN:
        # ANALYZE runs what it explains.
        prefix = _EXPLAIN.match(statement.query)
        try:
            explained = database.extract_statements(statement.query[prefix.end() :]) if prefix else []
        except duckdb.Error:
            explained = []
        if [item.type for item in explained] == [duckdb.StatementType.SELECT]:
            return None
        return "expected EXPLAIN, EXPLAIN ANALYZE or EXPLAIN (ANALYZE, …) and one SELECT, found another statement"
    if statement.type == duckdb.StatementType.SELECT:
        return None
    # A PIVOT that is to find its columns by itself is several statements.
    hint = "; PIVOT needs its columns: ON … IN (…)" if statement.type == duckdb.StatementType.MULTI else ""
    return f"expected a SELECT, found {statement.type.name}; nothing can be written or set here{hint}"


def open_database(order: dict[str, Any]) -> duckdb.DuckDBPyConnection:
    """A database in memory with the views of the order, and, unless the order leaves that wall out, locked settings."""
    config: dict[str, Any] = {
        # A process that has threads cannot be confined as a whole, and one that is may start none.
        "threads": "1",
        "async_threads": "0",
        "memory_limit": f"{order['memory_megabytes']}MB",
        "temp_directory": "",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
    }
    database = duckdb.connect(":memory:", config=config)
    for statement in order["views"]:
        database.execute(statement)
    if order["check"]:
        every = ", ".join(map(quote, order["files"]))
        database.execute(f"SET allowed_paths = [{every}]")
        database.execute("SET enable_external_access = false")
        database.execute("SET lock_configuration = true")
    return database


def _rows(found: duckdb.DuckDBPyRelation, most: int) -> dict[str, Any]:
    types = [str(kind) for kind in found.types]
    parts = [
        f"#{place}" if kind in _PLAIN else f"CAST(#{place} AS VARCHAR)" for place, kind in enumerate(types, start=1)
    ]
    rows = found.project(", ".join(parts)).limit(most + 1).fetchall()
    shown = [[_plain(value) for value in row] for row in rows[:most]]
    return {"columns": found.columns, "types": types, "rows": shown, "more": len(rows) > most}


def _plain(value: Any) -> Any:
    # JSON's writer takes whole numbers of 64 bits; a sum of them may be longer. It makes null of what is not finite.
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


if __name__ == "__main__":
    main()
