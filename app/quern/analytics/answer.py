"""Answering a question: the newest manifest, what the asker's forms have, the plan, the engine. No cache, no HTTP."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import orjson
import pyarrow as pa

from quern.analytics.engine import Engine, Part, Statement, TimedOutError
from quern.analytics.manifest import NAME, Manifest
from quern.analytics.plan import Asker, Copies, FieldInfo, FormVersion, files, plan
from quern.analytics.question import ColumnInfo, Freshness, Question
from quern.analytics.schema import DIM_FIELD, TABLES

_log = logging.getLogger(__name__)

_COPIED: Final = ("text", "number")
#: Rows of one answer; a question that has more is refused.
MOST_ROWS: Final = 200_000


class TooManyRowsError(ValueError):
    """The answer has more rows than is sensible; the text says what to do."""


@dataclass(frozen=True)
class Answer:
    """All rows of an answer, and how new they are."""

    table: pa.Table
    freshness: Freshness


class Parts(Protocol):
    """Where what was found in a file is kept for other questions."""

    def get_part(self, part: Part) -> pa.Table | None:
        """The rows of a part that reads one file, if they are known."""
        ...

    def put_part(self, part: Part, rows: pa.Table) -> bool:
        """Keep the rows of a part that reads one file; whether they are."""
        ...

    def drop_part(self, part: Part) -> None:
        """Keep them no more."""
        ...


class Warehouse:
    """A published warehouse, read by one engine. Safe to share between threads.

    `current` follows publications; one answer uses one manifest from beginning to end.
    """

    def __init__(self, root: Path, engine: Engine, *, seconds: float) -> None:
        self.root, self.engine, self.seconds = root, engine, seconds
        self._loaded: tuple[tuple[int, int], Manifest] | None = None
        self._askers: dict[tuple[int, str | None], Asker] = {}

    def current(self) -> Manifest:
        """The newest manifest. Raises NoWarehouseError."""
        try:
            stat = (self.root / NAME).stat()
        except FileNotFoundError:
            return Manifest.load(self.root)
        stamp = (stat.st_ino, stat.st_mtime_ns)
        if self._loaded is None or self._loaded[0] != stamp:
            self._loaded = (stamp, Manifest.load(self.root))
            self._askers = {}
        return self._loaded[1]

    def asker(self, manifest: Manifest, tenant: str | None) -> Asker:
        """A tenant, or with None the operator, and the fields that the forms in reach have."""
        key = (manifest.generation, tenant)
        if (known := self._askers.get(key)) is not None:
            return known
        bare = Asker(tuple(manifest.tenants) if tenant is None else (tenant,), operator=tenant is None)
        dialect = self.engine.dialect
        source = dialect.scan(DIM_FIELD, files(manifest, DIM_FIELD.name, bare, None, None))
        names = ("source", "path", "kind", "repeated", "form", "version", "text_column", "number_column")
        shape = pa.schema([TABLES["dim_field"].arrow.field(name) for name in names])
        sql = f"SELECT {', '.join(names)} FROM {source} f"
        fields: dict[str, FieldInfo] = {}
        steps: set[str] = set()
        rows = self.engine.run(Statement(sql, shape), self.seconds).to_pylist()
        for row in rows:
            if row["source"] == "result":
                steps.add(row["path"])
                continue
            name = f"answer.{row['path']}"
            before = fields.get(name, FieldInfo(frozenset(), False))
            # The options that are chosen in a field of its own differ; only in a group's items they may come again.
            repeats = row["repeated"] and not (row["kind"] == "multiple_choice" and "." not in row["path"])
            fields[name] = FieldInfo(before.kinds | {row["kind"]}, before.repeated or repeats)
        made = Asker(bare.tenants, bare.operator, fields, frozenset(steps), _copies(rows))
        self._askers[key] = made
        return made

    def answer(
        self, question: Question, tenant: str | None, *, parts: Parts | None = None, seconds: float | None = None
    ) -> Answer:
        """Compute an answer for a tenant, or with None for the operator.

        Args:
            parts: keeps what is found in single files, so that it need not be found again.
            seconds: how long it may take, else as long as any.

        Raises:
            NoWarehouseError, AskError, EngineError, TimedOutError: as they say.
            TooManyRowsError: it has more than MOST_ROWS rows.
        """
        manifest = self.current()
        statement = plan(question, self.engine.dialect, manifest, self.asker(manifest, tenant))
        table = self._run(statement, parts, self.seconds if seconds is None else seconds)
        if table.num_rows > MOST_ROWS:
            raise TooManyRowsError(
                f"expected at most {MOST_ROWS} rows, found {table.num_rows}; "
                "ask for fewer dimensions, a coarser grain or `top`"
            )
        return Answer(table, freshness(manifest))

    def _run(self, statement: Statement, kept: Parts | None, seconds: float) -> pa.Table:
        if not statement.parts:
            return self.engine.run(statement, seconds)
        due = time.monotonic() + seconds
        tables: list[pa.Table] = []
        known = 0
        try:
            for part in statement.parts:
                table, is_kept = self._part(part, kept, due)
                tables.append(table)
                known += is_kept
            whole = replace(statement, parts=(), rows=pa.concat_tables(tables))
            return self.engine.run(whole, due - time.monotonic())
        except TimedOutError:
            again = f", of which {known} are kept: ask again, it goes on from there, or" if known else ":"
            raise TimedOutError(
                f"expected an answer within {seconds:g} s, found {len(tables)} of {len(statement.parts)} parts of it"
                f"{again} ask for a shorter range"
            ) from None

    def _part(self, part: Part, kept: Parts | None, due: float) -> tuple[pa.Table, bool]:
        """A part's rows, and whether they need not be found again. Raises TimedOutError."""
        if time.monotonic() >= due:
            # A short statement would win against the clock that ends it.
            raise TimedOutError("expected time for another part, found none left")
        if kept is None or part.file is None:
            return self.engine.run(part.statement, due - time.monotonic()), False
        if (known := kept.get_part(part)) is not None:
            return known, True
        rows = self.engine.run(part.statement, due - time.monotonic())
        is_kept = kept.put_part(part, rows)
        # Replaced in the meantime, by an erasure perhaps: whoever cleans up after a publication may have been here.
        if is_kept and part.file not in self.current().paths:
            kept.drop_part(part)
            is_kept = False
        return rows, is_kept


