"""The comparison of the published warehouse with MongoDB, day by day; what differs is named, never shown."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics import follow, source
from quern.analytics.build import COMPARED, Sample
from quern.analytics.manifest import Manifest, Partition
from quern.analytics.partition import batches_of, measured
from quern.analytics.tally import COUNTED, Tally, add_rows
from quern.store.connection import Db

#: Rows named of one day.
_NAMED: Final = 20
_FACTS: Final = tuple(COUNTED)


@dataclass
class Finding:
    """One tenant's day on which the two differ."""

    tenant: str
    day: date
    problems: list[str]


@dataclass
class Verification:
    """What a comparison found."""

    days: int = 0
    responses: int = 0
    audit: int = 0
    changed_since: int = 0
    """Days that have changed since the publication, and so were not compared."""
    findings: list[Finding] = field(default_factory=list)
    missing_files: list[str] = field(default_factory=list)
    """Files that the manifest names and that are not there, or not what was written."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """What was compared, a row for each tenant's day: `responses_mongodb`, `responses_warehouse` and so on."""

    @property
    def holds(self) -> bool:
        return not self.findings and not self.missing_files


def verify(
    db: Db,
    manifest: Manifest,
    *,
    since: date | None = None,
    until: date | None = None,
    tenant: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare a published warehouse with what MongoDB holds now.

    Days that have changed since the publication are left to the next run. Jobs are compared as far as MongoDB still
    has them: it forgets them after a month, the warehouse does not.

    Raises:
        follow.TokenLostError: it is not known what has changed since; run `quern etl run` first.
        source.UnknownTenantError: there is no such tenant.
    """
    found = Verification(missing_files=damaged(manifest))
    if found.missing_files:
        return found
    changes = follow.drain(db, manifest.source.token) if manifest.source.token else None
    moved = changes.days if changes else set()
    wanted: set[tuple[str, date]] = set()
    low, high = since or date.min, until or date.max
    for name in source.tenants_asked_for(db, manifest.tenants, tenant):
        wanted |= {(name, day) for day in source.days(db, name, since, until)}
        for table in ("fact_response", "fact_audit"):
            for partition in manifest.partitions(table, name, since, until):
                wanted |= {(name, day) for day in days_in(manifest.root / partition.path) if low <= day < high}
    for number, (name, day) in enumerate(sorted(wanted)):
        progress(number, len(wanted))
        if (name, day) in moved:
            found.changed_since += 1
            continue
        problems = _verify_day(db, manifest, name, day, found)
        if problems:
            found.findings.append(Finding(name, day, problems))
    progress(len(wanted), len(wanted))
    return found


def _verify_day(db: Db, manifest: Manifest, tenant: str, day: date, found: Verification) -> list[str]:
    stored, sample, ids, kept_jobs = Tally(), Sample(), list[str](), set[str]()
    with source.snapshot(db) as session:
        reader = source.SpanReader(db, session, tenant, day, day)
        for chunk in reader.responses():
            stored.responses += len(chunk.documents)
            stored.response_hash = source.signed(stored.response_hash + sum(chunk.digests))
            stored.add_documents(chunk.documents)
            sample.offer(source.DayChunk(chunk.documents, chunk.digests, day=day))
            ids += [document["_id"] for document in chunk.documents]
        for first in range(0, len(ids), source.BATCH):
            for job in reader.jobs(ids[first : first + source.BATCH]):
                kept_jobs.add(job["_id"])
                stored.jobs += 1
                stored.attempts += job["attempt"]
        for chunk in reader.audit():
            stored.audit += len(chunk.documents)
            stored.audit_hash = source.signed(stored.audit_hash + sum(chunk.digests))
    there = Tally()
    files = {table: manifest.files(table, tenant, day, day + timedelta(days=1)) for table in _FACTS}
    for table, paths in files.items():
        more = {"fact_job": ["job"], "fact_answer": COMPARED}.get(table, [])
        for rows in _rows_of(paths, sorted({*COUNTED[table], *more}), day):
            if table == "fact_job":
                rows = rows.filter(pc.is_in(rows.column("job"), pa.array(sorted(kept_jobs), pa.string())))
            add_rows({day: there}, table, rows)
            if table == "fact_answer":
                sample.find(rows)
    found.days += 1
    found.responses += stored.responses
    found.audit += stored.audit
    found.figures.append({"tenant": tenant, "day": day.isoformat(), **_figures(stored, there)})
    problems = stored.differences(there) + [problem for _, problem in sample.differences()]
    if problems:
        problems += _named(db, tenant, day, files["fact_response"], files["fact_audit"])
    return problems


def _figures(stored: Tally, there: Tally) -> dict[str, Any]:
    sides = (("mongodb", stored.flat()), ("warehouse", there.flat()))
    return {f"{name}_{side}": value for side, values in sides for name, value in values.items()}


def _rows_of(paths: Iterable[Path], columns: list[str], day: date) -> Iterable[pa.RecordBatch]:
    for path in paths:
        for rows in batches_of(path, [*columns, "day"]):
            yield rows.filter(pc.equal(rows.column("day"), pa.scalar(day, pa.date32())))


def days_in(path: Path) -> set[date]:
    """The days that a partition has rows of."""
    found: set[date] = set()
    for rows in batches_of(path, ["day"]):
        found |= set(pc.unique(rows.column("day")).to_pylist())
    return found


def damaged(manifest: Manifest) -> list[str]:
    """Files of the manifest that are missing, or not as they were written."""
    found = []
    for tenants in manifest.tables.values():
        for partitions in tenants.values():
            for partition in partitions:
                path = manifest.root / partition.path
                if not path.exists():
                    found.append(f"{partition.path} is missing")
                elif measured(path)[1] != partition.hash:
                    found.append(f"{partition.path} is not what was written")
    return found


def differing_rows(db: Db, root: Path, tenant: str, day: date, partitions: dict[str, Partition]) -> list[str]:
    """The rows of a day's files that differ from MongoDB, by identifier."""
    paths = {
        table: [root / partitions[table].path] if table in partitions else []
        for table in ("fact_response", "fact_audit")
    }
    return _named(db, tenant, day, paths["fact_response"], paths["fact_audit"])


def _named(db: Db, tenant: str, day: date, responses: list[Path], audit: list[Path]) -> list[str]:
    with source.snapshot(db) as session:
        reader = source.SpanReader(db, session, tenant, day, day)
        pairs = (
            ("response", reader.hashes(), _hashes(responses, "response", day)),
            ("audit entry", reader.audit_hashes(), _hashes(audit, "entry", day)),
        )
    found = []
    for what, stored, there in pairs:
        found += [f"{what} {name} is missing in the warehouse" for name in sorted(stored.keys() - there.keys())]
        found += [f"{what} {name} is not in MongoDB" for name in sorted(there.keys() - stored.keys())]
        both = stored.keys() & there.keys()
        found += [f"{what} {name} differs" for name in sorted(both) if stored[name] != there[name]]
    return found[:_NAMED]


def _hashes(paths: list[Path], key: str, day: date) -> dict[str, int]:
    found: dict[str, Any] = {}
    for rows in _rows_of(paths, [key, "hash"], day):
        found.update(zip(rows.column(key).to_pylist(), rows.column("hash").to_pylist(), strict=True))
    return found
