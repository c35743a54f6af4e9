"""An answer as a file: CSV, Parquet, Arrow."""

import io
import re
from typing import Final, Literal

import pyarrow as pa

from quern.analytics.answer import Answer

Format = Literal["csv", "parquet", "arrow"]
MEDIA_TYPES: Final[dict[str, str]] = {
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.stream",
    "svg": "image/svg+xml",
    "png": "image/png",
}

#: What a spreadsheet may take for the beginning of a formula; the wide ones in some languages.
_BEGINS: Final = frozenset("=+-@\t\r\n＝＋－＠")
#: No formula, although it begins like one.
_NUMBER: Final = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


def render(answer: Answer, form: Format) -> bytes:
    """The answer's bytes. Its freshness stands in the metadata of Parquet and Arrow, as JSON."""
    table = answer.table.replace_schema_metadata({"freshness": answer.freshness.model_dump_json()})
    sink = pa.BufferOutputStream()
    if form == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, sink, compression="zstd")
    elif form == "arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        return _csv(table)
    made: bytes = sink.getvalue().to_pybytes()
    return made


def _csv(table: pa.Table) -> bytes:
    import pyarrow.csv

    sink = io.BytesIO()
    pyarrow.csv.write_csv(_harmless(table), sink)
    return sink.getvalue()


def _harmless(table: pa.Table) -> pa.Table:
    """Texts that a spreadsheet would run as a formula are led by a quote (OWASP, "CSV Injection"); numbers are none."""
    columns = []
    for column in table.columns:
        if pa.types.is_string(column.type):
            column = pa.chunked_array([[_tamed(text) for text in column.to_pylist()]], pa.string())
        columns.append(column)
    return pa.table(columns, names=table.column_names)


def _tamed(text: str | None) -> str | None:
    return "'" + text if text and text[0] in _BEGINS and not _NUMBER.fullmatch(text) else text
