"""The extract: a tenant's day as JSON Lines and as Parquet, for whoever wants the documents rather than the warehouse.

    <extract>/<tenant>/<day>/responses.jsonl.zst  responses.parquet  audit.jsonl.zst  audit.parquet

Each file is replaced whole, by rename, whenever its day is rewritten and is equal to MongoDB; a day without rows has no
file. A run says that a day is done when its files are on the disk (`unflushed`): until then it would be written again.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from quern.analytics.flatten import to_json
from quern.analytics.manifest import safe
from quern.analytics.source import Chunk, DayChunk
from quern.analytics.tally import Tally
from quern.analytics.unflushed import Unflushed

Compression = Literal["zstd", "gzip", "none"]
_SUFFIX: Final = {"zstd": ".zst", "gzip": ".gz", "none": ""}
_MOMENT: Final = pa.timestamp("ms")

RESPONSES: Final = pa.schema(
    [
        *[pa.field(name, pa.string(), False) for name in ("id", "tenant", "form")],
        pa.field("version", pa.int32(), False),
        pa.field("status", pa.string(), False),
        pa.field("created", _MOMENT, False),
        pa.field("processed", _MOMENT),
        pa.field("erased", _MOMENT),
        pa.field("actor", pa.string()),
        *[pa.field(name, pa.string()) for name in ("answers", "results", "steps")],
        pa.field("hash", pa.int64(), False),
    ]
)
AUDIT: Final = pa.schema(
    [
        *[pa.field(name, pa.string(), False) for name in ("id", "tenant")],
        pa.field("at", _MOMENT, False),
        *[pa.field(name, pa.string(), False) for name in ("actor", "action", "subject")],
        *[pa.field(name, pa.string()) for name in ("detail", "mac", "request_id")],
        pa.field("hash", pa.int64(), False),
    ]
)
#: Rows of the Parquet file that are gathered, and the bytes of their lines.
_BATCH: Final = 2000
_BATCH_BYTES: Final = 8 << 20
_NESTED: Final = frozenset({"answers", "results", "steps", "detail"})
#: Bytes of lines that are read at once.
_READ: Final = 1 << 20


class Extract:
    """Writes the files of one collection's days, one day after the other. One left by an exception changes nothing."""

    def __init__(
        self,
        root: Path,
        tenant: str,
        name: str,
        columns: pa.Schema,
        compression: Compression,
        unflushed: Unflushed | None = None,
    ) -> None:
        """`unflushed`: what is told of every file that is put in place or taken away."""
        self._folder, self._name, self._columns, self._compression = root / safe(tenant), name, columns, compression
        self._unflushed = unflushed or Unflushed()
        self._written: dict[date, _DayWriter] = {}
        self._open: _DayWriter | None = None

    def __enter__(self) -> "Extract":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        else:
            self.abandon()

    def write(self, chunk: DayChunk) -> None:
        """Add some documents of a day; a day that another followed does not come again."""
        writer = self._written.get(chunk.day)
        if writer is None:
            self._close()
            writer = self._open = self._written[chunk.day] = self._writer(chunk.day)
        writer.write(chunk)

    def _writer(self, day: date) -> "_DayWriter":
        return _DayWriter(self._folder / day.isoformat(), self._name, self._columns, self._compression)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def differences(self, tallies: dict[date, Tally]) -> Iterator[tuple[date, str]]:
        """Compare each day's Parquet file, as it was written and stands on the disk, with what MongoDB held."""
        self._close()
        for day, tally in tallies.items():
            writer = self._written.get(day)
            problem = writer.difference(*tally.documents(self._name)) if writer else None
            if problem:
                yield day, problem

    def abandon(self) -> None:
        """Drop what was written: the days' files stay as they are."""
        self._open = None
        for writer in self._written.values():
            writer.abandon()

    def replace(self, days: Iterable[date]) -> None:
        """Put the written files of these days in place; what there was before goes, also where there is nothing now."""
        self._close()
        for day in days:
            for path in (self._written.get(day) or self._writer(day)).replace():
                self._unflushed.add(path)


