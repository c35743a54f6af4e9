"""The comparison of the published warehouse with MongoDB, day by day; what differs is named, never shown."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics import extract, follow, source
from quern.analytics.manifest import Manifest, Partition
from quern.analytics.partition import batches_of, measured
from quern.analytics.sample import COMPARED, READ, Leaf, Sample, differs, equal
from quern.analytics.tally import COUNTED, Tally, add_rows, leaves_of, rows_as_leaves
from quern.analytics.version import Versions
from quern.jobs.model import ENDED
from quern.store.connection import Db, Document

#: Rows of a table that are named of one day.
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
    """What was compared, a row for each tenant's day: `responses_mongodb`, `responses_warehouse` and so on; and how
    many `problems` were found, which there may be, field by field, where all figures are equal."""

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
    extracts: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare a published warehouse, and the extract where there is one, with what MongoDB holds now.

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
    moved, versions = changes.days if changes else set(), Versions(db)
    wanted: set[tuple[str, date]] = set()
    low, high = since or date.min, until or date.max
    for name in source.tenants_asked_for(db, manifest.tenants, tenant):
        wanted |= {(name, day) for day in source.days(db, name, since, until)}
        if extracts is not None:
            wanted |= {(name, day) for day in extract.days_of(extracts, name) if low <= day < high}
        for table in ("fact_response", "fact_audit"):
            for partition in manifest.partitions(table, name, since, until):
                wanted |= {(name, day) for day in days_in(manifest.root / partition.path) if low <= day < high}
    for number, (name, day) in enumerate(sorted(wanted)):
        progress(number, len(wanted))
        if (name, day) in moved:
            found.changed_since += 1
            continue
        problems = _verify_day(db, versions, manifest, name, day, found, extracts)
        if problems:
            found.findings.append(Finding(name, day, problems))
    progress(len(wanted), len(wanted))
    return found


def _verify_day(
    db: Db,
    versions: Versions,
    manifest: Manifest,
    tenant: str,
    day: date,
    found: Verification,
    extracts: Path | None,
) -> list[str]:
    stored, sample, jobs = Tally(), Sample(versions), dict[str, int | None]()
    forms: dict[str, tuple[str, int]] = {}
    with source.snapshot(db) as session:
        reader = source.SpanReader(db, session, tenant, day, day)
        for chunk in reader.responses():
            stored.responses += len(chunk.documents)
            stored.response_hash = source.signed(stored.response_hash + sum(chunk.digests))
            stored.add_documents(chunk.documents)
            sample.offer(source.DayChunk(chunk.documents, chunk.digests, day=day))
            forms |= {document["_id"]: (document["form"], document["version"]) for document in chunk.documents}
        for job in _jobs(reader, list(forms)):
            jobs[job["_id"]] = job["attempt"] if job["state"] in ENDED else None
            if job["state"] in ENDED:
                sample.offer_job(day, job, *forms.get(job["subject"] or "", (None, None)))
        for chunk in reader.audit():
            stored.audit += len(chunk.documents)
            stored.audit_hash = source.signed(stored.audit_hash + sum(chunk.digests))
            sample.offer_audit(source.DayChunk(chunk.documents, chunk.digests, day=day))
    there = Tally()
    known, moving = pa.array(sorted(jobs), pa.string()), {job for job, attempts in jobs.items() if attempts is None}
    files = {table: manifest.files(table, tenant, day, day + timedelta(days=1)) for table in _FACTS}
    for table, paths in files.items():
        for rows in _rows_of(paths, sorted({*COUNTED[table], *READ[table]} - {"day"}), day):
            sample.find(table, rows)
            if table == "fact_job":
                rows = rows.filter(pc.is_in(rows.column("job"), known))
                moving |= _not_ended(rows)
                rows = _without_attempts(rows, moving)
            add_rows({day: there}, table, rows)
    stored.jobs = len(jobs)
    stored.attempts = sum(attempts or 0 for job, attempts in jobs.items() if job not in moving)
    found.days += 1
    found.responses += stored.responses
    found.audit += stored.audit
    problems = stored.differences(there) + [problem for _, problem in sample.differences(moving)]
    if problems:
        problems += _named(db, tenant, day, files)
    if extracts is not None:
        problems += extract.differences(extracts, tenant, day, stored)
    figures = {"tenant": tenant, "day": day.isoformat(), **_figures(stored, there), "problems": len(problems)}
    found.figures.append(figures)
    return problems


def _jobs(reader: source.SpanReader, responses: list[str]) -> Iterator[Document]:
    """A day's jobs: those of its responses, and those that work on none."""
    for first in range(0, len(responses), source.BATCH):
        yield from reader.jobs(responses[first : first + source.BATCH])
    for piece in reader.own_jobs():
        yield from piece


def _not_ended(rows: pa.RecordBatch) -> set[str]:
    ended = pc.is_in(rows.column("state"), pa.array(sorted(ENDED), pa.string()))
    return set(rows.column("job").filter(pc.invert(ended)).to_pylist())


def _without_attempts(rows: pa.RecordBatch, moving: set[str]) -> pa.RecordBatch:
    """The same, the attempts of those that have not ended, here or there, being 0: they still change."""
    still = pc.is_in(rows.column("job"), pa.array(sorted(moving), pa.string()))
    place = rows.schema.get_field_index("attempts")
    attempts = pc.if_else(still, pa.scalar(0, pa.int32()), rows.column("attempts"))
    return rows.set_column(place, "attempts", attempts)


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
    paths = {table: [root / partitions[table].path] if table in partitions else [] for table in _FACTS}
    return _named(db, tenant, day, paths)


