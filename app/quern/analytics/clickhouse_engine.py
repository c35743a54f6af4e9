"""ClickHouse: the engine of a site that outgrows one machine. It reads the very same Parquet files.

A server needs the warehouse's folder under its `user_files_path` (a shared disk). Nothing is loaded into it, so a
publication is the same swap of the manifest, and a tenant's question names that tenant's files and no others.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlencode

import httpcore2
import pyarrow as pa

from quern.analytics.engine import Dialect, EngineError, Parameter, Statement, TimedOutError, shaped
from quern.analytics.schema import Column, Table

_TRUNCATED: Final = {
    "day": "toDate32({})",
    "week": "toDate32(toStartOfWeek({}, 1))",
    "month": "toDate32(toStartOfMonth({}))",
    "quarter": "toDate32(toStartOfQuarter({}))",
    "year": "toDate32(toStartOfYear({}))",
}
_KINDS: Final = {str: "String", bool: "Bool", int: "Int64", float: "Float64", datetime: "DateTime64(3, 'UTC')"}
#: What makes it compare, join and count as the other engine does.
SETTINGS: Final = {
    "join_use_nulls": "1",
    "prefer_column_name_to_alias": "1",
    "transform_null_in": "0",
    "aggregate_functions_null_for_empty": "1",
    "session_timezone": "UTC",
    "output_format_arrow_string_as_string": "1",
    "use_variant_as_common_type": "0",
}


class ClickHouseDialect(Dialect):
    """ClickHouse 24.8 and later. `root` is the warehouse's folder as the server sees it."""

    name = "clickhouse"
    materializes = False
    most_rows = 0

    def __init__(self, root: Path, seen_as: str) -> None:
        self._root, self._seen_as = root, seen_as

    def scan(self, table: Table, files: Sequence[Path]) -> str:
        if not files:
            columns = ", ".join(
                f"CAST({_empty(column)} AS {column.clickhouse}) AS `{column.name}`" for column in table.columns
            )
            return f"(SELECT {columns} WHERE 0)"
        folders: dict[str, list[str]] = {}
        for file in files:
            seen = Path(self._seen_as) / file.relative_to(self._root)
            folders.setdefault(str(seen.parent), []).append(seen.name)
        structure = _literal(table.clickhouse_structure)
        # Braces hold no slashes, so one source a folder: a folder is a tenant's.
        sources = [
            f"file({_literal(_one_of(folder, names))}, Parquet, {structure})" for folder, names in folders.items()
        ]
        if len(sources) == 1:
            return sources[0]
        return "(" + " UNION ALL ".join(f"SELECT * FROM {source}" for source in sources) + ")"

    def parameter(self, name: str, value: Parameter) -> str:
        return f"{{{name}:{_KINDS[type(value)]}}}"

    def local(self, x: str, zone: str) -> str:
        # A zone must be known when the statement is read: `toTimeZone` takes no bound value of another row.
        return f"toTimeZone({x}, {zone})"

    def bucket(self, grain: str, local: str) -> str:
        if grain in _TRUNCATED:
            return _TRUNCATED[grain].format(local)
        # The wall-clock hour, said as if it were UTC.
        return f"toDateTime64(formatDateTime({local}, '%Y-%m-%d %H:00:00'), 3, 'UTC')"

    def weekday(self, local: str) -> str:
        return f"toDayOfWeek({local})"

    def hour(self, local: str) -> str:
        return f"toHour({local})"

    def periods(self, grain: str, first: str, last: str) -> str:
        return f"dateDiff('{grain}', {first}, {last})"

    def quantile(self, x: str, share: float) -> str:
        return f"quantileExactInclusive({share})({x})"

    def plain(self, x: str) -> str:
        return f"toString({x})"

    def terms(self, texts: str, shortest: str) -> str:
        # Whole texts are lowered in context: İ becomes two characters, and a Σ at a word's end another than elsewhere.
        found = "extractAll(assumeNotNull(text), '[\\\\p{L}\\\\p{N}]+')"
        lowered = f"arrayMap(term -> replaceAll(lowerUTF8(term), '\u0307', ''), {found})"
        each = f"arrayJoin(arrayMap(term -> replaceAll(term, 'ς', 'σ'), {lowered}))"
        return (
            f"SELECT term AS c0, count(DISTINCT response) AS c1, count(*) AS c2 "
            f"FROM (SELECT response, {each} AS term FROM ({texts}) texts) found "
            f"WHERE lengthUTF8(term) >= {shortest} GROUP BY term"
        )

    def cosine(self, x: str, y: str) -> str:
        return f"1 - cosineDistance({x}, {y})"

    def size(self, x: str) -> str:
        return f"length({x})"


