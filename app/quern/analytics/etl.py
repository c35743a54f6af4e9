"""One run of the ETL: what has changed since the last, rewritten day by day, compared with MongoDB, published.

Killed at any point it leaves the published warehouse as it was, and what it has built so far for the next run. Two runs
at once are one: the second finds the lock taken.
"""

import ctypes
import fcntl
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pymongo.errors import OperationFailure, PyMongoError

from quern.analytics import follow, source, warehouse
from quern.analytics.build import Builder, Built
from quern.analytics.integrity import days_in, differing_rows
from quern.analytics.manifest import NAME as MANIFEST
from quern.analytics.manifest import (
    REPORT,
    Manifest,
    NoWarehouseError,
    OtherFormatError,
    Source,
    load_or_empty,
    write_atomically,
)
from quern.analytics.settings import AnalyticsSettings
from quern.analytics.warehouse import is_closed, month_of
from quern.analytics.work import Span, TenantDay, Work
from quern.store import clock
from quern.store.connection import Db, is_away

_log = logging.getLogger(__name__)

_LOCK: Final = ".lock"
#: SnapshotTooOld, SnapshotUnavailable, CursorNotFound: the day is read again.
_READ_AGAIN: Final = frozenset({239, 246, 43})
_TRIES: Final = 30
_SAVE_EVERY: Final = 5.0
#: Documents of days that are built together: some ten seconds of work, as a snapshot of MongoDB must not grow old.
_TOGETHER: Final = 200_000
#: Documents of days that nobody asked for that are built with those before and after them.
_BETWEEN: Final = 2000
#: Documents between two moments at which freed memory is given back: seldom enough to cost nothing (15 ms).
_GIVE_BACK_AFTER: Final = 100_000
#: New objects between two looks for cycles of garbage. Documents make none, and the looks cost a tenth of a run.
_COLLECT_AFTER: Final = 200_000
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_ARENA_MAX: Final = -8
#: Heaps of the C library, as many as threads work at once: the top of any but the first is never given back.
_ARENAS: Final = 3
#: Problems that a report quotes.
_QUOTED: Final = 100


class BusyError(Exception):
    """Another run holds the warehouse."""


class MismatchError(Exception):
    """The warehouse would not be equal to MongoDB: nothing was published. `report` says which rows."""

    def __init__(self, report: "Report") -> None:
        super().__init__(f"{report.mismatched_days} days differ from MongoDB; nothing was published")
        self.report = report


class NotConfiguredError(Exception):
    """There is no folder for a warehouse; the text says what to set."""


