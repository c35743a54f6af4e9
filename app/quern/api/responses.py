"""`/forms/{id}/responses` and `/responses`: submit, read, list, export, erase."""

import csv
import io
import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import orjson
import pymongo
from pydantic import BaseModel, ConfigDict, EmailStr, Field, StringConstraints, TypeAdapter, ValidationError

from quern.api.operation import Call, Edge, Reply
from quern.api.page import Page, PageQuery, page
from quern.api.problem import Fault, Problem, invalid, not_found
from quern.forms import form as forms
from quern.forms.fields import MAX_DEPTH, NAME, FormDefinition, GroupField, check_answers, compiled
from quern.jobs import queue
from quern.jobs.wake import RELAY
from quern.observe.traces import traceparent
from quern.responses import intake
from quern.responses import response as store
from quern.store import clock
from quern.store.connection import Document
from quern.store.moment import Moment
from quern.workflows import run
from quern.workflows.definition import Workflow, parsed
from quern.workflows.forget import forgetting

edge = Edge("responses")

#: Responses that one request may erase, in one transaction; more are erased by asking again.
MAX_ERASED: Final = 100
#: Seconds for what may read every response of a form: answers are not indexed.
SCAN_SECONDS: Final = 30.0
#: Seconds that one read of a running export may take.
EXPORT_READ_SECONDS: Final = 30.0
#: With which a spreadsheet begins a formula; the wide forms in some languages.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


ANSWER_PATH: Final = rf"{NAME.removesuffix('$')}(\.{NAME[1:-1]}){{0,{MAX_DEPTH - 1}}}$"
_EMAIL: Final[TypeAdapter[str]] = TypeAdapter(EmailStr)


class ResponseIn(BaseModel):
    """A filled-in form."""

    model_config = ConfigDict(extra="forbid")

    answers: dict[str, Any] = Field(description="field to answer, as `GET /forms/{form}/schema` describes")
    version: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = Field(
        None, description="the version that was filled in; by default the one published now"
    )


class JobLink(BaseModel):
    id: str
    step: str
    status: str
    href: str
    events: str


class Accepted(BaseModel):
    """The response is kept and will survive a power cut; its jobs run now."""

    id: str
    status: Literal["processing", "processed"]
    created: datetime
    href: str
    jobs: list[JobLink]


class Response(BaseModel):
    id: str
    form: str
    version: int
    status: Literal["processing", "processed", "incomplete", "erased"]
    created: datetime
    processed: datetime | None = None
    erased: datetime | None = None
    answers: dict[str, Any] | None = Field(None, description="null once erased")
    results: dict[str, Any] = Field(default_factory=dict, description="step to result")
    jobs: list[JobLink] = Field(default_factory=list)


class ResponsePage(Page[Response]):
    """Responses, newest first."""


