"""Errors over HTTP: `application/problem+json` (RFC 9457), with a JSON pointer (RFC 6901) to each bad field."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import orjson
from flask import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quern.forms.fields import pointer

MEDIA_TYPE: Final = "application/problem+json"
MOST_ERRORS: Final = 50
#: Characters of one fault's text; a choice's options would fill pages.
_LONGEST: Final = 300


class Fault(BaseModel):
    """One bad field."""

    pointer: str = Field(description="JSON pointer into the request's body, or `?name` for a query parameter")
    detail: str


class ProblemDetails(BaseModel):
    """What a client reads when something went wrong."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[Fault] | None = None


class Problem(Exception):
    """An answer that is an error. `detail` says what was expected and found and what to do; never an answer's text."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        errors: Sequence[Fault] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.kind = status, detail, kind
        self.errors, self.headers = list(errors), headers or {}


def not_found(what: str) -> Problem:
    """The same for what is not there and for what is another tenant's."""
    return Problem(404, f"there is no such {what}")


def invalid(error: ValidationError, value: Any, prefix: str = "") -> Problem:
    """A 422 with the place in `value` of each fault, of many the first MOST_ERRORS."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    faults = [
        Fault(
            pointer=prefix + pointer(item["loc"], value, item["type"] == "missing"),
            detail=_short(item["msg"].removeprefix("Value error, ")),
        )
        for item in found[:MOST_ERRORS]
    ]
    noun = "fault" if error.error_count() == 1 else "faults"
    return Problem(422, f"the request has {error.error_count()} {noun}; see `errors`", kind="validation", errors=faults)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def away(what: str, changed: bool = False) -> Problem:
    """A 503 that invites the client back. `changed`: whether the request may have done its work all the same."""
    detail = f"{what} is out of reach; nothing was changed, try again"
    if changed:
        detail = (
            f"{what} went out of reach; the change was made whole or not at all, and nobody can say which: "
            "look first, or send an Idempotency-Key so that trying again is safe"
        )
    return Problem(503, detail, kind="away", headers={"Retry-After": "2"})


def render(problem: Problem, request_id: str) -> Response:
    """The problem as an HTTP answer."""
    kind = problem.kind or HTTPStatus(problem.status).phrase.lower().replace(" ", "-")
    body: dict[str, Any] = {
        "type": f"urn:quern:problem:{kind}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
    }
    if problem.errors:
        body["errors"] = [fault.model_dump() for fault in problem.errors]
    return Response(orjson.dumps(body), problem.status, problem.headers, mimetype=MEDIA_TYPE)
