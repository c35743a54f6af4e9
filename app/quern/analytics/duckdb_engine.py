"""DuckDB, in process: the engine of a site with one machine. The library is loaded by the first statement."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from quern.analytics.engine import Dialect, EngineError, Parameter, Statement, TimedOutError, shaped
from quern.analytics.schema import Table
from quern.analytics.wide import quote

if TYPE_CHECKING:
    import duckdb

#: Seconds.
_INTERRUPTED_AGAIN: Final = 0.05
#: What most often stands between words, beside spaces.
_MARKS: Final = ".,!?-'\":;()/"
_TRUNCATED: Final = {"day", "week", "month", "quarter", "year"}


class DuckDbDialect(Dialect):
    """DuckDB 1.4 and later."""

    name = "duckdb"
    materializes = True
    most_rows = 2_000_000

    def scan(self, table: Table, files: Sequence[Path]) -> str:
        if not files:
            columns = ", ".join(f'NULL::{column.type.duckdb} AS "{column.name}"' for column in table.columns)
            return f"(SELECT {columns} WHERE false)"
        return f"read_parquet([{', '.join(quote(str(file)) for file in files)}])"

    def parameter(self, name: str, value: Parameter) -> str:
        # Said aloud, or a text that looks like a moment is guessed at.
        kind = {str: "VARCHAR", bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", datetime: "TIMESTAMP"}[type(value)]
        return f"${name}::{kind}"

    def local(self, x: str, zone: str) -> str:
        return f"timezone({zone}, timezone('UTC', {x}))"

    def bucket(self, grain: str, local: str) -> str:
        if grain in _TRUNCATED:
            return f"CAST(date_trunc('{grain}', {local}) AS DATE)"
        return f"date_trunc('{grain}', {local})"

    def weekday(self, local: str) -> str:
        return f"isodow({local})"

    def hour(self, local: str) -> str:
        return f"hour({local})"

    def periods(self, grain: str, first: str, last: str) -> str:
        return f"date_diff('{grain}', {first}, {last})"

    def quantile(self, x: str, share: float) -> str:
        return f"quantile_cont({x}, {share})"

    def plain(self, x: str) -> str:
        # Neither what is endless nor what is no number at all is below the bound, which the wide type still holds.
        whole = f"abs({x}) < 1e38 AND {x} = floor({x})"
        return f"CASE WHEN {whole} THEN CAST(CAST({x} AS HUGEINT) AS VARCHAR) ELSE CAST({x} AS VARCHAR) END"

    def terms(self, texts: str, shortest: str) -> str:
        # Counted text by text: to tell pairs of response and term apart, all of them would be kept until the end.
        one = "replace(lower(string_agg(text, chr(10))), 'ς', 'σ')"
        joined = f"SELECT {one} AS text FROM ({texts}) texts GROUP BY response"
        # To split a text costs a third of matching its words, and most texts have common marks only.
        spaced = "replace(text, chr(10), ' ')"
        for mark in _MARKS:
            spaced = f"replace({spaced}, {quote(mark)}, ' ')"
        other = quote(f"[^\\p{{L}}\\p{{N}} \\n{re.escape(_MARKS)}]")
        words = (
            f"CASE WHEN regexp_matches(text, {other}) THEN regexp_extract_all(text, '[\\p{{L}}\\p{{N}}]+') "
            f"ELSE string_split({spaced}, ' ') END"
        )
        counted = f"SELECT unnest(map_entries(list_aggregate({words}, 'histogram'))) AS term FROM ({joined}) joined"
        return (
            f"SELECT term.key AS c0, count(*) AS c1, sum(term.value)::BIGINT AS c2 FROM ({counted}) counted "
            f"WHERE length(term.key) >= {shortest} GROUP BY 1"
        )

    def cosine(self, x: str, y: str) -> str:
        return f"list_cosine_similarity({x}, {y})"

    def size(self, x: str) -> str:
        return f"len({x})"


class DuckDbEngine:
    """One database in memory that owns nothing: every statement reads Parquet files of the warehouse.

    It is opened by the first statement: until somebody asks, it is not worth its memory. The process may then read
    files under `root` only, and the settings are locked, whatever a statement says.
    """

    def __init__(self, root: Path, *, threads: int, memory_megabytes: int, spill: Path | None = None) -> None:
        self._dialect = DuckDbDialect()
        self._root = root
        self._config: dict[str, str | bool | int | float | list[str]] = {
            "threads": str(threads),
            "memory_limit": f"{memory_megabytes}MB",
            "temp_directory": str(spill) if spill else "",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "preserve_insertion_order": "false",
        }
        self._opening = threading.Lock()
        self._opened: duckdb.DuckDBPyConnection | None = None

    @property
    def _database(self) -> duckdb.DuckDBPyConnection:
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        database = duckdb.connect(":memory:", config=self._config)
        # Files never change, and a path is never used again: what was read of one once holds.
        database.execute("SET parquet_metadata_cache = true")
        database.execute(f"SET allowed_directories = [{quote(str(self._root.resolve()) + '/')}]")
        database.execute("SET enable_external_access = false")
        database.execute("SET lock_configuration = true")
        return database

    @property
    def dialect(self) -> Dialect:
        return self._dialect

    def run(self, statement: Statement, seconds: float) -> pa.Table:
        import duckdb

        cursor = self._database.cursor()
        try:
            with _interrupted_after(cursor, seconds) as interrupted:
                try:
                    found = self._found(cursor, statement)
                except duckdb.Error as error:
                    if interrupted.is_set():
                        raise TimedOutError(f"expected an answer within {seconds:g} s, found none") from None
                    raise EngineError(_first_line(error)) from error
        finally:
            cursor.close()
        return shaped(found, statement.shape)

    def _found(self, cursor: duckdb.DuckDBPyConnection, statement: Statement) -> pa.Table:
        if statement.rows is not None:
            cursor.register("parts", statement.rows)
        parameters = {
            name: value.replace(tzinfo=None) if isinstance(value, datetime) else value
            for name, value in statement.parameters.items()
        }
        return cursor.sql(statement.sql, params=parameters or None).to_arrow_table()

    def close(self) -> None:
        with self._opening:
            if self._opened is not None:
                self._opened.close()


def _first_line(error: duckdb.Error) -> str:
    return str(error).split("\n", 1)[0][:500]


@contextmanager
def _interrupted_after(cursor: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[threading.Event]:
    due, over = threading.Event(), threading.Event()

    def interrupt() -> None:
        pause = seconds
        while not over.wait(pause):
            # Again and again: where no statement is running yet, an interrupt is lost.
            due.set()
            cursor.interrupt()
            pause = _INTERRUPTED_AGAIN

    watching = threading.Thread(target=interrupt, name="interrupt", daemon=True)
    watching.start()
    try:
        yield due
    finally:
        over.set()
        watching.join()