class ResponseFilter(BaseModel):
    """Which responses."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["processing", "processed", "incomplete"] | None = None
    created_from: Moment | None = Field(None, description="this moment or later (RFC 3339)")
    created_before: Moment | None = None
    where: Annotated[str, StringConstraints(max_length=600)] | None = Field(
        None, description="`field:value`: the answer must equal the value", examples=["sector:health"]
    )


class ResponseQuery(PageQuery, ResponseFilter):
    """A page of the responses that fit."""


class ExportQuery(ResponseFilter):
    """What to export, and how."""

    format: Literal["csv", "jsonl"] = "jsonl"


class ErasureIn(BaseModel):
    """Whose answers to erase: every response to the form whose `field` has this `value`."""

    model_config = ConfigDict(extra="forbid")

    field: Annotated[str, StringConstraints(pattern=ANSWER_PATH)] = Field(
        description="its name; `group.field` for one in a group"
    )
    value: Annotated[str, StringConstraints(min_length=1, max_length=500)]


class Erasure(BaseModel):
    """What was erased."""

    erased: list[str]
    more: bool = Field(description="true when more fit; ask again")


def _links(document: Document) -> list[JobLink]:
    links = []
    for step, state in document.get("steps", {}).items():
        job = run.job_id(document["tenant"], document["_id"], step)
        href = f"/api/v1/jobs/{job}"
        links.append(JobLink(id=job, step=step, status=state, href=href, events=f"{href}/events"))
    return links


def show(document: Document) -> Response:
    return Response(
        id=document["_id"],
        form=document["form"],
        version=document["version"],
        status=document["status"],
        created=document["created"],
        processed=document.get("processed"),
        erased=document.get("erased"),
        answers=document.get("answers"),
        results=document.get("results", {}),
        jobs=_links(document),
    )


@edge.operation(
    "POST",
    "/forms/{form}/responses",
    scope="responses:submit",
    summary="Submit a response",
    body=ResponseIn,
    answers={202: Accepted},
    transaction=False,
)
def submit(call: Call, form: str) -> Reply:
    """Validated at once; 202 means that the response is kept, whatever happens next.

    With an `Idempotency-Key` the same request may be sent again safely.
    """
    body: ResponseIn = call.body
    standing = call.runtime.open_forms.get(call.db, call.tenant, form)
    if standing is None:
        raise not_found("form")
    try:
        return _accept(call, form, body, standing)
    except Problem as problem:
        # What was accepted once gets the same answer again, whatever has become of the form since.
        earlier = _earlier(call, form, body)
        if earlier is None:
            raise
        if isinstance(earlier, Problem):
            raise earlier from problem
        return earlier


def _accept(call: Call, form: str, body: ResponseIn, standing: forms.Standing) -> Reply:
    if standing.version is None:
        raise Problem(409, "the form was never published", kind="form-not-open")
    if standing.status != "open":
        raise Problem(409, "the form is closed", kind="form-not-open")
    number = body.version or standing.version
    version = call.runtime.versions.get(call.db, call.tenant, form, number)
    if version is None:
        raise Problem(
            422,
            f"the form has no version {number}",
            kind="validation",
            errors=[Fault(pointer="/version", detail="no such version")],
        )
    try:
        answers = check_answers(compiled(version.definition), body.answers)
    except ValidationError as error:
        raise invalid(error, body.answers, "/answers") from None
    workflow = parsed(version.workflow)
    steps = run.begin(workflow, answers)
    submission = intake.Submission(
        call.principal,
        form,
        number,
        answers,
        steps,
        run.status(workflow, steps),
        call.request_id,
        traceparent(),
        call.idempotency_key,
        _fingerprint(body),
    )
    try:
        kept = intake.accept(call.db, submission)
    except intake.SubmittedBeforeError:
        raise Problem(
            409,
            "the first request with this key is still running",
            kind="request-in-progress",
            headers={"Retry-After": "1"},
        ) from None
    call.runtime.nudge(RELAY)
    return _accepted(kept, steps, workflow, {})


def _fingerprint(body: ResponseIn) -> str:
    """Of what the client sent, not of what a version of the form made of it: the form may have changed since."""
    return intake.fingerprint(body.answers, body.version)


def _accepted(kept: Document, steps: run.Steps, workflow: Workflow, headers: dict[str, str]) -> Reply:
    href = f"/api/v1/responses/{kept['_id']}"
    status: Literal["processing", "processed"] = (
        "processing" if run.status(workflow, steps) == "processing" else "processed"
    )
    links = _links({**kept, "steps": steps})
    accepted = Accepted(id=kept["_id"], status=status, created=kept["created"], href=href, jobs=links)
    return Reply(accepted, 202, {"Location": href, **headers})


def _earlier(call: Call, form: str, body: ResponseIn) -> Reply | Problem | None:
    """The answer, to the letter, that this very request had when it was first sent; None when it never was accepted."""
    if call.idempotency_key is None:
        return None
    found = intake.submitted(call.db, call.tenant, form, call.idempotency_key)
    if found is None:
        return None
    if "erased" in found:
        return Problem(409, "the response that this Idempotency-Key made was erased; use a new key")
    if found.get("fingerprint") != _fingerprint(body):
        return Problem(
            422, "this Idempotency-Key was used with another response; use a new key", kind="idempotency-key-reused"
        )
    version = call.runtime.versions.get(call.db, call.tenant, form, found["version"])
    if version is None:
        return None
    workflow = parsed(version.workflow)
    return _accepted(found, run.begin(workflow, found["answers"]), workflow, {"Idempotent-Replayed": "true"})


@edge.operation(
    "GET",
    "/forms/{form}/responses",
    scope="responses:read",
    summary="List responses",
    query=ResponseQuery,
    answers={200: ResponsePage},
    seconds=SCAN_SECONDS,
)
def list_responses(call: Call, form: str) -> Reply:
    """Newest first. Vectors of `embed` steps are left out; read one response to see them."""
    query: ResponseQuery = call.query
    where = _filter(call, form, query)
    after = query.moment_position()
    found = store.listing(call.db, call.tenant, where, after=after, limit=query.limit + 1)
    items, following = page(
        found,
        query.limit,
        lambda item: _without_vectors(show(item)),
        lambda item: [item["created"].isoformat(), item["_id"]],
    )
    return Reply(ResponsePage(items=items, next_cursor=following))


def _without_vectors(response: Response) -> Response:
    for result in response.results.values():
        if isinstance(result, dict):
            result.pop("vector", None)
    return response


def _filter(call: Call, form: str, query: ResponseFilter) -> store.Filter:
    document = forms.get(call.db, call.tenant, form)
    if document is None:
        raise not_found("form")
    answers: dict[str, str | float | bool] = {}
    if query.where is not None:
        name, colon, value = query.where.partition(":")
        kind = _kinds(call, document).get(name)
        if not colon or kind is None:
            detail = "expected `field:value` with a field of the form's published version"
            raise Problem(422, detail, kind="validation", errors=[Fault(pointer="?where", detail=detail)])
        answers[name] = _typed(kind, value)
    return store.Filter(form, query.status, query.created_from, query.created_before, answers)


def _kinds(call: Call, document: Document) -> dict[str, str]:
    if document["version"] is None:
        return {}
    version = call.runtime.versions.get(call.db, call.tenant, document["_id"], document["version"])
    if version is None:
        return {}
    return {field.name: field.type for field in FormDefinition.model_validate_json(version.definition).fields}


def _typed(kind: str, value: str) -> str | float | bool:
    """The text of a query parameter as the kind of answer it is compared with."""
    try:
        if kind in ("number", "rating"):
            return float(value)
        if kind == "consent":
            return {"true": True, "false": False}[value]
        if kind == "email":
            return as_kept(value)
    except (ValueError, KeyError):
        detail = f"expected a value that fits a {kind} field"
        raise Problem(422, detail, kind="validation", errors=[Fault(pointer="?where", detail=detail)]) from None
    return value


def as_kept(text: str) -> str:
    """An email address as an email field keeps it (its domain in lower case); other text as it is."""
    try:
        return _EMAIL.validate_python(text)
    except ValidationError:
        return text


@edge.operation(
    "GET",
    "/forms/{form}/export",
    scope="responses:read",
    summary="Export responses",
    query=ExportQuery,
    answers={200: "application/jsonl"},
)
def export(call: Call, form: str) -> Reply:
    """Streamed, oldest first: JSON Lines with everything, or CSV with a column for each answer and each result."""
    query: ExportQuery = call.query
    where = _filter(call, form, query)
    columns = _columns(call, form) if query.format == "csv" else []
    rows = _begun(store.stream(call.db, call.tenant, where))
    name = f'attachment; filename="{form}.{query.format}"'
    if query.format == "jsonl":
        return Reply(stream=_jsonl(rows), media_type="application/jsonl", headers={"Content-Disposition": name})
    return Reply(stream=_csv(rows, columns), media_type="text/csv", headers={"Content-Disposition": name})


def _begun(rows: Iterator[Document]) -> Iterator[Document]:
    """The same rows, the first of them read already: a database that is away is then an answer of its own."""
    first = list(itertools.islice(rows, 1))

    def bounded() -> Iterator[Document]:
        yield from first
        while True:
            # Each read on its own, since the client decides how long the whole takes.
            with pymongo.timeout(EXPORT_READ_SECONDS):
                row = next(rows, None)
            if row is None:
                return
            yield row

    return bounded()


def _jsonl(rows: Iterator[Document]) -> Iterator[bytes]:
    for row in rows:
        yield orjson.dumps(show(row).model_dump(mode="json", exclude={"jobs"})) + b"\n"


def _columns(call: Call, form: str) -> list[str]:
    """Every column that some version of the form fills, in the order of first appearance."""
    columns = ["id", "version", "status", "created", "processed"]
    for version in reversed(forms.versions(call.db, call.tenant, form, before=None, limit=1000)):
        for field in FormDefinition.model_validate_json(version["definition"]).fields:
            if isinstance(field, GroupField) and not field.repeated:
                columns += [f"answers.{field.name}.{inner.name}" for inner in field.fields]
            else:
                columns.append(f"answers.{field.name}")
        for step in parsed(version["workflow"]).steps:
            columns.append(f"results.{step.name}")
    return list(dict.fromkeys(columns))


def _csv(rows: Iterator[Document], columns: list[str]) -> Iterator[bytes]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(columns)
    for row in rows:
        shown = _without_vectors(show(row)).model_dump(mode="json")
        cells = {name: shown[name] for name in ("id", "version", "status", "created", "processed")}
        for name, value in (shown["answers"] or {}).items():
            inner = f"answers.{name}."
            if isinstance(value, dict) and any(column.startswith(inner) for column in columns):
                cells.update({inner + key: item for key, item in value.items()})
            else:
                cells[f"answers.{name}"] = value
        cells.update({f"results.{name}": value for name, value in shown["results"].items()})
        writer.writerow([_cell(cells.get(column)) for column in columns])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()
    if buffer.tell():
        yield buffer.getvalue().encode()


def _cell(value: Any) -> str:
    """Text for a spreadsheet, which must not take it for a formula (OWASP, "CSV Injection")."""
    if value is None:
        return ""
    if isinstance(value, str):
        return "'" + value if value.startswith(_FORMULA) or value.lstrip().startswith(_FORMULA) else value
    return orjson.dumps(value).decode()


@edge.operation(
    "GET", "/responses/{response}", scope="responses:read", summary="Read a response", answers={200: Response}
)
def get_response(call: Call, response: str) -> Reply:
    """With the results of its steps as far as they are. An erased one shows only that it was."""
    document = store.get(call.db, call.tenant, response)
    if document is None:
        raise not_found("response")
    return Reply(show(document))


def _erase(call: Call, response: str) -> bool | None:
    days = call.runtime.settings.job.keep_ended_days
    who = call.principal.key
    return store.erase(call.db, call.tenant, response, who, call.request_id, call.transaction, keep_days=days)


def _forget(call: Call) -> None:
    """Have the engine forget the erased words: now, and once more when no worker can hold them any longer."""
    again = forgetting(call.tenant, clock.now(), call.runtime.settings.job.lease)
    call.open_after_commit(queue.insert(call.db, [again], session=call.transaction))
    call.after_commit.append(lambda: call.runtime.forget(call.tenant))


@edge.operation(
    "DELETE", "/responses/{response}", scope="responses:erase", summary="Erase a response", answers={204: None}
)
def erase_response(call: Call, response: str) -> Reply:
    """The answers and everything derived from them vanish; the audit log says so. Erasing again is no error."""
    erased = _erase(call, response)
    if erased is None:
        raise not_found("response")
    _forget(call)
    return Reply(status=204)


@edge.operation(
    "POST",
    "/forms/{form}/erasures",
    scope="responses:erase",
    summary="Erase a person's responses",
    body=ErasureIn,
    answers={200: Erasure},
    seconds=SCAN_SECONDS,
)
def erase_by_answer(call: Call, form: str) -> Reply:
    """Erases every response to the form whose field has the value, for example one e-mail address."""
    body: ErasureIn = call.body
    if forms.get(call.db, call.tenant, form) is None:
        raise not_found("form")
    where = store.Filter(form=form, answers={body.field: as_kept(body.value)})
    found = store.matching(call.db, call.tenant, where, MAX_ERASED + 1)
    erased = found[:MAX_ERASED]
    for response in erased:
        _erase(call, response)
    if erased:
        _forget(call)
    return Reply(Erasure(erased=erased, more=len(found) > MAX_ERASED))