def _named(db: Db, tenant: str, day: date, files: dict[str, list[Path]]) -> list[str]:
    """What differs of each table, _NAMED of each at most: every row of the day is looked at."""
    with source.snapshot(db) as session:
        reader = source.SpanReader(db, session, tenant, day, day)
        stored = reader.hashes()
        found = _apart("response", stored, _hashes(files["fact_response"], "response", day))
        found += _apart("audit entry", reader.audit_hashes(), _hashes(files["fact_audit"], "entry", day))
        found += _apart_jobs({job["_id"]: job for job in _jobs(reader, sorted(stored))}, files["fact_job"], day)
        found += _bounded(_answers_apart(reader, files["fact_answer"], day))
        found += _bounded(_vectors_apart(reader, files["fact_embedding"], day))
    return found


def _apart(what: str, stored: dict[str, int], there: dict[str, int]) -> list[str]:
    found = [f"{what} {name} is missing in the warehouse" for name in sorted(stored.keys() - there.keys())]
    found += [f"{what} {name} is not in MongoDB" for name in sorted(there.keys() - stored.keys())]
    both = stored.keys() & there.keys()
    found += [f"{what} {name} differs" for name in sorted(both) if stored[name] != there[name]]
    return _bounded(found)


def _apart_jobs(jobs: dict[str, Document], files: list[Path], day: date) -> list[str]:
    """Jobs that are missing, or have ended on both sides and differ; MongoDB forgets jobs, the warehouse does not."""
    there: dict[str, int] = {}
    moving = {name for name, job in jobs.items() if job["state"] not in ENDED}
    for rows in _rows_of(files, ["job", "state", "attempts"], day):
        there.update(zip(rows.column("job").to_pylist(), rows.column("attempts").to_pylist(), strict=True))
        moving |= _not_ended(rows)
    found = [f"job {name} is missing in the warehouse" for name in sorted(jobs.keys() - there.keys())]
    both = (jobs.keys() & there.keys()) - moving
    found += [f"job {name} differs" for name in sorted(both) if jobs[name]["attempt"] != there[name]]
    return _bounded(found)


def _answers_apart(reader: source.SpanReader, files: list[Path], day: date) -> Iterator[str]:
    """Every field of every response that differs. Sums of hashes tell whose do, so nothing but these is held."""
    sums: dict[str, int] = {}
    for rows in _rows_of(files, COMPARED, day):
        for row in rows.to_pylist():
            for key, value in rows_as_leaves([row]).items():
                sums[row["response"]] = sums.get(row["response"], 0) + _mark(key, value)
    differing: dict[str, dict[Leaf, Any]] = {}
    more: list[str] = []
    for chunk in reader.responses():
        for document in chunk.documents:
            leaves = leaves_of(document)
            apart = sum(_mark(key, value) for key, value in leaves.items()) != sums.pop(document["_id"], 0)
            if apart and len(differing) < _NAMED:
                differing[document["_id"]] = leaves
            elif apart:
                more.append(document["_id"])
    there: dict[str, list[dict[str, Any]]] = {name: [] for name in differing}
    wanted = pa.array(list(differing), pa.string())
    for rows in _rows_of(files, COMPARED, day):
        for row in rows.filter(pc.is_in(rows.column("response"), wanted)).to_pylist():
            there[row["response"]].append(row)
    for name, leaves in differing.items():
        found = rows_as_leaves(there[name])
        keys = leaves.keys() | found.keys()
        # Where no field differs a row comes twice.
        yield f"response {differs(name, [key for key in keys if not equal(leaves.get(key), found.get(key))])}"
    yield from (f"response {differs(name, [])}" for name in more)
    yield from (f"response {name}: its answers are not in MongoDB" for name in sorted(sums))


def _mark(key: Leaf, value: Any) -> int:
    """A hash of one field, the same for values that are equal on both sides (within this process)."""
    if isinstance(value, bool):
        return hash((key, "bool", value))
    if isinstance(value, int | float):
        return hash((key, "nan" if value != value else float(value)))
    return hash((key, value))


def _vectors_apart(reader: source.SpanReader, files: list[Path], day: date) -> Iterator[str]:
    there: Counter[tuple[str, str]] = Counter()
    for rows in _rows_of(files, ["response", "step"], day):
        there.update(zip(rows.column("response").to_pylist(), rows.column("step").to_pylist(), strict=True))
    for chunk in reader.responses():
        for document in chunk.documents:
            for step, result in (document.get("results") or {}).items():
                if isinstance(result, dict) and isinstance(result.get("vector"), list):
                    if there[document["_id"], step] < 1:
                        yield f"response {document['_id']}: {step}.vector is missing in the warehouse"
                    there[document["_id"], step] -= 1
    yield from (f"response {name}: {step}.vector is not in MongoDB" for (name, step), left in there.items() if left > 0)


def _bounded(lines: Iterable[str]) -> list[str]:
    every = iter(lines)
    found = list(islice(every, _NAMED))
    more = sum(1 for _ in every)
    return [*found, f"and {more} more"] if more else found


def _hashes(paths: list[Path], key: str, day: date) -> dict[str, int]:
    found: dict[str, Any] = {}
    for rows in _rows_of(paths, [key, "hash"], day):
        found.update(zip(rows.column(key).to_pylist(), rows.column("hash").to_pylist(), strict=True))
    return found
