"""Questions: one way to ask for every statistic: a measure, dimensions, filters, a range and a grain.

Imports neither an engine nor Arrow: the API's processes check questions and leave the rest to the service.
"""

import re
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Any, Final, Literal
from zoneinfo import available_timezones

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from quern.store.moment import Moment

#: Dimensions besides these: `answer.<field>`, `result.<step>.<member>` and `step.<step>`, see `PATH`.
RESPONSE_DIMENSIONS: Final = {
    "form": "identifier of the form",
    "version": "version of the form that was answered",
    "status": "processing, processed or incomplete",
    "user": "the API key that submitted it",
    "respondent": "a pseudonym of its first e-mail answer",
    "sentiment": "label of its first sentiment step",
    "label": "label of its first classify step",
    "weekday": "1 Monday to 7 Sunday, in the question's time zone",
    "hour": "0 to 23, in the question's time zone",
}
JOB_DIMENSIONS: Final = {
    "form": "identifier of the response's form",
    "version": "version of that form",
    "queue": "high, default, webhooks, low or batched (AI)",
    "kind": "kind of step: summarize, classify, email, webhook …",
    "step": "name of the workflow's step",
    "state": "blocked, queued, running, done, dead, cancelled or skipped",
    "weekday": RESPONSE_DIMENSIONS["weekday"],
    "hour": RESPONSE_DIMENSIONS["hour"],
}
AUDIT_DIMENSIONS: Final = {
    "actor": "an API key, an operator or `quern`",
    "action": "such as response.submitted",
    "weekday": RESPONSE_DIMENSIONS["weekday"],
    "hour": RESPONSE_DIMENSIONS["hour"],
}
#: Of the operator alone, who asks of all tenants at once.
TENANT: Final = "tenant"
#: Name of the column that says which period of the grain a row is of: its first day, of hours its first moment.
BUCKET: Final = "bucket"
#: Whole numbers; the others are texts.
WHOLE: Final = frozenset({"version", "weekday", "hour"})

PATH: Final = re.compile(r"(answer|result|step)\.([A-Za-z][A-Za-z0-9_]{0,62}(?:\.[^\x00-\x1f.\"'`\\]{1,200}){0,8})")


class Measure(StrEnum):
    """What is counted or measured. `MEASURES` says what each is."""

    RESPONSES = "responses"
    RESPONSE_TIME = "response_time"
    RESPONSE_LENGTH = "response_length"
    RESPONSE_WORDS = "response_words"
    COMPLETION = "completion"
    RATING = "rating"
    ANSWER = "answer"
    JOBS = "jobs"
    JOB_WAIT = "job_wait"
    JOB_RUN = "job_run"
    JOB_ATTEMPTS = "job_attempts"
    AUDIT_ENTRIES = "audit_entries"
    FUNNEL = "funnel"
    COHORTS = "cohorts"
    TERMS = "terms"
    SIMILAR = "similar"


Subject = Literal["response", "job", "audit"]


class MeasureInfo(BaseModel):
    """What a measure is, for people and for the planner."""

    model_config = ConfigDict(frozen=True)

    doc: str
    unit: str = ""
    subject: Subject = "response"
    column: str | None = None
    """The measured column of the subject's fact table; None where something is counted or has a plan of its own."""


MEASURES: Final[dict[Measure, MeasureInfo]] = {
    Measure.RESPONSES: MeasureInfo(doc="responses, erased ones left out"),
    Measure.RESPONSE_TIME: MeasureInfo(
        doc="time from a response's arrival to the end of its workflow", unit="s", column="processing_seconds"
    ),
    Measure.RESPONSE_LENGTH: MeasureInfo(
        doc="characters of all text answers of a response", unit="characters", column="text_length"
    ),
    Measure.RESPONSE_WORDS: MeasureInfo(doc="words of the same", unit="words", column="words"),
    Measure.COMPLETION: MeasureInfo(doc="answered share of the fields that the form asks", column="completion"),
    Measure.RATING: MeasureInfo(doc="first rating answer, scaled to 0…1", column="rating"),
    Measure.ANSWER: MeasureInfo(doc="the numbers answered to the field (or given by the result) that `of` names"),
    Measure.JOBS: MeasureInfo(doc="jobs", subject="job"),
    Measure.JOB_WAIT: MeasureInfo(
        doc="time from a job's making to its first try", unit="s", subject="job", column="wait_seconds"
    ),
    Measure.JOB_RUN: MeasureInfo(
        doc="time that all tries of a job took: what it cost", unit="s", subject="job", column="run_seconds"
    ),
    Measure.JOB_ATTEMPTS: MeasureInfo(doc="tries of a job", subject="job", column="attempts"),
    Measure.AUDIT_ENTRIES: MeasureInfo(doc="entries of the audit log", subject="audit"),
    Measure.FUNNEL: MeasureInfo(doc="responses that passed each of `stages` and all before it"),
    Measure.COHORTS: MeasureInfo(doc="members by the period of their first response, and how many came back when"),
    Measure.TERMS: MeasureInfo(doc="words of text answers (of the field that `of` names, or of all), commonest first"),
    Measure.SIMILAR: MeasureInfo(doc="responses nearest in meaning to the one that `of` names, by embedding"),
}

