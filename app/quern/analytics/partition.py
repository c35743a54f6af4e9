"""Writing one partition: a Parquet file under a name of its own, which nobody reads before a manifest names it."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from itertools import groupby, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quern.analytics.manifest import Partition, safe
from quern.analytics.schema import Table

#: Rows of a row group at most: what a reader decodes at once.
ROW_GROUP: Final = 122_880
#: Rows of a row group that ends where a new place begins (`Table.constant`): a question by path reads its own alone.
_LEAST_OF_A_PLACE: Final = 8192
#: Bytes that a writer holds at most, unless it is told otherwise.
BATCH_BYTES = 32 << 20
#: Rows of a batch that is read.
_ROWS: Final = 65_536
_HASH_CHUNK: Final = 1 << 20


class PartitionWriter:
    """Writes batches of a table's rows into one file of the warehouse. A writer left by an exception leaves nothing.

    Batches are gathered up to `batch_bytes` bytes (None: BATCH_BYTES), so that memory does not grow with the rows, and
    then written in the order of the columns that are constant in each of them (`Table.constant`), else as they came. A
    new place in that order begins a new row group, so that a reader who wants one path does not unpack the others.
    """

    def __init__(
        self,
        root: Path,
        table: Table,
        tenant: str,
        period: str,
        generation: int,
        *,
        batch_bytes: int | None = None,
        behind: Executor | None = None,
    ) -> None:
        """`behind`: encodes and writes what was gathered, while the next is; None: the caller does."""
        self._behind = behind
        self._pending: Future[None] | None = None
        self._table, self._period, self._limit = table, period, batch_bytes or BATCH_BYTES
        # The random part: a run that was killed may have left a file of this generation.
        self._path = f"tenants/{safe(tenant)}/{table.name}/{period}.{generation:08d}-{secrets.token_hex(4)}.parquet"
        self._final = root / self._path
        self._temporary = self._final.with_suffix(".writing")
        self._schema = table.arrow
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = 0
        self._held: set[int] = set()
        """Addresses of the memory that the waiting batches have."""
        self.rows = 0

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; the batch's columns are the table's."""
        if not batch.num_rows:
            return
        self._waiting.append(batch)
        self._waiting_bytes += self._new_bytes(batch)
        self.rows += batch.num_rows
        if self._waiting_bytes >= self._limit:
            self._flush()

    def write_sorted(self, batch: pa.RecordBatch) -> None:
        """Add rows in the table's order, as a merge gives them: cut where one of the constant columns changes."""
        changes = np.zeros(max(batch.num_rows - 1, 0), bool)
        for name in self._table.order[: self._table.constant]:
            codes = batch.column(name).dictionary_encode().indices.to_numpy()
            changes |= codes[1:] != codes[:-1]
        places = [0, *(np.flatnonzero(changes) + 1).tolist(), batch.num_rows]
        for first, last in pairwise(places):
            self.write(batch.slice(first, last - first))

    def _new_bytes(self, batch: pa.RecordBatch) -> int:
        """What holding the batch costs: batches share the memory of what their rows have in common."""
        found = 0
        for column in batch.columns:
            # The last of a column's buffers has its values; the others are small beside it.
            buffer = column.buffers()[-1]
            if buffer is not None and buffer.address not in self._held:
                self._held.add(buffer.address)
                found += buffer.size
        return found

    def _place(self, batch: pa.RecordBatch) -> tuple[str, ...]:
        return tuple(batch.column(name)[0].as_py() for name in self._table.order[: self._table.constant])

    def _flush(self) -> None:
        waiting, self._waiting, self._held, self._waiting_bytes = self._waiting, [], set(), 0
        self._settle()
        if not waiting:
            return
        if self._behind is None:
            self._write_out(waiting)
        else:
            self._pending = self._behind.submit(self._write_out, waiting)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write_out(self, waiting: list[pa.RecordBatch]) -> None:
        if self._writer is None:
            self._final.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            # Dictionaries in memory, plain columns for readers.
            self._schema = waiting[0].schema
            self._writer = open_writer(self._temporary, self._schema)
        group: list[pa.RecordBatch] = []
        for _, batches in groupby(sorted(waiting, key=self._place), self._place):
            group += batches
            if sum(batch.num_rows for batch in group) >= _LEAST_OF_A_PLACE:
                self._write_groups(group)
                group = []
        self._write_groups(group)

    def _write_groups(self, batches: list[pa.RecordBatch]) -> None:
        if batches and self._writer is not None:
            rows = pa.Table.from_batches(batches, self._schema).unify_dictionaries()
            self._writer.write_table(rows, row_group_size=ROW_GROUP)

    def close(self) -> Partition | None:
        """Finish the file and name it; None when there was no row, and so no file. Publication makes it durable."""
        self._flush()
        self._settle()
        if self._writer is None:
            return None
        self._writer.close()
        self._writer = None
        return finish(self._temporary, self._final, self._path, self._period, self.rows)

    def abandon(self) -> None:
        """Drop what was written."""
        if self._pending is not None:
            wait([self._pending])
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._temporary.unlink(missing_ok=True)


def batches_of(path: Path, columns: list[str], dictionaries: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A partition's rows, a row group at a time: a reader of several keeps memory of each until its end.

    Args:
        dictionaries: columns of `columns` that come as dictionaries.
    """
    with pq.ParquetFile(path, read_dictionary=dictionaries) as file:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False)


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the warehouse's settings."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,
        version="2.6",
        data_page_version="1.0",
        # Identifiers and moments hardly repeat: a dictionary of them costs time and gives nothing. But a text that may
        # be NULL has one: DuckDB 2.0.0 finds `IS NULL` true of every row where a plain column has one value and NULLs.
        use_dictionary=[
            one.name
            for one in schema
            if one.name not in _NO_DICTIONARY or (one.nullable and pa.types.is_string(one.type))
        ],
        write_statistics=True,
        store_schema=False,
    )


_NO_DICTIONARY: Final = frozenset(
    {
        *("response", "job", "entry", "hash", "vector", "request_id", "respondent", "subject"),
        *("created", "processed", "processing_seconds", "at", "due", "started", "ended", "wait_seconds", "run_seconds"),
    }
)


def finish(temporary: Path, final: Path, path: str, period: str, rows: int) -> Partition:
    """Give a written file its name; `path` is that name relative to the warehouse."""
    size, digest = measured(temporary)
    temporary.replace(final)
    return Partition(path=path, period=period, rows=rows, bytes=size, hash=digest)


def measured(path: Path) -> tuple[int, str]:
    """A file's size and hash (BLAKE2b-128, hex)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
        os.fchmod(file.fileno(), 0o640)
        size = file.tell()
    return size, digest.hexdigest()


def batch(table: Table, columns: dict[str, Any]) -> pa.RecordBatch:
    """A batch of a table from its columns by name: lists or arrays of one length.

    Raises:
        KeyError: a column is missing. pyarrow.ArrowInvalid: a value does not fit its column.
    """
    schema = table.arrow
    arrays = []
    for field in schema:
        values = columns[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
