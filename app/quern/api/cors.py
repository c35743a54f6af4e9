"""Cross-origin requests: a form stands in a web page of any origin, so submitting is open to all origins.

Only submitting, which is all that a publishable key can do. Keys travel in a header of their own and never as cookies,
so `*` gives no page a right that it was not handed (the Fetch standard, "CORS protocol").
"""

import re
from typing import Final

from flask import Flask, Response, request

_SUBMIT: Final = re.compile(r"/api/v1/forms/[^/]+/responses/?")
_PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, X-Request-ID, traceparent",
    "Access-Control-Max-Age": "86400",
}
_EXPOSED: Final = "Location, RateLimit, RateLimit-Policy, Retry-After, X-Request-ID, Idempotent-Replayed"


def add_cors(app: Flask) -> None:
    """Answer preflight requests to the submit route, and let pages read what it answers."""

    @app.before_request
    def preflight() -> Response | None:
        asked = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        return Response(status=204, headers=_PREFLIGHT) if asked and _SUBMIT.fullmatch(request.path) else None

    @app.after_request
    def allow(response: Response) -> Response:
        if request.method in ("OPTIONS", "POST") and _SUBMIT.fullmatch(request.path):
            response.headers["Access-Control-Allow-Origin"] = "*"
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        return response
