"""`/forms`: drafts, versions, opening and closing."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from quern.api.operation import Call, Edge, Reply
from quern.api.page import Page, PageQuery, bad_cursor, page
from quern.api.problem import Fault, Problem, not_found
from quern.forms import form as store
from quern.forms.fields import EmailField, Fields, FormDefinition, compiled
from quern.store.connection import Document
from quern.webhooks import endpoints
from quern.workflows.definition import EmailStep, FromField, WebhookStep, Workflow

edge = Edge("forms")


class FormIn(BaseModel):
    """A form's draft."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
    fields: Fields
    workflow: Workflow = Workflow()


class Content(BaseModel):
    """What a draft or a version asks, and what happens with the answers."""

    fields: list[dict[str, Any]]
    workflow: dict[str, Any]


class Form(BaseModel):
    id: str
    name: str
    status: Literal["draft", "open", "closed"]
    version: int | None = Field(description="the published version that is filled in now")
    draft: Content | None = Field(description="null when nothing waits to be published")
    created: datetime
    updated: datetime


class Version(BaseModel):
    form: str
    version: int
    name: str
    published: datetime
    content: Content


class FormQuery(PageQuery):
    status: Literal["draft", "open", "closed"] | None = None


class FormPage(Page[Form]):
    """Forms, newest first."""


class VersionPage(Page[Version]):
    """Versions, newest first."""


class AnswersSchema(BaseModel):
    """JSON Schema of the answers to the form's published version."""

    form: str
    version: int
    json_schema: dict[str, Any]


def show(document: Document) -> Form:
    return Form(
        id=document["_id"],
        name=document["name"],
        status=document["status"],
        version=document["version"],
        draft=_content(document["draft"]) if document["draft"] else None,
        created=document["created"],
        updated=document["updated"],
    )


def _content(stored: Document) -> Content:
    return Content(fields=orjson.loads(stored["definition"])["fields"], workflow=orjson.loads(stored["workflow"]))


def _show_version(document: Document) -> Version:
    return Version(
        form=document["form"],
        version=document["version"],
        name=document["name"],
        published=document["published"],
        content=_content(document),
    )


