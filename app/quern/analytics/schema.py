"""The star schema of the warehouse: every table with its grain, its columns and their types.

Only types that DuckDB, ClickHouse and Parquet share, so that the same files serve both engines. All moments are UTC,
to the millisecond, stored without a zone (Parquet `timestamp[ms]`, not adjusted): a session's zone changes nothing.
Names follow Kimball, "The Data Warehouse Toolkit": facts hold what happened, dimensions what it is about.

`fact_answer` is long: one row for each leaf of a response's answers and AI results. `dim_field` says for each version
of a form what a path meant; `wide` turns one version's rows into one row a response with a column for each path, in SQL
`wide_<form>_<version>`.
"""

from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Final

import pyarrow as pa


class Type(Enum):
    """A column's type: its name in DuckDB, in ClickHouse, and in Arrow."""

    TEXT = ("VARCHAR", "String", pa.string())
    INTEGER = ("INTEGER", "Int32", pa.int32())
    BIGINT = ("BIGINT", "Int64", pa.int64())
    DOUBLE = ("DOUBLE", "Float64", pa.float64())
    BOOLEAN = ("BOOLEAN", "Bool", pa.bool_())
    DATE = ("DATE", "Date32", pa.date32())
    """1900-01-01 to 2299-12-31, the range of ClickHouse's Date32; days outside it are NULL here and kept as text."""
    TIMESTAMP = ("TIMESTAMP", "DateTime64(3)", pa.timestamp("ms"))
    VECTOR = ("FLOAT[]", "Array(Float32)", pa.list_(pa.field("element", pa.float32(), nullable=False)))
    """Never NULL: ClickHouse has no nullable arrays."""

    def __init__(self, duckdb: str, clickhouse: str, arrow: pa.DataType) -> None:
        self.duckdb, self.clickhouse, self.arrow = duckdb, clickhouse, arrow


@dataclass(frozen=True)
class Column:
    """One column. `nullable` columns are `Nullable(…)` in ClickHouse."""

    name: str
    type: Type
    doc: str
    nullable: bool = False

    @property
    def clickhouse(self) -> str:
        return f"Nullable({self.type.clickhouse})" if self.nullable else self.type.clickhouse


@dataclass(frozen=True)
class Table:
    """One table. `grain`: what one row stands for. `order`: the columns that merged partitions are sorted by.

    What was written without a merge is sorted by the first `constant` of them and by time within these, as much at
    once as a writer holds in memory.
    """

    name: str
    grain: str
    columns: tuple[Column, ...]
    order: tuple[str, ...]
    dated: bool
    """Partitioned by day, later by month; otherwise one partition a tenant, replaced when it changes."""
    shared: bool = False
    """The same for every tenant, kept under `manifest.SHARED`."""
    constant: int = 0
    """So many columns of `order` are constant in each batch that flattening makes."""

    @cached_property
    def arrow(self) -> pa.Schema:
        return pa.schema([pa.field(column.name, column.type.arrow, column.nullable) for column in self.columns])

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def column(self, name: str) -> Column:
        """Raises KeyError for a column that the table does not have."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"{self.name} has no column {name}; it has {', '.join(self.names)}")

    @property
    def clickhouse_structure(self) -> str:
        """The columns for ClickHouse's `CREATE TABLE` or `file(…, Parquet, '…')`."""
        return ", ".join(f"`{column.name}` {column.clickhouse}" for column in self.columns)


#: Columns of `fact_response` of each type for the answers and results of a form's first short fields.
PROMOTED: Final = 16

_TENANT = Column("tenant", Type.TEXT, "`ten_…`; the same in every row of a file")
_FORM = Column("form", Type.TEXT, "`frm_…`")
_VERSION = Column("version", Type.INTEGER, "the form's version that was answered, from 1")
_RESPONSE = Column("response", Type.TEXT, "`rsp_…`")
_CREATED = Column("created", Type.TIMESTAMP, "when the response was accepted")
_DAY = Column("day", Type.DATE, "the UTC day of `created`: the partition, and the key of `dim_time`")