@dataclass
class Report:
    """What a run did. Without personal data: identifiers, paths and counts only."""

    outcome: str = "running"
    """running, published, unchanged, mismatch or failed."""
    started: datetime | None = None
    ended: datetime | None = None
    seconds: float = 0.0
    generation: int = 0
    freshness: datetime | None = None
    days: int = 0
    documents: int = 0
    events: int = 0
    """Of the change stream."""
    deleted_files: int = 0
    mismatched_days: int = 0
    problems: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """What the operator should know: why a range was rewritten, for example."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    done: int
    total: int
    documents: int
    at: str


@dataclass(frozen=True)
class Range:
    """Days of [since, until) to rewrite whether they have changed or not; of one tenant, or of all."""

    since: date | None = None
    until: date | None = None
    tenant: str | None = None


class Etl:
    """Runs over one warehouse."""

    def __init__(
        self,
        db: Db,
        settings: AnalyticsSettings,
        *,
        jobs_kept: timedelta = timedelta(days=30),
        pause: Callable[[], None] = lambda: None,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`pause` is called often: it may raise to stop the run, which the next one continues.

        Raises:
            NotConfiguredError: no folder is set.
        """
        if settings.warehouse is None:
            raise NotConfiguredError(
                "expected a folder for the warehouse, found none; set QUERN_ANALYTICS__WAREHOUSE, "
                "for example to /var/lib/quern/warehouse"
            )
        self._db, self._settings, self.root = db, settings, settings.warehouse
        self._pause, self._progress = pause, progress
        self._builder = Builder(
            db,
            self.root,
            settings.extract,
            compression=settings.jsonl_compression,
            jobs_kept=jobs_kept,
            pause=pause,
        )
        self._keep = timedelta(seconds=settings.keep_replaced_seconds)

    def run(self, asked: Range | None = None, *, everything: bool = False) -> Report:
        """Bring the warehouse up to now. `asked`: rewrite these days as well; `everything`: all of them.

        Raises:
            BusyError: another run is at it. MismatchError: what was built is not what MongoDB holds.
            source.UnknownTenantError: `asked` is about a tenant that there is not.
            PyMongoError: MongoDB stayed away; the next run goes on.
        """
        with self._locked(), _seldom_collecting():
            began, report = time.monotonic(), Report(started=clock.now())
            try:
                self._run(report, asked, everything)
            except MismatchError:
                report.outcome = "mismatch"
                raise
            except BaseException:
                report.outcome = "failed"
                raise
            finally:
                report.ended, report.seconds = clock.now(), round(time.monotonic() - began, 3)
                write_atomically(self.root / REPORT, orjson.dumps(asdict(report), option=orjson.OPT_UTC_Z))
        return report

    def _run(self, report: Report, asked: Range | None, everything: bool) -> None:
        manifest = self._manifest(anew=everything)
        work = Work.resume(manifest)
        begun = clock.now()
        self._find_out(manifest, work, report, begun, asked, everything)
        work.save()
        report.days = len(work.pending) + len(work.built)
        self._build(manifest, work, report, begun.date())
        if not work.built and not work.dimensions and manifest.generation:
            # Nothing has changed: only the moment is written, so that the stream goes on from there.
            made = manifest
            report.outcome = "unchanged"
        else:
            report.outcome = "published"
            # What building held is given back before a merge takes DuckDB's share.
            pa.default_memory_pool().release_unused()
            assembly = warehouse.Assembly(
                manifest,
                work,
                today=begun.date(),
                compact_after_days=self._settings.compact_after_days,
                memory=self._settings.memory,
                threads=self._settings.threads,
                pause=self._pause,
            )
            made = assembly.assemble()
            made = warehouse.with_dimensions(self._db, made, work.dimensions)
        if made.paths == manifest.paths and manifest.generation:
            report.outcome = "unchanged"
        published = made.publish(keep=self._keep, freshness=begun, source=work.source, at=clock.now())
        work.forget()
        report.generation, report.freshness, report.said = published.generation, begun, work.said
        report.deleted_files = self._prune(published, None)

    def _manifest(self, *, anew: bool) -> Manifest:
        """The warehouse to go on from: none where it is of another version, or with `anew` not readable."""
        try:
            return load_or_empty(self.root)
        except NoWarehouseError as error:
            if not anew and not isinstance(error, OtherFormatError):
                raise
            _log.warning("the warehouse is made anew", extra={"error": str(error)})
            (self.root / MANIFEST).unlink()
            return Manifest(self.root)

    def _find_out(
        self,
        manifest: Manifest,
        work: Work,
        report: Report,
        begun: datetime,
        asked: Range | None,
        everything: bool,
    ) -> None:
        """Write into `work` what has to be done, and from where the next run goes on."""
        if work.source.token is None or everything:
            # The stream's present first: what changes while the days are listed is seen by the next run.
            token = follow.head(self._db)
            work.source = Source(token, begun)
            self._want_all(manifest, work)
            return
        try:
            changes = follow.drain(self._db, work.source.token, self._pause)
        except follow.TokenLostError as error:
            self._fall_back(manifest, work, begun, str(error))
        else:
            report.events = changes.events
            work.source = Source(changes.token, begun)
            if changes.everything:
                work.said.append("a collection was dropped or renamed: every day is rewritten")
                self._want_all(manifest, work)
            work.want(changes.days)
            work.dimensions |= changes.tenants | {tenant for tenant, _ in changes.days}
            for collection, identifiers in changes.deleted.items():
                work.want(self._days_of_deleted(manifest, collection, identifiers))
        work.want(follow.settled(self._db, manifest))
        if asked is not None:
            self._want_range(manifest, work, asked)

    def _fall_back(self, manifest: Manifest, work: Work, begun: datetime, why: str) -> None:
        seen = work.source.seen or begun
        token = follow.head(self._db)
        tenants = source.tenants(self._db)
        days = follow.since_then(self._db, tenants, seen, self._settings.fallback_days)
        first = seen.date() - timedelta(days=self._settings.fallback_days)
        days |= {item for item in self._days_in(manifest) if item[1] >= first}
        said = f"{why}: {len(days)} days since {first} are rewritten instead; compare all with `quern etl verify`"
        _log.warning("the change stream was lost", extra={"days": len(days), "since": first.isoformat()})
        work.said.append(said)
        work.source = Source(token, begun)
        work.want(days)
        work.dimensions |= set(tenants)

    def _want_all(self, manifest: Manifest, work: Work) -> None:
        self._want_range(manifest, work, Range())

    def _want_range(self, manifest: Manifest, work: Work, asked: Range) -> None:
        tenants = source.tenants_asked_for(self._db, manifest.tenants, asked.tenant)
        low, high = asked.since or date.min, asked.until or date.max
        for tenant in tenants:
            self._pause()
            stored = source.days(self._db, tenant, asked.since, asked.until)
            known = {day for who, day in self._days_in(manifest, tenant) if low <= day < high}
            work.want((tenant, day) for day in stored.keys() | known)
            work.dimensions.add(tenant)

    def _days_in(self, manifest: Manifest, tenant: str | None = None) -> set[TenantDay]:
        """Days that the warehouse has rows of."""
        found: set[TenantDay] = set()
        for table in ("fact_response", "fact_audit", "fact_job"):
            for who, partitions in manifest.tables.get(table, {}).items():
                if tenant is None or who == tenant:
                    for partition in partitions:
                        found |= {(who, day) for day in days_in(self.root / partition.path)}
        return found

    def _days_of_deleted(self, manifest: Manifest, collection: str, identifiers: set[str]) -> set[TenantDay]:
        """The days of documents that MongoDB has no more, from the warehouse."""
        table, key = ("fact_response", "response") if collection == "responses" else ("fact_audit", "entry")
        found: set[TenantDay] = set()
        for tenant, partitions in manifest.tables.get(table, {}).items():
            for partition in partitions:
                wanted = [(key, "in", sorted(identifiers))]
                rows = pq.read_table(self.root / partition.path, columns=["day", key], filters=wanted)
                found |= {(tenant, day) for day in rows.column("day").unique().to_pylist()}
        return found

    def _build(self, manifest: Manifest, work: Work, report: Report, today: date) -> None:
        total, saved, given_back = len(work.pending), time.monotonic(), 0
        for tenant, first, last, period in self._spans(work.pending, today):
            self._progress(Progress(total - len(work.pending), total, report.documents, f"{tenant} {first}"))
            built = self._build_span(tenant, first, last, period, manifest, today)
            report.documents += built.documents
            if built.problems:
                report.mismatched_days += len(built.problems)
                for day, problems in built.problems.items():
                    named = differing_rows(self._db, self.root, tenant, day, built.partitions)
                    report.problems += [f"{tenant} {day}: {problem}" for problem in [*problems, *named]]
                continue
            work.done(Span(tenant, first, last, built.partitions))
            if report.documents - given_back >= _GIVE_BACK_AFTER:
                # Each heap and thread keeps the most that it ever needed, and no two need it at once: without this, a
                # long run comes to hold the sum of what each of its parts held at some time.
                pa.default_memory_pool().release_unused()
                given_back = report.documents
            if time.monotonic() - saved > _SAVE_EVERY:
                self._builder.unflushed.flush()
                work.save()
                saved = time.monotonic()
        self._builder.unflushed.flush()
        work.save()
        self._progress(Progress(total, total, report.documents, "publishing"))
        if report.mismatched_days:
            report.problems = report.problems[:_QUOTED]
            raise MismatchError(report)

    def _spans(self, pending: Iterable[TenantDay], today: date) -> Iterator[tuple[str, date, date, str]]:
        """The days to build: tenant, first, last, and the period of the files.

        Days of a closed month are built together as long as they are few documents: small files cost more than their
        rows. Where that is a whole month, the file is the month's already and need not be merged.
        """
        months = groupby(sorted(pending), key=lambda item: (item[0], month_of(item[1])))
        for (tenant, month), found in months:
            days = [day for _, day in found]
            if not is_closed(month, today, self._settings.compact_after_days):
                yield from ((tenant, day, day, day.isoformat()) for day in days)
                continue
            self._pause()
            stored = source.days(self._db, tenant, days[0], days[-1] + timedelta(days=1)) if len(days) > 1 else {}
            spans = list(_together(days, stored))
            for first, last in spans:
                yield tenant, first, last, month if len(spans) == 1 else f"{first}_{last}"

    def _build_span(self, tenant: str, first: date, last: date, period: str, manifest: Manifest, today: date) -> Built:
        for attempt in range(_TRIES):
            self._pause()
            try:
                return self._builder.build(tenant, first, last, period, manifest.generation + 1, manifest, today)
            except PyMongoError as error:
                again = isinstance(error, OperationFailure) and error.code in _READ_AGAIN
                if attempt == _TRIES - 1 or not (again or is_away(error)):
                    raise
                _log.warning("a day is read again", extra={"tenant": tenant, "error": type(error).__name__})
                time.sleep(min(0.2 * 2**attempt, 5.0))
        raise AssertionError("the loop returns or raises")

    def prune(self) -> int:
        """Delete what no reader can need any more; returns the number of files.

        Raises:
            BusyError: a run is at it, which prunes at its end.
        """
        with self._locked():
            manifest = load_or_empty(self.root)
            if self._settings.extract is not None:
                # Not in a run, which goes on with the days that a killed one was writing: this looks at every day.
                warehouse.clean_extract(self._settings.extract)
            return self._prune(manifest, Work.resume(manifest))

    def _prune(self, manifest: Manifest, work: Work | None) -> int:
        return warehouse.prune(self.root, manifest, work, keep=self._keep, now=clock.now())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the warehouse. The kernel lets go of it when the process ends, however it ends."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o750)
        handle = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    "another run of the ETL holds the warehouse; wait for it, or see `quern etl status`"
                ) from None
            yield
        finally:
            os.close(handle)


def keep_freed_memory() -> None:
    """Keep what this process frees for its next documents: giving it back and asking again is a fifth of a run.

    So Arrow, too, takes its memory from the C library, and glibc's is told to keep it (mallopt(3)). What Arrow's
    writers take for themselves follows `ARROW_DEFAULT_MEMORY_POOL`, which is read as it is loaded (`cli.etl`).
    """
    pa.set_memory_pool(pa.system_memory_pool())
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        mallopt(_M_TOP_PAD, 32 << 20)
        mallopt(_M_ARENA_MAX, _ARENAS)


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _together(days: list[date], stored: dict[date, int]) -> Iterator[tuple[date, date]]:
    """Spans from the first of `days` to the last, each with _TOGETHER documents at most, or a single day.

    The days between two that were asked for are built as well where they have at most _BETWEEN documents.
    """
    first = last = days[0]
    size = stored.get(first, 0)
    for day in days[1:]:
        between = sum(stored.get(last + timedelta(days=number), 0) for number in range(1, (day - last).days))
        more = between + stored.get(day, 0)
        if size + more > _TOGETHER or between > _BETWEEN:
            yield first, last
            first, size = day, stored.get(day, 0)
        else:
            size += more
        last = day
    yield first, last