class _DayWriter:
    """The two files of one collection's day."""

    def __init__(self, directory: Path, name: str, columns: pa.Schema, compression: Compression) -> None:
        self._directory, self._columns, self._compression = directory, columns, compression
        self._lines = directory / f"{name}.jsonl{_SUFFIX[compression]}"
        self._parquet = directory / f"{name}.parquet"
        self._stale = [directory / f"{name}.jsonl{suffix}" for suffix in _SUFFIX.values()]
        self._line_file: Any = None
        self._table_file: pq.ParquetWriter | None = None
        self._written = False
        self._rows: dict[str, list[Any]] = {}
        """What is written of the Parquet file with the next batch."""
        self._gathered = 0

    def abandon(self) -> None:
        # A full disk may be why; what was written goes all the same.
        with suppress(OSError):
            self._end()
        for path in (self._lines, self._parquet):
            _temporary(path).unlink(missing_ok=True)
        self._leave()

    def difference(self, count: int, total: int) -> str | None:
        return _difference(self._parquet, _temporary(self._parquet), count, total)

    def write(self, chunk: Chunk) -> None:
        if self._table_file is None:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._line_file = _open_lines(_temporary(self._lines), self._compression)
            self._table_file = _open_table(_temporary(self._parquet), self._columns)
            self._rows = {name: [] for name in self._columns.names}
            self._written = True
        rows = [{"id": document["_id"], **document} for document in chunk.documents]
        for name in self._columns.names:
            if name == "hash":
                self._rows[name] += chunk.digests
            elif name in _NESTED:
                # Made once for both files.
                texts = [to_json(row[name]) if name in row else None for row in rows]
                self._rows[name] += texts
                for row, text in zip(rows, texts, strict=True):
                    if text is not None:
                        row[name] = orjson.Fragment(text)
            else:
                self._rows[name] += [row.get(name) for row in rows]
        for row in rows:
            del row["_id"]
        lines = b"".join([to_json(row, orjson.OPT_APPEND_NEWLINE) for row in rows])
        self._line_file.write(lines)
        self._gathered += len(lines)
        if len(self._rows["id"]) >= _BATCH or self._gathered >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._table_file is not None and self._rows["id"]:
            arrays = [pa.array(self._rows[field.name], field.type) for field in self._columns]
            self._rows, self._gathered = {name: [] for name in self._columns.names}, 0
            self._table_file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._columns))

    def close(self) -> None:
        self._flush()
        self._end()

    def _end(self) -> None:
        if self._line_file is not None:
            self._line_file.close()
            self._line_file = None
        if self._table_file is not None:
            self._table_file.close()
            self._table_file = None

    def replace(self) -> list[Path]:
        """Returns the files that were put in place or taken away."""
        kept, gone = [], []
        for path in (self._lines, self._parquet):
            if self._written:
                _temporary(path).chmod(0o640)
                _temporary(path).replace(path)
                kept.append(path)
            else:
                # Of a run that was killed.
                _temporary(path).unlink(missing_ok=True)
        for path in {*self._stale, self._parquet} - set(kept):
            if path.exists():
                path.unlink()
                gone.append(path)
        self._leave()
        return [*kept, *gone]

    def _leave(self) -> None:
        for folder in (self._directory, self._directory.parent):
            try:
                folder.rmdir()
            except OSError:
                # Not empty, or never made.
                break


def days_of(root: Path, tenant: str) -> set[date]:
    """The days that a tenant has a folder of."""
    found = set[date]()
    for folder in (root / safe(tenant)).glob("*-*-*"):
        with suppress(ValueError):
            found.add(date.fromisoformat(folder.name))
    return found


def differences(root: Path, tenant: str, day: date, stored: Tally) -> list[str]:
    """What is wrong with a tenant's day in the extract, by the name of the file.

    Of Parquet the documents and their hashes are compared, of JSON Lines the number of lines.
    """
    folder, found = root / safe(tenant) / day.isoformat(), list[str]()
    for name in ("responses", "audit"):
        count, total = stored.documents(name)
        parquet = folder / f"{name}.parquet"
        lines = [path for suffix in _SUFFIX.values() if (path := folder / f"{name}.jsonl{suffix}").exists()]
        if not count:
            left = [path for path in (*lines, parquet) if path.exists()]
            found += [f"{_shown(path)} is there, and MongoDB has nothing for it" for path in left]
            continue
        problems = [_difference(parquet, parquet, count, total)]
        problems += [_difference(path, path, count, None) for path in lines or [folder / f"{name}.jsonl"]]
        found += filter(None, problems)
    return found


def _difference(path: Path, written: Path, count: int, total: int | None) -> str | None:
    """What is wrong with the file `written`, which is or becomes `path`; `total`: of the hashes that Parquet has."""
    try:
        found = (_count_lines(written), None) if total is None else _held(written)
    except FileNotFoundError:
        return f"{_shown(path)} is missing"
    except (OSError, pa.ArrowException) as error:
        return f"{_shown(path)} is not what was written ({type(error).__name__})"
    if found[0] != count:
        return f"{_shown(path)}: {count} documents in MongoDB, {found[0]} in the extract"
    if found[1] != total:
        return f"{_shown(path)}: other documents than MongoDB's, by their hashes"
    return None


def _held(path: Path) -> tuple[int, int]:
    """Number of a Parquet file's documents, and the sum of their hashes, the lowest 64 bits, signed."""
    with pq.ParquetFile(path) as file:
        hashes = file.read(["hash"], use_threads=False).column("hash")
    return len(hashes), int(hashes.to_numpy().sum())


def _count_lines(path: Path) -> int:
    kind = {suffix: kind for kind, suffix in _SUFFIX.items() if suffix}.get(path.suffix)
    count = 0
    with path.open("rb") if kind is None else pa.CompressedInputStream(str(path), kind) as lines:
        while piece := lines.read(_READ):
            count += piece.count(b"\n")
    return count


def _shown(path: Path) -> str:
    return f"extract {'/'.join(path.parts[-3:])}"


def _open_lines(path: Path, compression: Compression) -> Any:
    if compression == "none":
        return path.open("wb")
    return pa.CompressedOutputStream(str(path), compression)


def _open_table(path: Path, columns: pa.Schema) -> pq.ParquetWriter:
    """Days are many and their files small: only what is long is compressed, and only moments have statistics."""
    return pq.ParquetWriter(
        path,
        columns,
        compression={name: "zstd" if name in _NESTED else "none" for name in columns.names},
        version="2.6",
        use_dictionary=["tenant", "form", "status", "actor", "action"],
        write_statistics=["created", "at"],
        store_schema=False,
    )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")
