"""Errors in the shape that OpenAI's clients know: their status decides the class of exception that a client raises."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Ends a request. `param` names the member that is wrong; `code` is for programs, `message` for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        """The `error` member of the answer."""
        kind = _TYPES.get(self.status, "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


def unsupported(param: str, reason: str = "is not supported") -> ApiError:
    """400 for what a request may ask of OpenAI and not of Quern."""
    return ApiError(400, f"{param} {reason}; see docs/openai.md", code="unsupported_parameter", param=param)


def not_found(what: str, identity: str) -> ApiError:
    """404; also for what belongs to another tenant."""
    return ApiError(404, f"No {what} with id '{identity[:100]}' found.", code="not_found", param="id")


def invalid(error: ValidationError) -> ApiError:
    """400 from a failed validation: the first fault in words, without what was sent."""
    item = error.errors(include_input=False, include_url=False, include_context=False)[0]
    # Between the names stand tags of unions, which are no part of the path.
    places = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "tagged-"))]
    param = ".".join(places) or None
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return unsupported(param or "a parameter")
    code = "missing_required_parameter" if item["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param or 'the body'}: {message}", code=code, param=param)