def _checked(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """The draft as JSON. Raises Problem where the workflow does not fit the fields or the tenant."""
    body: FormIn = call.body
    faults: list[Fault] = []
    kinds = {field.name: field for field in body.fields}
    for position, step in enumerate(body.workflow.steps):
        place = f"/workflow/steps/{position}"
        for name in getattr(step, "fields", None) or []:
            if name not in kinds:
                faults.append(Fault(pointer=f"{place}/fields", detail=f"the form has no field {name}"))
        if isinstance(step, EmailStep) and isinstance(step.to, FromField):
            known = isinstance(kinds.get(step.to.field), EmailField)
            if not known:
                faults.append(Fault(pointer=f"{place}/to/field", detail=f"the form has no email field {step.to.field}"))
        if isinstance(step, WebhookStep):
            try:
                endpoints.get(call.db, call.tenant, step.endpoint, session=call.session)
            except LookupError:
                faults.append(Fault(pointer=f"{place}/endpoint", detail="there is no such webhook endpoint"))
    if faults:
        raise Problem(422, "the workflow does not fit the form; see `errors`", kind="validation", errors=faults)
    definition = FormDefinition(fields=body.fields).model_dump(mode="json", exclude_defaults=True)
    compiled(orjson.dumps(definition).decode())
    return definition, body.workflow.model_dump(mode="json", by_alias=True, exclude_none=True)


@edge.operation("POST", "/forms", scope="forms:write", summary="Create a form", body=FormIn, answers={201: Form})
def create_form(call: Call) -> Reply:
    """The form starts as a draft; publish it to accept responses."""
    definition, workflow = _checked(call)
    document = store.create(call.db, call.tenant, call.body.name, definition, workflow, call.session)
    call.audit("form.created", document["_id"])
    return Reply(show(document), 201, {"Location": f"/api/v1/forms/{document['_id']}"})


@edge.operation("GET", "/forms", scope="forms:read", summary="List forms", query=FormQuery, answers={200: FormPage})
def list_forms(call: Call) -> Reply:
    """Newest first."""
    query: FormQuery = call.query
    after = query.position(1)
    found = store.listing(
        call.db, call.tenant, after=after[0] if after else None, limit=query.limit + 1, status=query.status
    )
    items, following = page(found, query.limit, show, lambda document: [document["_id"]])
    return Reply(FormPage(items=items, next_cursor=following))


@edge.operation("GET", "/forms/{form}", scope="forms:read", summary="Read a form", answers={200: Form})
def get_form(call: Call, form: str) -> Reply:
    document = store.get(call.db, call.tenant, form)
    if document is None:
        raise not_found("form")
    return Reply(show(document))


@edge.operation(
    "PUT", "/forms/{form}", scope="forms:write", summary="Replace a form's draft", body=FormIn, answers={200: Form}
)
def put_form(call: Call, form: str) -> Reply:
    """Published versions stay as they are; responses to them too."""
    definition, workflow = _checked(call)
    document = store.save_draft(
        call.db,
        call.tenant,
        form,
        name=call.body.name,
        definition=definition,
        workflow=workflow,
        session=call.session,
    )
    if document is None:
        raise not_found("form")
    call.audit("form.draft_saved", form)
    return Reply(show(document))


@edge.operation(
    "POST",
    "/forms/{form}/publish",
    scope="forms:write",
    summary="Publish the draft as the next version",
    answers={200: Form},
)
def publish_form(call: Call, form: str) -> Reply:
    """Opens the form, everywhere within a second.

    Responses to earlier versions are accepted as long as they name their version.
    """
    if call.session is None:
        raise RuntimeError("publishing runs in a transaction")
    try:
        document = store.publish(call.db, call.tenant, form, call.session)
    except store.NotPossibleError as error:
        raise Problem(409, str(error)) from None
    if document is None:
        raise not_found("form")
    call.audit("form.published", form, {"version": document["version"]})
    call.after_commit.append(lambda: call.runtime.open_forms.drop(call.tenant, form))
    return Reply(show(document))


def _turn(call: Call, form: str, status: str) -> Reply:
    try:
        document = store.set_status(call.db, call.tenant, form, status, call.session)
    except store.NotPossibleError as error:
        raise Problem(409, str(error)) from None
    if document is None:
        raise not_found("form")
    call.audit(f"form.{'closed' if status == 'closed' else 'opened'}", form)
    call.after_commit.append(lambda: call.runtime.open_forms.drop(call.tenant, form))
    return Reply(show(document))


@edge.operation(
    "POST", "/forms/{form}/close", scope="forms:write", summary="Stop accepting responses", answers={200: Form}
)
def close_form(call: Call, form: str) -> Reply:
    """Takes hold everywhere within a second. What was accepted is still worked on."""
    return _turn(call, form, "closed")


@edge.operation(
    "POST", "/forms/{form}/open", scope="forms:write", summary="Accept responses again", answers={200: Form}
)
def open_form(call: Call, form: str) -> Reply:
    return _turn(call, form, "open")


@edge.operation(
    "GET",
    "/forms/{form}/versions",
    scope="forms:read",
    summary="List a form's versions",
    query=PageQuery,
    answers={200: VersionPage},
)
def list_versions(call: Call, form: str) -> Reply:
    """Newest first."""
    if store.get(call.db, call.tenant, form) is None:
        raise not_found("form")
    query: PageQuery = call.query
    after = query.position(1)
    if after and not re.fullmatch("[0-9]{1,9}", after[0]):
        raise bad_cursor()
    found = store.versions(call.db, call.tenant, form, before=int(after[0]) if after else None, limit=query.limit + 1)
    items, following = page(found, query.limit, _show_version, lambda document: [str(document["version"])])
    return Reply(VersionPage(items=items, next_cursor=following))


@edge.operation(
    "GET",
    "/forms/{form}/schema",
    scope="forms:read",
    summary="JSON Schema of the answers",
    answers={200: AnswersSchema},
)
def answers_schema(call: Call, form: str) -> Reply:
    """What `answers` must look like for the version that is filled in now."""
    document = store.get(call.db, call.tenant, form)
    if document is None or document["version"] is None:
        raise not_found("published form")
    version = call.runtime.versions.get(call.db, call.tenant, form, document["version"])
    if version is None:
        raise not_found("published form")
    schema = compiled(version.definition).model_json_schema(by_alias=True)
    return Reply(AnswersSchema(form=form, version=version.number, json_schema=schema))