FACT_RESPONSE: Final = Table(
    "fact_response",
    "one row for each response; of an erased one its mark stays: `status` erased, all that was the person's NULL or 0",
    (
        _TENANT,
        _FORM,
        _VERSION,
        _RESPONSE,
        _CREATED,
        _DAY,
        Column("status", Type.TEXT, "processing, processed, incomplete or erased"),
        Column("processed", Type.TIMESTAMP, "when its last step ended", nullable=True),
        Column("erased", Type.TIMESTAMP, "when it was erased", nullable=True),
        Column("processing_seconds", Type.DOUBLE, "`processed` - `created`: the time to respond", nullable=True),
        Column("user", Type.TEXT, "key of `dim_user`: the API key that submitted it", nullable=True),
        Column("respondent", Type.TEXT, "a pseudonym of the first e-mail answer, within the tenant", nullable=True),
        Column("fields", Type.INTEGER, "leaf fields that the version asks"),
        Column("fields_answered", Type.INTEGER, "leaf fields with at least one answer; completion is their ratio"),
        Column("answer_rows", Type.INTEGER, "its rows in `fact_answer` with `source` answer"),
        Column("result_rows", Type.INTEGER, "its rows in `fact_answer` with `source` result"),
        Column("text_length", Type.BIGINT, "characters (code points) of all its text and long_text answers"),
        Column("words", Type.BIGINT, "words of the same, separated by white space"),
        Column("number_sum", Type.DOUBLE, "sum of its number and rating answers"),
        Column("sentiment", Type.TEXT, "label of its first sentiment step", nullable=True),
        Column("label", Type.TEXT, "label of its first classify step", nullable=True),
        Column("rating", Type.DOUBLE, "its first rating answer, scaled to 0…1 over the field's scale", nullable=True),
        Column("steps", Type.INTEGER, "steps of its workflow"),
        Column("steps_done", Type.INTEGER, "of those: done"),
        Column("steps_dead", Type.INTEGER, "of those: failed for good"),
        Column("hash", Type.BIGINT, "64 bits of BLAKE2b over the document's BSON, see `integrity`"),
        *(
            Column(
                f"{name}_{number}",
                kind,
                f"a copy of one {name} in `fact_answer`; `dim_field` says for each version which, if any",
                nullable=True,
            )
            for name, kind in (("text", Type.TEXT), ("number", Type.DOUBLE))
            for number in range(1, PROMOTED + 1)
        ),
    ),
    order=("form", "created", "response"),
    dated=True,
    constant=1,
)

FACT_ANSWER: Final = Table(
    "fact_answer",
    "one row for each leaf of a response's answers (each chosen option, each item of a repeated group) and AI results",
    (
        _TENANT,
        _FORM,
        _VERSION,
        _RESPONSE,
        _CREATED,
        _DAY,
        Column("source", Type.TEXT, "`answer` or `result`"),
        Column("path", Type.TEXT, "field names joined by `.`; results: step, then member. Key of `dim_field`"),
        Column("item", Type.TEXT, "indices of repeated groups, chosen options and lists joined by `.`; else empty"),
        Column("kind", Type.TEXT, "kind of field or of result, see `dim_field.kind`"),
        Column("value_text", Type.TEXT, "text, choice, e-mail, day (ISO 8601), label", nullable=True),
        Column("value_number", Type.DOUBLE, "number, rating, score; a text of digits stays a text", nullable=True),
        Column("value_bool", Type.BOOLEAN, "consent, flag", nullable=True),
        Column("value_date", Type.DATE, "day, where Date32 can hold it", nullable=True),
        Column("length", Type.INTEGER, "code points of `value_text`; 0 without one"),
        Column("processing_seconds", Type.DOUBLE, "of its response: saves the join", nullable=True),
    ),
    order=("form", "source", "path", "created", "response", "item"),
    dated=True,
    constant=3,
)

FACT_EMBEDDING: Final = Table(
    "fact_embedding",
    "one row for each vector that an `embed` step made of a response",
    (
        _TENANT,
        _FORM,
        _VERSION,
        _RESPONSE,
        _CREATED,
        _DAY,
        Column("step", Type.TEXT, "name of the step"),
        Column("vector", Type.VECTOR, "as the model gave it, of unit length"),
    ),
    order=("form", "step", "created", "response"),
    dated=True,
    constant=2,
)

FACT_AUDIT: Final = Table(
    "fact_audit",
    "one row for each audit entry",
    (
        _TENANT,
        Column("entry", Type.TEXT, "`aud_…`"),
        Column("at", Type.TIMESTAMP, "when it happened"),
        Column("day", Type.DATE, "the UTC day of `at`"),
        Column("actor", Type.TEXT, "key of `dim_user`"),
        Column("action", Type.TEXT, "such as response.submitted"),
        Column("subject", Type.TEXT, "identifier of what it happened to"),
        Column("form", Type.TEXT, "where the entry names one", nullable=True),
        Column("version", Type.INTEGER, "where the entry names one", nullable=True),
        Column("detail", Type.TEXT, "its facts as JSON; no personal data", nullable=True),
        Column("request_id", Type.TEXT, "of the request that caused it", nullable=True),
        Column("hash", Type.BIGINT, "as in `fact_response`"),
    ),
    order=("at", "entry"),
    dated=True,
)

FACT_JOB: Final = Table(
    "fact_job",
    "one row for each job of a tenant: those that worked on a response, and all others (requests to `/v1`, test events"
    " and the like). Kept after MongoDB forgets the job",
    (
        _TENANT,
        replace(_FORM, nullable=True),
        replace(_VERSION, nullable=True),
        replace(_RESPONSE, doc="`rsp_…`; NULL, as form and version, of a job without a response", nullable=True),
        Column("job", Type.TEXT, "`job_…`"),
        Column("day", Type.DATE, "the UTC day on which the response was accepted; without one, the job made"),
        Column("step", Type.TEXT, "name of the workflow's step; empty without one"),
        Column("kind", Type.TEXT, "kind of step: summarize, email, webhook …; or openai_chat, webhook_test …"),
        Column("queue", Type.TEXT, "high (clients wait), default, webhooks, low or batched (AI)"),
        Column("state", Type.TEXT, "as of the extract: blocked, queued, running, done, dead, cancelled or skipped"),
        Column("created", Type.TIMESTAMP, "when it was made"),
        Column("due", Type.TIMESTAMP, "when it could run, at its last try"),
        Column("started", Type.TIMESTAMP, "when its last try began", nullable=True),
        Column("ended", Type.TIMESTAMP, "when it ended", nullable=True),
        Column("wait_seconds", Type.DOUBLE, "made to first begun", nullable=True),
        Column("run_seconds", Type.DOUBLE, "all its tries together: what it cost", nullable=True),
        Column("attempts", Type.INTEGER, "claims"),
        Column("failures", Type.INTEGER, "charged failures"),
    ),
    order=("queue", "step", "created", "job"),
    dated=True,
)

