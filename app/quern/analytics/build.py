"""Building one tenant's day: read, flatten, write, read back, compare.

What comes out is a set of new files that nobody reads yet, and the proof that they hold what MongoDB held at one
moment: counts, hashes and sums of the whole day, and some of its documents field by field.
"""

import heapq
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from quern.analytics import extract, schema, source
from quern.analytics.flatten import Flattener, Version, audit_rows, job_rows
from quern.analytics.manifest import Manifest, Partition, safe
from quern.analytics.partition import PartitionWriter
from quern.analytics.tally import COUNTED, Tally, add_rows, leaves_of, rows_as_leaves
from quern.store.connection import Db, Document

#: Documents of each day that are compared field by field: those with the smallest hashes, so any may be chosen.
SAMPLE: Final = 3
_FACTS: Final = ("fact_response", "fact_answer", "fact_embedding", "fact_audit", "fact_job")
_READ_BACK_ROWS: Final = 65_536


@dataclass
class Day:
    """What was built of one day."""

    tenant: str
    day: date
    partitions: dict[str, Partition]
    """By table; a table without rows is absent."""
    tally: Tally
    problems: list[str] = field(default_factory=list)
    """Why it must not be published."""
    documents: int = 0
    """Read from MongoDB, of all collections."""


class Versions:
    """Versions of forms for flattening, kept: they never change."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self._kept: dict[tuple[str, int], Version] = {}

    def get(self, form: str, number: int) -> Version:
        """The version, or one that explains nothing when it is not there."""
        key = (form, number)
        found = self._kept.get(key)
        if found is None:
            stored = source.version(self._db, form, number)
            found = Version.unknown(*key) if stored is None else Version.of(*key, stored.definition, stored.workflow)
            if len(self._kept) >= 2000:
                self._kept.clear()
            self._kept[key] = found
        return found


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

    def build(self, tenant: str, day: date, generation: int, before: Manifest, today: date) -> Day:
        """Write the day's files. `before`: where rows of jobs are that MongoDB has forgotten.

        Raises:
            PyMongoError: MongoDB is away, or the snapshot is too old; build the day again.
        """
        with ExitStack() as stack:
            session = stack.enter_context(source.snapshot(self._db))
            reader = source.DayReader(self._db, session, tenant, day)
            writers = {
                name: stack.enter_context(
                    PartitionWriter(self._warehouse, schema.TABLES[name], tenant, day.isoformat(), generation)
                )
                for name in _FACTS
            }
            folder = None if self._extracts is None else self._extracts / safe(tenant) / day.isoformat()
            files = [
                stack.enter_context(extract.ExtractWriter(folder, name, columns, self._compression))
                for name, columns in (("responses", extract.RESPONSES), ("audit", extract.AUDIT))
                if folder is not None
            ]
            tally, sample, problems = Tally(), Sample(), list[str]()
            first = self._write_responses(reader, writers, files[:1], tally, sample)
            first_audit = self._write_audit(reader, writers, files[1:])
            partitions = {name: made for name, writer in writers.items() if (made := writer.close()) is not None}
            carried = self._carry_jobs(partitions, tenant, day, generation, before, today)
            tally.responses, tally.response_hash = reader.count_responses()
            tally.audit, tally.audit_hash = reader.count_audit()
            if first != (tally.responses, tally.response_hash) or first_audit != (tally.audit, tally.audit_hash):
                problems.append("two readings of one moment differ")
            found = read_back(self._warehouse, partitions)
            tally.jobs += carried[0]
            tally.attempts += carried[1]
            problems += tally.differences(found)
            if "fact_answer" in partitions:
                problems += sample.compare([self._warehouse / partitions["fact_answer"].path])
            for file in files:
                file.replace()
        documents = tally.responses + tally.audit + tally.jobs - carried[0]
        return Day(tenant, day, partitions, tally, problems, documents)

    def _write_responses(
        self,
        reader: source.DayReader,
        writers: dict[str, PartitionWriter],
        files: list[extract.ExtractWriter],
        tally: Tally,
        sample: "Sample",
    ) -> tuple[int, int]:
        """Count and hash of what was read."""
        count = total = 0
        for chunk in reader.responses():
            self._pause()
            flattener = Flattener()
            for document, digest in zip(chunk.documents, chunk.digests, strict=True):
                flattener.add(document, self._versions.get(document["form"], document["version"]), digest)
                tally.add_document(document)
                sample.offer(document, digest)
            for table, rows in flattener.batches():
                writers[table.name].write(rows)
            ids = {document["_id"]: document for document in chunk.documents}
            jobs = reader.jobs(list(ids))
            if jobs:
                writers["fact_job"].write(job_rows(jobs, ids))
            tally.jobs += reader.count_jobs(list(ids))
            tally.attempts += sum(job["attempt"] for job in jobs)
            for file in files:
                file.write(chunk)
            count += len(chunk.documents)
            total += sum(chunk.digests)
        return count, source.signed(total)

    def _write_audit(
        self, reader: source.DayReader, writers: dict[str, PartitionWriter], files: list[extract.ExtractWriter]
    ) -> tuple[int, int]:
        count = total = 0
        for chunk in reader.audit():
            self._pause()
            writers["fact_audit"].write(audit_rows(chunk.documents, chunk.digests))
            for file in files:
                file.write(chunk)
            count += len(chunk.documents)
            total += sum(chunk.digests)
        return count, source.signed(total)

    def _carry_jobs(
        self,
        partitions: dict[str, Partition],
        tenant: str,
        day: date,
        generation: int,
        before: Manifest,
        today: date,
    ) -> tuple[int, int]:
        """Take over the rows of jobs that MongoDB has forgotten by its clock; (rows, attempts).

        Not those of a response that was erased, or is gone.
        """
        old = before.files("fact_job", tenant, day, day + timedelta(days=1))
        if not old or "fact_response" not in partitions or today - day < self._jobs_kept:
            return 0, 0
        made = partitions.get("fact_job")
        with open_duckdb("256MB", 1, self._warehouse / "spill") as connection:
            connection.execute(
                "CREATE TEMP TABLE gone AS SELECT * FROM read_parquet($old) WHERE day = $day AND response IN "
                "(SELECT response FROM read_parquet($responses) WHERE status <> 'erased')",
                {
                    "old": [str(path) for path in old],
                    "day": day,
                    "responses": str(self._warehouse / partitions["fact_response"].path),
                },
            )
            if made is not None:
                new = {"new": str(self._warehouse / made.path)}
                connection.execute("DELETE FROM gone WHERE job IN (SELECT job FROM read_parquet($new))", new)
            rows, attempts = connection.execute("SELECT count(*), coalesce(sum(attempts), 0) FROM gone").fetchall()[0]
            if rows:
                if made is not None:
                    connection.execute("INSERT INTO gone SELECT * FROM read_parquet($new)", new)
                merged = rewrite(
                    connection, "gone", self._warehouse, schema.FACT_JOB, tenant, day.isoformat(), generation
                )
                if merged is not None:
                    partitions["fact_job"] = merged
        return int(rows), int(attempts)


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
    columns = ", ".join(schema.name(column) for column in table.names)
    order = ", ".join(schema.name(column) for column in table.order)
    sorted_rows: pa.RecordBatchReader = connection.sql(
        f"SELECT {columns} FROM {relation} ORDER BY {order}"  # noqa: S608 - own names
    ).to_arrow_reader(_READ_BACK_ROWS)
    with PartitionWriter(root, table, tenant, period, generation) as writer:
        for rows in sorted_rows:
            writer.write(pa.RecordBatch.from_arrays(rows.cast(table.arrow).columns, schema=table.arrow))
        return writer.close()


class Sample:
    """The documents with the smallest hashes."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, str, dict[tuple[str, str, str], Any]]] = []

    def offer(self, document: Document, digest: int) -> None:
        if len(self._kept) < SAMPLE:
            heapq.heappush(self._kept, (-digest, document["_id"], leaves_of(document)))
        elif -digest > self._kept[0][0]:
            heapq.heapreplace(self._kept, (-digest, document["_id"], leaves_of(document)))

    def compare(self, files: list[Path]) -> list[str]:
        """Compare them, field by field, with the rows in some files of `fact_answer`; the differences."""
        ids = [identity for _, identity, _ in self._kept]
        found: dict[str, list[dict[str, Any]]] = {identity: [] for identity in ids}
        columns = ["response", "source", "path", "item", "value_text", "value_number", "value_bool"]
        for path in files:
            rows = pq.read_table(path, columns=columns, filters=[("response", "in", ids)])
            for row in rows.to_pylist():
                found[row["response"]].append(row)
        problems = []
        for _, identity, wanted in self._kept:
            there = rows_as_leaves(found[identity])
            differing = sorted(
                key for key in wanted.keys() | there.keys() if not _equal(wanted.get(key), there.get(key))
            )
            # The values themselves stay out of it: they are a person's.
            problems += [f"{identity}: {'.'.join(filter(None, key))} differs" for key in differing]
        return problems


def _equal(stored: Any, flattened: Any) -> bool:
    if isinstance(stored, bool) or isinstance(flattened, bool):
        return stored is flattened
    if isinstance(stored, int) and isinstance(flattened, float):
        return float(stored) == flattened
    return type(stored) is type(flattened) and bool(stored == flattened)


def read_back(root: Path, partitions: dict[str, Partition]) -> Tally:
    """The figures of some partitions, from their files as they stand on the disk."""
    tally = Tally()
    for table, partition in partitions.items():
        with pq.ParquetFile(root / partition.path) as file:
            for rows in file.iter_batches(_READ_BACK_ROWS, columns=COUNTED[table]):
                add_rows(tally, table, rows)
    return tally


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
