"""`/analytics`: questions, charts and SQL over the warehouse, answered by the analytics service."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from quern.analytics.client import AnalyticsAwayError, AnalyticsError, AnswerFile, SqlRows
from quern.analytics.question import (
    AUDIT_DIMENSIONS,
    FRESHNESS_HEADER,
    JOB_DIMENSIONS,
    MEASURES,
    RESPONSE_DIMENSIONS,
    AnswerPage,
    Freshness,
    Question,
)
from quern.api.operation import Call, Edge, Reply
from quern.api.page import bad_cursor
from quern.api.problem import Fault, Problem
from quern.store.clock import rfc3339

edge = Edge("analytics")

_MEDIA_TYPES = {
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.stream",
    "svg": "image/svg+xml",
    "png": "image/png",
}

_STAMP = {FRESHNESS_HEADER: "everything accepted before this moment (RFC 3339) is in the answer"}


class AskQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    cursor: Annotated[str, Field(max_length=500)] | None = Field(None, description="`next_cursor` of the page before")


class FileQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["csv", "parquet", "arrow"] = "csv"


class ChartQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["svg", "png"] = "svg"


class Statement(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sql: Annotated[str, StringConstraints(min_length=1, max_length=20_000, pattern=r"^[^\x00]*$")] = Field(
        description="one SELECT (DuckDB) over the tables of the warehouse, see docs/analytics.md"
    )
    rows: int = Field(1000, ge=1, le=10_000, description="the first rows only")


class MeasureShown(BaseModel):
    name: str
    what: str
    unit: str
    about: Literal["response", "job", "audit"]


class Askable(BaseModel):
    """What can be asked: every measure, and the dimensions of what it is about."""

    measures: list[MeasureShown]
    dimensions: dict[str, dict[str, str]]


@edge.operation("GET", "/analytics", scope="analytics:read", summary="What can be asked", answers={200: Askable})
def describe_questions(call: Call) -> Reply:
    """Besides these, questions about responses take the dimensions `answer.<field>`, `result.<step>.<member>` and
    `step.<step>`, where a field in a group is `<group>.<field>`."""
    measures = [
        MeasureShown(name=name.value, what=info.doc, unit=info.unit, about=info.subject)
        for name, info in MEASURES.items()
    ]
    known = {"response": RESPONSE_DIMENSIONS, "job": JOB_DIMENSIONS, "audit": AUDIT_DIMENSIONS}
    return Reply(Askable(measures=measures, dimensions=known))


@edge.operation(
    "POST",
    "/analytics/questions",
    scope="analytics:read",
    summary="Ask for statistics",
    body=Question,
    query=AskQuery,
    answers={200: AnswerPage},
    headers=_STAMP,
    safe=True,
)
def ask_question(call: Call) -> Reply:
    """Send the same question with `cursor` for the next page; 409 when the warehouse has moved on."""
    question, query = call.body, call.query
    page: AnswerPage = _answered(lambda: call.runtime.questions.page(question, call.tenant, query.limit, query.cursor))
    return Reply(page, headers=_stamp(page.freshness))


@edge.operation(
    "POST",
    "/analytics/files",
    scope="analytics:read",
    summary="Ask, and get the whole answer as a file",
    body=Question,
    query=FileQuery,
    answers={200: "text/csv, application/vnd.apache.parquet, application/vnd.apache.arrow.stream"},
    headers=_STAMP,
    safe=True,
)
def ask_for_file(call: Call) -> Reply:
    """CSV, Parquet, or an Arrow stream. The latter two hold the whole freshness in their metadata."""
    return _file(call)


@edge.operation(
    "POST",
    "/analytics/charts",
    scope="analytics:read",
    summary="Ask, and get a chart",
    body=Question,
    query=ChartQuery,
    answers={200: "image/svg+xml, image/png"},
    headers=_STAMP,
    safe=True,
)
def ask_for_chart(call: Call) -> Reply:
    """Lines over time where the question has a grain, else bars."""
    return _file(call)


@edge.operation(
    "POST",
    "/analytics/sql",
    scope="analytics:sql",
    summary="Run SQL over your rows",
    body=Statement,
    answers={200: SqlRows},
    headers=_STAMP,
    safe=True,
)
def run_sql(call: Call) -> Reply:
    """One SELECT, in a process that can read your part of the warehouse and nothing else, within limits on its time
    and memory. One at a time: 429 while another of yours is under way, 503 while as many as may be of others are."""
    statement: Statement = call.body
    rows: SqlRows = _answered(lambda: call.runtime.questions.sql(statement.sql, call.tenant, statement.rows))
    return Reply(rows, headers=_stamp(rows.freshness))


def _file(call: Call) -> Reply:
    form = call.query.format
    made: AnswerFile = _answered(lambda: call.runtime.questions.file(call.body, call.tenant, form))
    stamp = {FRESHNESS_HEADER: made.complete_until} if made.complete_until else {}
    return Reply(stream=[made.content], media_type=_MEDIA_TYPES[form], headers=stamp)


def _stamp(freshness: Freshness) -> dict[str, str]:
    until = freshness.complete_until
    return {FRESHNESS_HEADER: rfc3339(until)} if until else {}


def _answered(ask: Any) -> Any:
    try:
        return ask()
    except AnalyticsAwayError as error:
        retry = {"Retry-After": str(max(1, round(error.retry_after)))}
        raise Problem(503, f"{error}; everything else works", kind="away", headers=retry) from None
    except AnalyticsError as error:
        raise _problem(error) from None


def _problem(error: AnalyticsError) -> Problem:
    text = str(error)
    match error.kind:
        case "cursor":
            return bad_cursor()
        case "gone":
            return Problem(409, text, kind="gone")
        case "ask" | "sql":
            return Problem(422, text, kind="validation", errors=[Fault(pointer="", detail=text[:300])])
        case "turn":
            return Problem(429, text, kind="busy", headers={"Retry-After": "2"})
        case "busy":
            return Problem(503, text, kind="busy", headers={"Retry-After": "2"})
        case "slow":
            return Problem(503, f"{text}; ask for a shorter range", kind="slow", headers={"Retry-After": "10"})
        case "empty":
            return Problem(503, "nothing was published yet", kind="away", headers={"Retry-After": "60"})
    return Problem(503, "the analytics service could not answer", kind="away", headers={"Retry-After": "5"})