Grain = Literal["all", "hour", "day", "week", "month", "quarter", "year"]
Statistic = Literal["count", "share", "sum", "mean", "min", "max", "p50", "p75", "p90", "p95", "p99"]
Member = Literal["respondent", "user"]

#: Measures that have a plan and columns of their own.
SPECIAL: Final = frozenset({Measure.FUNNEL, Measure.COHORTS, Measure.TERMS, Measure.SIMILAR})
COUNTED: Final = frozenset({Measure.RESPONSES, Measure.JOBS, Measure.AUDIT_ENTRIES})

Text = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00]*$")]
Number = Annotated[float, Field(strict=True, ge=-1e15, le=1e15, allow_inf_nan=False)]
Value = Annotated[bool, Field(strict=True)] | Number | Text
DimensionName = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Model):
    """Moments in [from, before), by the creation of what is counted. An open end has no bound."""

    start: Moment | None = Field(None, alias="from")
    before: Moment | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.start and self.before and self.start > self.before:
            raise ValueError("expected `from` to be at most `before`")
        return self


class Filter(_Model):
    """What must hold of a dimension. Of several answers to one field it is enough that one fits.

    A text is compared with texts (also choices and days), a number with numbers, true and false with consents.
    """

    dimension: DimensionName
    op: Literal["in", "not_in", "lt", "le", "gt", "ge", "exists"] = Field(
        "in", description="`not_in` is the opposite of `in`: also what has no value at all"
    )
    values: list[Value] = Field(default_factory=list, max_length=500, description="one value, but for in and not_in")

    @model_validator(mode="after")
    def _has_values(self) -> "Filter":
        if self.op == "exists":
            if self.values not in ([], [True], [False]):
                raise ValueError("`exists` takes true or false, or nothing, which is true")
        elif self.op in ("in", "not_in"):
            if not self.values:
                raise ValueError(f"`{self.op}` takes at least one value")
        elif len(self.values) != 1 or isinstance(self.values[0], bool):
            raise ValueError(f"`{self.op}` takes one text or number")
        return self


