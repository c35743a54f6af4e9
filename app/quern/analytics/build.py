"""Building a tenant's day, or a span of days: read, flatten, write, read back, compare.

What comes out is a set of new files that nobody reads yet, and the proof that they hold what MongoDB held at one
moment: counts, hashes and sums of each day, and some of its documents field by field.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from quern.analytics import extract, schema, source, wide
from quern.analytics.flatten import RESPONSE_OF_JOB, Flattener, audit_rows, job_rows, own_job_rows
from quern.analytics.manifest import Manifest, Partition
from quern.analytics.partition import PartitionWriter, batches_of
from quern.analytics.sample import READ, SAMPLE, Sample
from quern.analytics.tally import COUNTED, Tally, add_rows
from quern.analytics.unflushed import Unflushed
from quern.analytics.version import Versions
from quern.jobs.model import ENDED
from quern.store.connection import Db, Document

_FACTS: Final = ("fact_response", "fact_answer", "fact_embedding", "fact_audit", "fact_job")
_MERGED_ROWS: Final = 65_536


@dataclass
class Built:
    """What was built of a tenant's days from `first` to `last`."""

    tenant: str
    first: date
    last: date
    partitions: dict[str, Partition]
    """By table; a table without rows is absent."""
    tallies: dict[date, Tally]
    problems: dict[date, list[str]] = field(default_factory=dict)
    """Why it must not be published."""
    documents: int = 0
    """Read from MongoDB, of all collections."""


