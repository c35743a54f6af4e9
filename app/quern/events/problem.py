"""Errors as problem documents (RFC 9457)."""

from collections.abc import Mapping
from http import HTTPStatus

import orjson
from quart import Response

from quern.observe.logs import request_id


class ProblemError(Exception):
    """Ends a request with a problem document; `detail` says what was expected, found, and what to do."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def response(error: ProblemError) -> Response:
    """The answer to a request that ended in `error`."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
        "request_id": request_id.get() or "",
    }
    return Response(
        orjson.dumps(document), status=error.status, headers=error.headers, content_type="application/problem+json"
    )


def unavailable(detail: str) -> ProblemError:
    """503: the same request may succeed a little later."""
    return ProblemError(503, detail, {"Retry-After": "2"})