class Transport(Protocol):
    """Carries a statement to ClickHouse; brings an Arrow stream back."""

    def send(self, sql: str, parameters: Mapping[str, str], seconds: float) -> bytes:
        """Raises EngineError, TimedOutError."""
        ...

    def close(self) -> None: ...


class Server:
    """A ClickHouse server over HTTP; statements are sent read-only."""

    def __init__(self, url: str, user: str, password: str, memory_megabytes: int) -> None:
        self._url, self._memory = url.rstrip("/"), memory_megabytes
        self._headers: dict[bytes | str, bytes | str] = {"X-ClickHouse-User": user, "X-ClickHouse-Key": password}
        self._pool = httpcore2.ConnectionPool(max_connections=16)

    def send(self, sql: str, parameters: Mapping[str, str], seconds: float) -> bytes:
        query = {
            **SETTINGS,
            # 2: it may read, and these settings may be given; nothing else.
            "readonly": "2",
            "max_execution_time": f"{seconds:g}",
            "max_memory_usage": str(self._memory << 20),
            "default_format": "ArrowStream",
            **{f"param_{name}": value for name, value in parameters.items()},
        }
        timeout = {"connect": 5.0, "read": seconds + 2, "write": 5.0, "pool": seconds}
        try:
            answer = self._pool.request(
                "POST",
                f"{self._url}/?{urlencode(query)}",
                headers=self._headers,
                content=sql.encode(),
                extensions={"timeout": timeout},
            )
        except httpcore2.TimeoutException:
            raise TimedOutError(f"expected an answer within {seconds:g} s, found none") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise EngineError(f"expected ClickHouse at {self._url}, found {type(error).__name__}") from None
        body: bytes = answer.content
        if answer.status != 200:
            text = body.decode(errors="replace")[:500]
            raise (TimedOutError if "TIMEOUT_EXCEEDED" in text else EngineError)(text)
        return body

    def close(self) -> None:
        self._pool.close()


class ClickHouseEngine:
    """Runs statements by a transport; the manifest's files are named as the server sees them under `seen_as`."""

    def __init__(self, transport: Transport, root: Path, seen_as: str) -> None:
        self._transport = transport
        self._dialect = ClickHouseDialect(root, seen_as)

    @property
    def dialect(self) -> Dialect:
        return self._dialect

    def run(self, statement: Statement, seconds: float) -> pa.Table:
        parameters = {name: _escaped(value) for name, value in statement.parameters.items()}
        raw = self._transport.send(statement.sql, parameters, seconds)
        try:
            return shaped(pa.ipc.open_stream(raw).read_all(), statement.shape)
        except pa.ArrowInvalid as error:
            raise EngineError(f"expected an Arrow stream from ClickHouse, found something else: {error}") from None

    def close(self) -> None:
        self._transport.close()


def _empty(column: Column) -> str:
    kind = column.clickhouse
    if column.nullable:
        return "NULL"
    if kind.startswith("Array"):
        return "[]"
    if kind == "String":
        return "''"
    return "'1970-01-01'" if kind.startswith("Date") else "0"


def _one_of(folder: str, names: list[str]) -> str:
    return f"{folder}/{names[0]}" if len(names) == 1 else f"{folder}/{{{','.join(names)}}}"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0"})


def _escaped(value: Parameter) -> str:
    """A parameter's value as ClickHouse reads it: like a field of tab-separated values."""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.") + f"{value.microsecond // 1000:03d}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value.translate(_ESCAPES)
    return repr(value)