DIM_USER: Final = Table(
    "dim_user",
    "one row for each actor of a tenant: an API key, or a name that the audit log gives (an operator, `quern`)",
    (
        _TENANT,
        Column("user", Type.TEXT, "`key_…`, or the actor's name"),
        Column("kind", Type.TEXT, "secret, publishable or process"),
        Column("name", Type.TEXT, "the key's name"),
        Column("created", Type.TIMESTAMP, "", nullable=True),
        Column("revoked", Type.TIMESTAMP, "", nullable=True),
    ),
    order=("user",),
    dated=False,
)

DIM_FORM: Final = Table(
    "dim_form",
    "one row for each published version of a form (slowly changing, type 2): valid from `valid_from` until `valid_to`",
    (
        _TENANT,
        _FORM,
        _VERSION,
        Column("name", Type.TEXT, "as that version was published"),
        Column("status", Type.TEXT, "of the form at publication of the warehouse: open or closed"),
        Column("valid_from", Type.TIMESTAMP, "when the version was published"),
        Column("valid_to", Type.TIMESTAMP, "when the next one was; NULL for the current one", nullable=True),
        Column("current", Type.BOOLEAN, "the newest version"),
        Column("fields", Type.INTEGER, "leaf fields"),
        Column("steps", Type.INTEGER, "steps of the workflow"),
    ),
    order=("form", "version"),
    dated=False,
)

DIM_FIELD: Final = Table(
    "dim_field",
    "one row for each leaf field, and each step of the workflow, of each version of a form",
    (
        _TENANT,
        _FORM,
        _VERSION,
        Column("source", Type.TEXT, "`answer` or `result`"),
        Column(
            "path", Type.TEXT, "answers: field names joined by `.`; results: the step's name, which begins their paths"
        ),
        Column(
            "kind",
            Type.TEXT,
            "answers: text, long_text, number, choice, multiple_choice, email, date, rating, consent; results: the"
            " step's type. In `fact_answer` a result's row has: summary, translation, label, sentiment, score, scores"
            " (`item` is the label), extracted, flag, other; an answer that no version explains: unknown",
        ),
        Column("position", Type.INTEGER, "place in the form, or in the workflow, from 0"),
        Column("label", Type.TEXT, "as shown to the person; may be empty"),
        Column("required", Type.BOOLEAN, ""),
        Column("repeated", Type.BOOLEAN, "has several rows a response: in a repeated group, or multiple_choice"),
        Column("options", Type.TEXT, "choices as a JSON object, value to label", nullable=True),
        Column("scale", Type.INTEGER, "of a rating", nullable=True),
        Column("text_column", Type.INTEGER, "n: a copy of it, or of its label, is in `text_n`", nullable=True),
        Column("number_column", Type.INTEGER, "n: a copy of it, or of its score, is in `number_n`", nullable=True),
    ),
    order=("form", "version", "source", "position"),
    dated=False,
)

DIM_TIME: Final = Table(
    "dim_time",
    "one row for each day from 2000-01-01 to 2099-12-31",
    (
        Column("day", Type.DATE, ""),
        Column("year", Type.INTEGER, ""),
        Column("quarter", Type.INTEGER, "1 to 4"),
        Column("month", Type.INTEGER, "1 to 12"),
        Column("day_of_month", Type.INTEGER, ""),
        Column("day_of_year", Type.INTEGER, ""),
        Column("iso_year", Type.INTEGER, "of the ISO 8601 week"),
        Column("iso_week", Type.INTEGER, "1 to 53"),
        Column("weekday", Type.INTEGER, "1 Monday to 7 Sunday"),
        Column("weekend", Type.BOOLEAN, "Saturday or Sunday"),
        Column("week_start", Type.DATE, "Monday of its week"),
        Column("month_start", Type.DATE, ""),
        Column("quarter_start", Type.DATE, ""),
        Column("year_start", Type.DATE, ""),
    ),
    order=("day",),
    dated=False,
    shared=True,
)

FACTS: Final = (FACT_RESPONSE, FACT_ANSWER, FACT_EMBEDDING, FACT_AUDIT, FACT_JOB)
DIMENSIONS: Final = (DIM_USER, DIM_FORM, DIM_FIELD, DIM_TIME)
TABLES: Final = {table.name: table for table in (*FACTS, *DIMENSIONS)}
