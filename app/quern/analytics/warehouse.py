"""From built days to the next warehouse: months merged, dimensions made, a manifest published, old files deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics import dimensions, schema, wide
from quern.analytics.build import open_duckdb
from quern.analytics.integrity import days_in
from quern.analytics.manifest import ALL, SHARED, Manifest, Partition, Retired, is_month
from quern.analytics.partition import PartitionWriter, batches_of
from quern.analytics.unflushed import Unflushed
from quern.analytics.wide import quote
from quern.analytics.work import Span, Work
from quern.store.connection import Db

_DATED: Final = [table for table in schema.FACTS if table.dated]
SPILL: Final = "spill"
#: Rows of a merged file after which freed memory is given back.
_GIVE_BACK_AFTER: Final = 100_000
_SUFFIXES: Final = (".parquet", ".writing")


class MergeError(Exception):
    """A month's file does not hold the rows of its days; nothing was published."""


def month_of(day: date) -> str:
    return day.isoformat()[:7]


def is_closed(month: str, today: date, after_days: int) -> bool:
    """Whether a month ended at least `after_days` days ago: its days become one file."""
    following = (date.fromisoformat(f"{month}-01") + timedelta(days=31)).replace(day=1)
    return today >= following + timedelta(days=after_days)


class Assembly:
    """Puts a run's built days into the manifest that it started from."""

    def __init__(
        self,
        manifest: Manifest,
        work: Work,
        *,
        today: date,
        compact_after_days: int,
        memory: str,
        threads: int,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._manifest, self._work, self._today, self._after = manifest, work, today, compact_after_days
        self._memory, self._threads, self._pause = memory, threads, pause
        self._generation = manifest.generation + 1

    def assemble(self) -> Manifest:
        """The warehouse with every built day in its place, and every closed month in one file.

        Raises:
            MergeError: a merged file does not hold what it was made of.
        """
        made = self._manifest
        tenants = {tenant for tenant, _ in self._work.built} | set(made.tenants)
        spill, spans = self._work.root / SPILL, self._work.spans
        with open_duckdb(self._memory, self._threads, spill) as connection:
            for tenant in sorted(tenants):
                built = [span for span in spans if span.tenant == tenant]
                for table in _DATED:
                    made = made.with_partitions(table.name, tenant, self._table(connection, table, tenant, built))
        return made

    def _table(
        self,
        connection: duckdb.DuckDBPyConnection,
        table: schema.Table,
        tenant: str,
        built: list[Span],
    ) -> list[Partition]:
        replaced = {day for span in built for day in span.days}
        kept: list[Partition] = []
        old_months: dict[str, Partition] = {}
        days: dict[str, list[Partition]] = {}
        for partition in self._manifest.partitions(table.name, tenant):
            if is_month(partition.period):
                old_months[partition.period] = partition
            elif date.fromisoformat(partition.period) not in replaced:
                days.setdefault(partition.period[:7], []).append(partition)
        for span in built:
            found = span.tables.get(table.name)
            if found is not None:
                days.setdefault(found.period[:7], []).append(found)
        touched = {month_of(day) for day in replaced}
        for month in sorted({*old_months, *days}):
            old, news = old_months.get(month), days.get(month, [])
            if old is not None and month in touched and days_in(self._work.root / old.path) <= replaced:
                # Nothing of it stays, so there is nothing to merge with.
                old = None
            if old is not None and month not in touched:
                kept.append(old)
            elif old is None and not is_closed(month, self._today, self._after):
                kept += news
            elif old is None and [item.period for item in news] == [month]:
                # Built as one, and sorted.
                kept += news
            elif news or old is not None:
                again = sorted(day for day in replaced if month_of(day) == month)
                merged = self._merge(connection, table, tenant, month, old, again, news)
                if merged is not None:
                    kept.append(merged)
        return kept

    def _merge(
        self,
        connection: duckdb.DuckDBPyConnection,
        table: schema.Table,
        tenant: str,
        month: str,
        old: Partition | None,
        replaced: list[date],
        news: list[Partition],
    ) -> Partition | None:
        """One file of a month's rows: those of `old` but for the days in `replaced`, and all of `news`."""
        place = (table.name, tenant, month)
        if place in self._work.merged:
            return self._work.merged[place]
        self._pause()
        columns = ", ".join(wide.name(column) for column in table.names)
        # A view takes no parameters: the paths, our own, are written out.
        parts = []
        if news:
            parts.append(f"SELECT {columns} FROM {self._files(news)}")  # noqa: S608 - own names
        if old is not None:
            where = " AND ".join(f"day <> DATE '{day}'" for day in replaced) or "true"
            parts.append(f"SELECT {columns} FROM {self._files([old])} WHERE {where}")  # noqa: S608 - own names
        connection.execute(f"CREATE OR REPLACE TEMP VIEW merging AS {' UNION ALL '.join(parts)}")
        merged = self._append(table, tenant, month, old, replaced, news)
        expected = _fingerprint(connection, "merging")
        found: tuple[int, int | None] = (0, None)
        if merged is not None:
            found = _fingerprint(connection, f"(SELECT {columns} FROM {self._files([merged])})")  # noqa: S608
        if found != expected:
            raise MergeError(f"{table.name} of {tenant} in {month}: expected {expected[0]} rows, found {found[0]}")
        if merged is not None:
            before = [*news, *([old] if old else [])]
            explained, unsettled = all(item.explained for item in before), any(item.unsettled for item in before)
            merged = replace(merged, explained=explained, unsettled=unsettled)
            written = Unflushed()
            written.add(self._work.root / merged.path)
            written.flush()
        self._work.merged[place] = merged
        self._work.save()
        if merged is not None and merged.rows > _GIVE_BACK_AFTER:
            # As after building, see `etl`.
            pa.default_memory_pool().release_unused()
        return merged

    def _append(
        self,
        table: schema.Table,
        tenant: str,
        month: str,
        old: Partition | None,
        replaced: list[date],
        news: list[Partition],
    ) -> Partition | None:
        """One file of the rows of `old`, but for the days in `replaced`, and of `news`.

        They are ordered already, as far as a writer's memory goes, and stay so: a merge needs no more memory than that,
        however large the month is.
        """
        root, gone = self._work.root, pa.array(replaced, pa.date32())
        with PartitionWriter(root, table, tenant, month, self._generation) as writer:
            for partition in [*([old] if old else []), *sorted(news, key=lambda item: item.period)]:
                for rows in batches_of(root / partition.path, table.names):
                    if partition is old:
                        rows = rows.filter(pc.invert(pc.is_in(rows.column("day"), gone)))
                    whole = rows.cast(table.arrow)
                    writer.write_sorted(pa.RecordBatch.from_arrays(whole.columns, schema=table.arrow))
            return writer.close()

    def _files(self, partitions: list[Partition]) -> str:
        listed = ", ".join(quote(str(self._work.root / item.path)) for item in partitions)
        return f"read_parquet([{listed}])"


def _fingerprint(connection: duckdb.DuckDBPyConnection, relation: str) -> tuple[int, int | None]:
    """Number of rows, and a hash of all values in them whatever their order."""
    sql = f"SELECT count(*), bit_xor(hash(merged)) FROM {relation} AS merged"  # noqa: S608 - own names
    rows, value = connection.execute(sql).fetchall()[0]
    return int(rows), value


def with_dimensions(db: Db, manifest: Manifest, tenants: set[str]) -> Manifest:
    """The warehouse with the dimensions of some tenants, and the calendar, as they are now."""
    made, generation = manifest, manifest.generation + 1
    for tenant in sorted(tenants):
        for name, rows in dimensions.of_tenant(db, tenant).items():
            made = _with_all(made, schema.TABLES[name], tenant, generation, rows)
    if not made.partitions("dim_time", SHARED):
        made = _with_all(made, schema.DIM_TIME, SHARED, generation, dimensions.time())
    return made


def _with_all(manifest: Manifest, table: schema.Table, tenant: str, generation: int, rows: pa.RecordBatch) -> Manifest:
    with PartitionWriter(manifest.root, table, tenant, ALL, generation) as writer:
        writer.write(rows)
        partition = writer.close()
    before = manifest.partitions(table.name, tenant)
    if partition is not None and before and before[0].hash == partition.hash:
        # Nothing has changed: readers keep what they have in memory.
        (manifest.root / partition.path).unlink()
        return manifest
    return manifest.with_partitions(table.name, tenant, [partition] if partition else [])


def prune(root: Path, manifest: Manifest, work: Work | None, *, keep: timedelta, now: datetime) -> int:
    """Delete every file that no reader can need any more; returns how many.

    Kept are the files of the manifest, of the work in progress, and those replaced less than `keep` ago: a reader that
    loaded the manifest before that is done by now, or reads what it has open.
    """
    needed = manifest.paths | _held(manifest.retired, keep, now)
    if work is not None:
        needed |= work.paths
    deleted = 0
    tenants = root / "tenants"
    for path in sorted(tenants.glob("*/*/*")):
        if path.suffix in _SUFFIXES and path.relative_to(root).as_posix() not in needed:
            path.unlink(missing_ok=True)
            deleted += 1
    for folder in sorted(tenants.glob("*/*"), reverse=True) + sorted(tenants.glob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    shutil.rmtree(root / SPILL, ignore_errors=True)
    return deleted


def _held(retired: tuple[Retired, ...], keep: timedelta, now: datetime) -> set[str]:
    return {item.path for item in retired if item.at.astimezone(UTC) > now - keep}


def clean_extract(root: Path) -> None:
    """Delete what a killed run was writing into the extract."""
    for path in root.glob("*/*/.*.writing"):
        path.unlink(missing_ok=True)
