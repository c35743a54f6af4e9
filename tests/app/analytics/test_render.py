"""A file has every cell of an answer as it is; only what a spreadsheet would run is led by a quote in CSV."""

import csv
import io
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from quern.analytics.answer import Answer
from quern.analytics.plan import shape
from quern.analytics.question import Freshness, Grain, Question
from quern.analytics.render import Format, render

FRESH = Freshness(generation=7, complete_until=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
HOSTILE: list[str | None] = [
    None,
    "",
    " ",
    "NULL",
    "null",
    "nan",
    "true",
    "007",
    "1e5",
    "2024-02-29",
    "say \"no\", or\tnot; 'so'",
    '"',
    '""',
    ",",
    "a\nb\r\nc\rd",
    "ends in a newline\n",
    "\\N \\n \\",
    "Ünïcode ß 日本語 \u202eabc e\u0301 🌾",
    "\ufeffmark",
    "\u2028\u0085\x1f\x7f",
    "x" * 100_000,
]
COUNTS = [0, 1, 2**63 - 1, -(2**63)]
SHARES = [None, 0.0, -0.0, 0.1, 1 / 3, 1e-308, 1.7976931348623157e308, -3.25]
MOMENTS: dict[Grain, list[Any]] = {
    "day": [date(2024, 2, 29), date(1900, 1, 1), date(2099, 12, 31)],
    # Of a wall clock: no zone.
    "hour": [datetime(2024, 3, 31, 3), datetime(1999, 12, 31, 23), datetime(2099, 12, 31)],  # noqa: DTZ001
}


def answer(texts: list[str | None], grain: Grain) -> Answer:
    """One row for each text, with buckets, whole numbers and fractions in turn."""
    question = Question.model_validate(
        {"measure": "responses", "grain": grain, "dimensions": ["answer.title", "weekday"]}
    )
    turns = [MOMENTS[grain], None, [*range(1, 8), None], COUNTS, SHARES]
    columns = [texts if turn is None else [turn[at % len(turn)] for at in range(len(texts))] for turn in turns]
    return Answer(pa.table(columns, schema=shape(question)), FRESH)


def read(made: bytes, form: Format, schema: pa.Schema) -> pa.Table:
    """What another program finds in a file. A CSV has no types: the columns' are given."""
    if form == "parquet":
        return pyarrow.parquet.read_table(io.BytesIO(made))
    if form == "arrow":
        return pa.ipc.open_stream(made).read_all()
    return pyarrow.csv.read_csv(
        io.BytesIO(made),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )


@pytest.mark.parametrize("grain", sorted(MOMENTS))
@pytest.mark.parametrize("form", ["csv", "parquet", "arrow"])
def test_every_cell_of_a_file_is_what_was_answered(form: Format, grain: Grain) -> None:
    whole = answer(HOSTILE, grain)
    found = read(render(whole, form), form, whole.table.schema)
    assert found.column_names == whole.table.column_names
    assert found.schema.types == whole.table.schema.types
    # As text: 0.0 is equal to -0.0.
    assert [list(map(repr, row.values())) for row in found.to_pylist()] == [
        list(map(repr, row.values())) for row in whole.table.to_pylist()
    ]
    if form != "csv":
        assert Freshness.model_validate_json(found.schema.metadata[b"freshness"]) == FRESH


@pytest.mark.parametrize("form", ["csv", "parquet", "arrow"])
def test_an_answer_without_rows_keeps_its_columns(form: Format) -> None:
    empty = answer([], "day")
    found = read(render(empty, form), form, empty.table.schema)
    assert (found.num_rows, found.column_names) == (0, empty.table.column_names)


@pytest.mark.parametrize(
    "formula",
    [
        "=1+1",
        "+1+1",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "=cmd|'/c calc'!A0",
        "--",
        "-",
        "-3.25.1",
        "-1e",
        "＝1",
    ],
)
def test_what_a_spreadsheet_would_run_is_led_by_a_quote_in_csv_and_nowhere_else(formula: str) -> None:
    whole = answer([formula], "day")
    rows = list(csv.reader(io.StringIO(render(whole, "csv").decode(), newline="")))
    assert rows[1][1] == "'" + formula
    for form in ("parquet", "arrow"):
        assert read(render(whole, form), form, whole.table.schema)["answer.title"].to_pylist() == [formula]


@pytest.mark.parametrize("number", ["-3.25", "+7", "-0", "-1e-07", "-1.5E+300", "3", "x=1"])
def test_a_number_stays_a_number_in_csv(number: str) -> None:
    rows = list(csv.reader(io.StringIO(render(answer([number], "day"), "csv").decode(), newline="")))
    assert rows[1][1] == number