class Stage(_Model):
    """One stage of a funnel: what must hold, besides all that the stages before it ask."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]*$")]
    filters: list[Filter] = Field(default_factory=list, max_length=20)


DEFAULT_STAGES: Final = [
    Stage(name="received"),
    Stage(name="ended", filters=[Filter(dimension="status", values=["processed", "incomplete"])]),
    Stage(name="processed", filters=[Filter(dimension="status", values=["processed"])]),
]


class Order(_Model):
    """By which column of the answer. Ties go by all others, ascending; what has no value comes last."""

    by: Annotated[str, StringConstraints(max_length=300)]
    descending: bool = False


class Question(_Model):
    """What is asked. The same question of the same warehouse has the same answer."""

    measure: Measure
    of: Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\x00]*$")] | None = Field(
        None,
        description="`answer.<field>` or `result.<step>.<member>` for `answer`, `answer.<field>` for `terms`,"
        " a response for `similar`",
    )
    statistics: list[Statistic] = Field(default_factory=list, max_length=11, description="default: by the measure")
    dimensions: list[DimensionName] = Field(default_factory=list, max_length=6)
    filters: list[Filter] = Field(default_factory=list, max_length=20)
    range: Range = Range()
    grain: Grain = "all"
    time_zone: Annotated[str, StringConstraints(max_length=64)] = Field(
        "UTC", description="IANA name: where days, weeks and hours begin"
    )
    order: Order | None = None
    top: int | None = Field(None, ge=1, le=10_000, description="the first rows only; terms, similar: 100 if not said")
    stages: list[Stage] = Field(default_factory=list, max_length=20, description="of a funnel")
    member: Member = Field("respondent", description="whose cohorts")
    min_length: int = Field(3, ge=1, le=50, description="of terms, in characters")

    @field_validator("time_zone")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in _ZONES:
            raise ValueError("expected an IANA time zone, for example Europe/Berlin")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Question":
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError("each dimension may be asked once")
        if len(set(self.statistics)) != len(self.statistics):
            raise ValueError("each statistic may be asked once")
        for name in [*self.dimensions, *(item.dimension for item in self.filters)]:
            self._check_dimension(name)
        for stage in self.stages:
            for item in stage.filters:
                self._check_dimension(item.dimension)
        self._check_measure()
        if self.order is not None and self.order.by not in self.columns:
            raise ValueError(f"expected `order.by` to be a column of the answer: {', '.join(self.columns)}")
        return self

    def _check_dimension(self, name: str) -> None:
        known = DIMENSIONS[self.subject]
        if name in known or name == TENANT:
            return
        if self.subject == "response" and PATH.fullmatch(name):
            return
        also = ", answer.<field>, result.<step>.<member>, step.<step>" if self.subject == "response" else ""
        raise ValueError(f"no such dimension of {self.measure.value}; there are {', '.join(known)}{also}")

    def _check_measure(self) -> None:
        measure = self.measure
        if measure in SPECIAL and self.statistics:
            raise ValueError(f"{measure.value} has columns of its own; leave `statistics` out")
        if measure in (Measure.TERMS, Measure.SIMILAR, Measure.COHORTS) and self.dimensions:
            raise ValueError(f"{measure.value} takes no dimensions; use filters")
        if measure in COUNTED and set(self.statistics) - {"count", "share"}:
            raise ValueError(f"{measure.value} takes the statistics count and share")
        if measure in (Measure.TERMS, Measure.SIMILAR) and self.grain != "all":
            raise ValueError(f"{measure.value} takes no grain; use a range")
        if measure is Measure.COHORTS and self.grain in ("all", "hour"):
            raise ValueError("cohorts need the grain day, week, month, quarter or year")
        if self.stages and measure is not Measure.FUNNEL:
            raise ValueError("only a funnel has stages")
        if len({stage.name for stage in self.stages}) != len(self.stages):
            raise ValueError("the names of the stages must differ")
        self._check_of()

    def _check_of(self) -> None:
        of, path = self.of, PATH.fullmatch(self.of or "")
        if self.measure is Measure.ANSWER and not (path and path[1] in ("answer", "result")):
            raise ValueError("`answer` needs `of`: answer.<field> or result.<step>.<member>")
        if self.measure is Measure.TERMS and of is not None and not (path and path[1] == "answer"):
            raise ValueError("the `of` of terms is answer.<field>")
        if self.measure is Measure.SIMILAR and not re.fullmatch(r"rsp_[0-9a-z]{26}", (of or "").lower()):
            raise ValueError("`similar` needs `of`: the identifier of a response")
        if of is not None and self.measure not in (Measure.ANSWER, Measure.TERMS, Measure.SIMILAR):
            raise ValueError(f"{self.measure.value} takes no `of`")

    @property
    def subject(self) -> Subject:
        return MEASURES[self.measure].subject

    @property
    def asked(self) -> list[Statistic]:
        """The statistics of the answer."""
        if self.statistics:
            return self.statistics
        return ["count", "share"] if self.measure in COUNTED else ["count", "mean", "p50", "p95"]

    @property
    def columns(self) -> list[str]:
        """The columns of the answer, in order."""
        bucket = [] if self.grain == "all" else [BUCKET]
        match self.measure:
            case Measure.FUNNEL:
                return [*bucket, *self.dimensions, "position", "stage", "count", "share"]
            case Measure.COHORTS:
                return ["cohort", "period", "members", "share"]
            case Measure.TERMS:
                return ["term", "responses", "occurrences"]
            case Measure.SIMILAR:
                return ["response", "form", "created", "similarity"]
        return [*bucket, *self.dimensions, *self.asked]

    @property
    def fingerprint(self) -> str:
        """What makes two questions the same: 64 hexadecimal digits."""
        return sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()


_ZONES: Final = available_timezones()
DIMENSIONS: Final[dict[Subject, dict[str, str]]] = {
    "response": RESPONSE_DIMENSIONS,
    "job": JOB_DIMENSIONS,
    "audit": AUDIT_DIMENSIONS,
}


class Freshness(BaseModel):
    """How new what was answered is."""

    generation: int = Field(description="of the warehouse; grows with each publication")
    published_at: datetime | None = Field(None, description="when that was published")
    complete_until: datetime | None = Field(None, description="everything accepted before this moment is in it")


#: Header of every answer over HTTP, files and charts too: `complete_until`, in RFC 3339.
FRESHNESS_HEADER: Final = "Quern-Freshness"


class ColumnInfo(BaseModel):
    name: str
    type: Literal["text", "whole", "number", "boolean", "day", "moment"]
    unit: str = ""


class AnswerPage(BaseModel):
    """Rows of an answer, a page at a time."""

    columns: list[ColumnInfo]
    rows: list[list[Any]] = Field(description="one value a column; days as YYYY-MM-DD, moments in RFC 3339")
    total_rows: int
    freshness: Freshness
    cached: bool = Field(description="whether it had been computed before")
    next_cursor: str | None = Field(description="null on the last page; holds for as long as the answer is kept")
