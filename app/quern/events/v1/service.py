"""`/v1` as a part of the events service: its routes, its errors, and the subscription that runs beside them."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

from pymongo.errors import PyMongoError
from quart import Blueprint, Quart, Response, g, request
from redis.exceptions import RedisError
from werkzeug.exceptions import HTTPException

from quern.events.edge import Edge
from quern.events.v1 import completions, files, responses
from quern.events.v1.desk import Desk, answered
from quern.events.v1.gate import Gate
from quern.observe import metrics
from quern.openai.error import ApiError
from quern.runtime import Runtime
from quern.store.connection import is_away

_log = logging.getLogger(__name__)
PREFIX = "/v1"
#: Beside a file, a multipart body has names and borders.
_MULTIPART_BYTES = 65_536


def add_v1(app: Quart, edge: Edge, runtime: Runtime) -> None:
    """Add `/v1` to the application."""
    desk = Desk(edge, runtime)
    routes = Blueprint("v1", __name__, url_prefix=PREFIX)
    for resource in (completions, responses, files):
        resource.add_routes(routes, desk)

    @routes.before_request
    async def begin() -> None:
        g.began = time.monotonic()

    @routes.after_request
    async def finish(response: Response) -> Response:
        rule = request.url_rule.rule if request.url_rule else "unmatched"
        metrics.REQUESTS.labels(rule, request.method, response.status_code).inc()
        metrics.REQUEST_SECONDS.labels(rule, request.method).observe(time.monotonic() - g.began)
        for name, value in getattr(g, "limits", {}).items():
            response.headers.setdefault(name, value)
        return response

    @routes.errorhandler(ApiError)
    async def on_error(error: ApiError) -> Response:
        return answered(error)

    @routes.errorhandler(PyMongoError)
    async def on_database_error(error: PyMongoError) -> Response:
        if not is_away(error):
            return await on_unexpected(error)
        return answered(ApiError(503, "The database is away.", code="away", headers={"Retry-After": "2"}))

    @routes.errorhandler(RedisError)
    async def on_redis_error(error: RedisError) -> Response:
        return answered(ApiError(503, "Redis is away.", code="away", headers={"Retry-After": "2"}))

    @routes.errorhandler(HTTPException)
    async def on_http_error(error: HTTPException) -> Response:
        return http_error(error)

    @routes.errorhandler(Exception)
    async def on_unexpected(error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return answered(ApiError(500, "The server failed; its log names this request."))

    app.register_blueprint(routes)
    app.config["MAX_CONTENT_LENGTH"] = desk.settings.max_file_bytes + _MULTIPART_BYTES
    app.asgi_app = Gate(app.asgi_app, PREFIX + "/")  # type: ignore[method-assign]

    @app.while_serving
    async def feeds() -> AsyncGenerator[None, None]:
        task = asyncio.create_task(desk.feeds.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def http_error(error: HTTPException) -> Response:
    """An error of the framework's own (no such path, another method, too large) in OpenAI's shape."""
    allow = {name: value for name, value in error.get_headers() if name == "Allow"}
    status = error.code or 500
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(status)
    return answered(ApiError(status, error.description or error.name, code=code, headers=allow))