class Builder:
    """Builds days into the warehouse's directory."""

    def __init__(
        self,
        db: Db,
        warehouse: Path,
        extracts: Path | None,
        *,
        compression: extract.Compression = "zstd",
        jobs_kept: timedelta,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """`extracts`: where JSONL and Parquet of the documents go; None: nowhere. `jobs_kept`: how long MongoDB keeps
        jobs. `pause` is called between chunks: it may sleep, or raise to stop."""
        self._db, self._warehouse, self._extracts, self._compression = db, warehouse, extracts, compression
        self._jobs_kept, self._pause = jobs_kept, pause
        self._versions = Versions(db)
        self.unflushed = Unflushed()
        """What was built since its last flush, which must come before anything says that it is there."""

    def build(
        self, tenant: str, first: date, last: date, period: str, generation: int, before: Manifest, today: date
    ) -> Built:
        """Write the files of the days from `first` to `last`, as those of a period.

        `before`: where rows of jobs are that MongoDB has forgotten.

        Raises:
            PyMongoError: MongoDB is away, or the snapshot is too old; build it again.
        """
        days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
        with ExitStack() as stack:
            session = stack.enter_context(source.snapshot(self._db))
            reader = source.SpanReader(self._db, session, tenant, first, last)
            behind = stack.enter_context(ThreadPoolExecutor(1, "writing"))
            writers = {
                name: stack.enter_context(
                    PartitionWriter(self._warehouse, schema.TABLES[name], tenant, period, generation, behind=behind)
                )
                for name in _FACTS
            }
            extracts = [
                stack.enter_context(
                    extract.Extract(self._extracts, tenant, name, columns, self._compression, self.unflushed)
                )
                for name, columns in (("responses", extract.RESPONSES), ("audit", extract.AUDIT))
                if self._extracts is not None
            ]
            tallies, sample = {day: Tally() for day in days}, Sample(self._versions, SAMPLE * len(days))
            explained, unsettled = self._write_responses(reader, writers, extracts[:1], tallies, sample)
            unsettled = self._write_own_jobs(reader, writers["fact_job"], tallies, sample) or unsettled
            self._write_audit(reader, writers, extracts[1:], tallies, sample)
            partitions = {name: made for name, writer in writers.items() if (made := writer.close()) is not None}
            if "fact_response" in partitions:
                partitions["fact_response"] = replace(partitions["fact_response"], explained=explained)
            carried = self._carry_jobs(partitions, tenant, days, period, generation, before, today)
            if "fact_job" in partitions:
                partitions["fact_job"] = replace(partitions["fact_job"], unsettled=unsettled)
            problems: dict[date, list[str]] = {day: [] for day in days}
            for day, problem in self._miscounted(reader, tallies):
                problems[day].append(problem)
            documents = sum(tally.responses + tally.audit + tally.jobs for tally in tallies.values())
            for day, (rows, attempts) in carried.items():
                tallies[day].jobs += rows
                tallies[day].attempts += attempts
            found = read_back(self._warehouse, partitions, days, sample)
            for day in days:
                problems[day] += tallies[day].differences(found[day])
            for day, problem in sample.differences():
                problems[day].append(problem)
            for file in extracts:
                for day, problem in file.differences(tallies):
                    problems[day].append(problem)
            for file in extracts:
                if any(problems.values()):
                    file.abandon()
                else:
                    file.replace(days)
            for made in partitions.values():
                self.unflushed.add(self._warehouse / made.path)
        problems = {day: listed for day, listed in problems.items() if listed}
        return Built(tenant, first, last, partitions, tallies, problems, documents)

    def _miscounted(self, reader: source.SpanReader, tallies: dict[date, Tally]) -> Iterator[tuple[date, str]]:
        """Days of which another number of documents was read than MongoDB's indexes have at this moment."""
        for name, stored in reader.counts().items():
            for day, tally in tallies.items():
                found = getattr(tally, name)
                if found != stored.get(day, 0):
                    yield day, f"{name}: {found} were read, {stored.get(day, 0)} are in MongoDB's index"

    def _write_responses(
        self,
        reader: source.SpanReader,
        writers: dict[str, PartitionWriter],
        extracts: list[extract.Extract],
        tallies: dict[date, Tally],
        sample: Sample,
    ) -> tuple[bool, bool]:
        """Whether every value was what its form's version says; whether a job goes on though its response has ended."""
        explained, unsettled, flattener, size = True, False, Flattener(), 0
        working: dict[str, Document] = {}

        def flush() -> None:
            nonlocal flattener, explained, unsettled, working, size
            for table, rows in flattener.batches():
                writers[table.name].write(rows)
            explained = explained and flattener.explained
            unsettled = self._write_jobs(reader, writers["fact_job"], tallies, sample, working) or unsettled
            flattener, working, size = Flattener(), {}, 0

        for chunk in reader.responses():
            self._pause()
            for part in chunk.by_day("created"):
                tally = tallies[part.day]
                for document, digest in zip(part.documents, part.digests, strict=True):
                    flattener.add(document, self._versions.get(document["form"], document["version"]), digest)
                    working[document["_id"]] = {name: document[name] for name in RESPONSE_OF_JOB}
                tally.add_documents(part.documents)
                sample.offer(part)
                tally.responses += len(part.documents)
                tally.response_hash = source.signed(tally.response_hash + sum(part.digests))
                for file in extracts:
                    file.write(part)
            size += chunk.size
            if flattener.count >= source.BATCH or size >= source.BATCH_BYTES:
                flush()
        if flattener.count:
            flush()
        return explained, unsettled

    def _write_jobs(
        self,
        reader: source.SpanReader,
        writer: PartitionWriter,
        tallies: dict[date, Tally],
        sample: Sample,
        responses: dict[str, Document],
    ) -> bool:
        """Whether one of the jobs goes on though its response has ended: its end changes no response."""
        unsettled = False
        count = reader.count_jobs(list(responses))
        jobs = reader.jobs(list(responses)) if count else []
        if jobs:
            writer.write(job_rows(jobs, responses))
        for job in jobs:
            response = responses[job["subject"]]
            day = response["created"].date()
            tallies[day].jobs += 1
            tallies[day].attempts += job["attempt"]
            sample.offer_job(day, job, response["form"], response["version"])
            if job["state"] not in ENDED and response["status"] != "processing":
                unsettled = True
        if len(jobs) != count:
            # Fewer or more than the index has: no day may be published with them.
            last = next(reversed(responses.values()))
            tallies[last["created"].date()].jobs += count - len(jobs)
        return unsettled

    def _write_own_jobs(
        self, reader: source.SpanReader, writer: PartitionWriter, tallies: dict[date, Tally], sample: Sample
    ) -> bool:
        """Write the jobs that work on no response; whether one of them has not ended."""
        unsettled, left, last = False, reader.count_own_jobs(), max(tallies)
        for jobs in reader.own_jobs():
            self._pause()
            writer.write(own_job_rows(jobs))
            left -= len(jobs)
            for job in jobs:
                day = job["created"].date()
                tallies[day].jobs += 1
                tallies[day].attempts += job["attempt"]
                sample.offer_job(day, job, None, None)
                unsettled = unsettled or job["state"] not in ENDED
        # As above.
        tallies[last].jobs += left
        return unsettled

    def _write_audit(
        self,
        reader: source.SpanReader,
        writers: dict[str, PartitionWriter],
        extracts: list[extract.Extract],
        tallies: dict[date, Tally],
        sample: Sample,
    ) -> None:
        for chunk in reader.audit():
            self._pause()
            writers["fact_audit"].write(audit_rows(chunk.documents, chunk.digests))
            for part in chunk.by_day("at"):
                tally = tallies[part.day]
                tally.audit += len(part.documents)
                tally.audit_hash = source.signed(tally.audit_hash + sum(part.digests))
                sample.offer_audit(part)
                for file in extracts:
                    file.write(part)

    def _carry_jobs(
        self,
        partitions: dict[str, Partition],
        tenant: str,
        days: list[date],
        period: str,
        generation: int,
        before: Manifest,
        today: date,
    ) -> dict[date, tuple[int, int]]:
        """Take over the rows of jobs that MongoDB has forgotten by its clock; (rows, attempts) by day.

        Not those of a response that was erased, or is gone.
        """
        until = min(days[-1] + timedelta(days=1), today - self._jobs_kept + timedelta(days=1))
        old = before.files("fact_job", tenant, days[0], until) if until > days[0] else []
        if not old:
            return {}
        made, responses = partitions.get("fact_job"), partitions.get("fact_response")
        values: dict[str, Any] = {"old": [str(path) for path in old], "first": days[0], "until": until}
        kept = "response IS NULL"
        if responses is not None:
            kept += " OR response IN (SELECT response FROM read_parquet($responses) WHERE status <> 'erased')"
            values["responses"] = str(self._warehouse / responses.path)
        with open_duckdb("256MB", 1, self._warehouse / "spill") as connection:
            connection.execute(
                "CREATE TEMP TABLE gone AS SELECT * FROM read_parquet($old) WHERE day >= $first AND day < $until "  # noqa: S608
                f"AND ({kept})",
                values,
            )
            if made is not None:
                new = {"new": str(self._warehouse / made.path)}
                connection.execute("DELETE FROM gone WHERE job IN (SELECT job FROM read_parquet($new))", new)
            carried = connection.execute("SELECT day, count(*), sum(attempts) FROM gone GROUP BY day").fetchall()
            if carried:
                if made is not None:
                    connection.execute("INSERT INTO gone SELECT * FROM read_parquet($new)", new)
                merged = rewrite(connection, "gone", self._warehouse, schema.FACT_JOB, tenant, period, generation)
                if merged is not None:
                    partitions["fact_job"] = merged
        return {day: (int(rows), int(attempts)) for day, rows, attempts in carried}


def rewrite(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    root: Path,
    table: schema.Table,
    tenant: str,
    period: str,
    generation: int,
) -> Partition | None:
    """A partition of a relation's rows, in the table's order; None when there are none.

    Args:
        relation: a table or view of `connection`, with the table's columns.
    """
    columns = ", ".join(wide.name(column) for column in table.names)
    order = ", ".join(wide.name(column) for column in table.order)
    sorted_rows: pa.RecordBatchReader = connection.sql(
        f"SELECT {columns} FROM {relation} ORDER BY {order}"  # noqa: S608 - own names
    ).to_arrow_reader(_MERGED_ROWS)
    with PartitionWriter(root, table, tenant, period, generation) as writer:
        for rows in sorted_rows:
            writer.write_sorted(pa.RecordBatch.from_arrays(rows.cast(table.arrow).columns, schema=table.arrow))
        return writer.close()


def read_back(root: Path, partitions: dict[str, Partition], days: list[date], sample: Sample) -> dict[date, Tally]:
    """The figures of each day in some partitions, from their files as they stand on the disk; and the sample's rows."""
    tallies = {day: Tally() for day in days}
    for table, partition in partitions.items():
        columns = {*COUNTED[table], "day", *READ[table]}
        names = ["source", "path", "item"] if table == "fact_answer" else None
        for rows in batches_of(root / partition.path, sorted(columns), names):
            add_rows(tallies, table, rows)
            sample.find(table, rows)
    return tallies


def open_duckdb(memory: str, threads: int, temporary: Path) -> duckdb.DuckDBPyConnection:
    """DuckDB for the ETL's own files, within limits; what does not fit in memory goes to `temporary`."""
    return duckdb.connect(
        config={
            "memory_limit": memory,
            "threads": str(threads),
            "temp_directory": str(temporary),
            "preserve_insertion_order": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
    )