def _copies(rows: list[dict[str, Any]]) -> Copies:
    """From the rows of `dim_field`."""
    columns: dict[str, dict[FormVersion, str]] = {}
    users: dict[str, set[FormVersion]] = {}
    without: set[str] = set()
    for row in rows:
        version = (row["form"], row["version"])
        text, number = (f"{kind}_{row[f'{kind}_column']}" if row[f"{kind}_column"] else None for kind in _COPIED)
        if row["source"] == "answer":
            named = {f"answer.{row['path']}": text or number}
        else:
            named = {f"result.{row['path']}.label": text, f"result.{row['path']}.score": number}
        for name, column in named.items():
            if column is None:
                without.add(name)
            else:
                columns.setdefault(name, {})[version] = column
                users.setdefault(column, set()).add(version)
    # A choice in one version and a number in another has no one type.
    without |= {name for name, found in columns.items() if len({column[:4] for column in found.values()}) > 1}
    return Copies(
        {name: found for name, found in columns.items() if name not in without},
        {column: frozenset(found) for column, found in users.items()},
    )


def freshness(manifest: Manifest) -> Freshness:
    """The stamp of what a manifest holds."""
    return Freshness(
        generation=manifest.generation, published_at=manifest.published_at, complete_until=manifest.freshness
    )


def stamp(manifest: Manifest, tenant: str | None) -> str:
    """What changes exactly when a tenant's own part of the warehouse does: the key of what is kept of its answers."""
    from hashlib import sha256

    tenants = manifest.tenants if tenant is None else [tenant]
    paths = [
        item.path for table in sorted(manifest.tables) for each in tenants for item in manifest.partitions(table, each)
    ]
    return sha256(orjson.dumps(paths)).hexdigest()[:32]


def columns(question: Question, shape: pa.Schema) -> list[ColumnInfo]:
    """What an answer's columns are, for a client."""
    from quern.analytics.question import MEASURES

    unit = MEASURES[question.measure].unit
    measured = {"sum", "mean", "min", "max", "p50", "p75", "p90", "p95", "p99"}
    return [
        ColumnInfo(name=field.name, type=_kind(field.type), unit=unit if field.name in measured else "")
        for field in shape
    ]


def _kind(type_: pa.DataType) -> str:
    if pa.types.is_date(type_):
        return "day"
    if pa.types.is_timestamp(type_):
        return "moment"
    if pa.types.is_integer(type_):
        return "whole"
    return "number" if pa.types.is_floating(type_) else "text"
