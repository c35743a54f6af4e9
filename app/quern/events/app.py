"""The Quart application of the waiting edge."""

import asyncio
import logging
import re
import signal
from collections.abc import AsyncGenerator
from typing import Final

from pymongo.errors import PyMongoError
from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from quern.config import LiveSettings
from quern.events import jobs, operations, problem
from quern.events.admission import Places
from quern.events.authentication import Authenticate
from quern.events.database import AsyncStore
from quern.events.edge import Edge
from quern.events.exchange import Exchange
from quern.events.hub import Hub
from quern.events.v1.service import PREFIX, add_v1, http_error
from quern.observe.logs import request_id
from quern.runtime import Runtime
from quern.store import identifier
from quern.store.connection import is_away

_log = logging.getLogger(__name__)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


def create_app(live: LiveSettings, authenticate: Authenticate, runtime: Runtime | None = None) -> Quart:
    """The application; its hub runs while it is served. `app.extensions["edge"]` is its Edge.

    `authenticate` is called on the event loop and must not block it. `/v1` is served with a `runtime` only.
    """
    settings = live.get().event
    store = AsyncStore(live)
    edge = Edge(settings, authenticate, Places(settings), Hub(lambda: store.db.jobs))

    app = Quart("quern.events", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1024
    app.extensions["edge"] = edge
    app.asgi_app = Exchange(app.asgi_app, settings.send_timeout)  # type: ignore[method-assign]
    app.register_blueprint(jobs.blueprint(edge))
    app.register_blueprint(operations.blueprint(edge))
    if runtime is not None:
        add_v1(app, edge, runtime)

    @app.while_serving
    async def hub() -> AsyncGenerator[None, None]:
        task = asyncio.create_task(edge.hub.run())
        task.add_done_callback(_end_with_hub)
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    @app.before_request
    async def identify() -> None:
        given = request.headers.get("X-Request-ID", "")
        request_id.set(given if _REQUEST_ID.fullmatch(given) else identifier.new("req"))

    @app.after_request
    async def name_request(response: Response) -> Response:
        response.headers["X-Request-ID"] = request_id.get() or ""
        return response

    @app.errorhandler(problem.ProblemError)
    async def on_problem(error: problem.ProblemError) -> Response:
        return problem.response(error)

    @app.errorhandler(HTTPException)
    async def on_http_error(error: HTTPException) -> Response:
        if request.path.startswith(PREFIX + "/"):
            return http_error(error)
        allow = {name: value for name, value in error.get_headers() if name == "Allow"}
        return problem.response(problem.ProblemError(error.code or 500, error.description or "", allow))

    @app.errorhandler(PyMongoError)
    async def on_database_error(error: PyMongoError) -> Response:
        if not is_away(error):
            raise error
        return problem.response(problem.unavailable("The database is away."))

    @app.errorhandler(Exception)
    async def on_error(error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return problem.response(problem.ProblemError(500, "The server failed; its log names this request."))

    return app


def _end_with_hub(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.critical("the hub failed; the process ends, to be started again", exc_info=error)
        signal.raise_signal(signal.SIGTERM)
