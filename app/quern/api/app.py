"""The Flask application: every blueprint, and what each request passes on its way in and out."""

import logging
import re
import time
from typing import Any

import orjson
from flask import Flask, Response, g, request
from flask_swagger_ui import get_swaggerui_blueprint
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.middleware.proxy_fix import ProxyFix

from quern import __version__
from quern.api import analytics, audit, forms, jobs, keys, responses, search, webhooks
from quern.api.cors import add_cors
from quern.api.openapi import describe
from quern.api.operation import Edge, Operation, observe
from quern.api.problem import Problem, away, render
from quern.config import LiveSettings, Settings
from quern.observe import logs, metrics, traces
from quern.runtime import Runtime
from quern.store import identifier
from quern.store.connection import is_away

_log = logging.getLogger(__name__)
#: What a client may call its request; the front door and `quern.events` hold to the same.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

EDGES: list[Edge] = [
    forms.edge,
    responses.edge,
    jobs.edge,
    webhooks.edge,
    keys.edge,
    search.edge,
    audit.edge,
    analytics.edge,
]


def operations() -> list[Operation]:
    """Every documented route."""
    return [operation for edge in EDGES for operation in edge.operations]


def create_app(runtime: Runtime | None = None) -> Flask:
    """The application; with no runtime, one is made from the environment."""
    runtime = runtime or Runtime(LiveSettings())
    settings = runtime.settings
    app = Flask("quern", static_folder=None)
    app.extensions["quern"] = runtime
    # One more than is accepted: werkzeug ends a chunked body at this length as if it were whole.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    app.url_map.strict_slashes = False
    # No path is redirected: the place to go to would be made of what the client says the host is.
    app.url_map.merge_slashes = False
    # One proxy, our own nginx, stands in front.
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1)  # type: ignore[method-assign]
    for edge in EDGES:
        app.register_blueprint(edge.blueprint)
    _add_own_routes(app, runtime)
    _add_passage(app)
    add_cors(app)
    _add_errors(app, settings)
    return app


def _add_passage(app: Flask) -> None:
    @app.before_request
    def enter() -> None:
        given = request.headers.get("X-Request-ID", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else identifier.new("req")
        g.began = time.monotonic()
        g.log_token = logs.request_id.set(g.request_id)
        name = request.url_rule.rule if request.url_rule else "unmatched"
        g.span = traces.span(f"{request.method} {name}", request.headers.get("traceparent"))
        g.traceparent = g.span.__enter__()

    @app.after_request
    def leave(response: Response) -> Response:
        response.headers["X-Request-ID"] = g.request_id
        for name, value in getattr(g, "limits", {}).items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        observe(g.began, response.status_code)
        return response

    @app.teardown_request
    def gone(_: BaseException | None) -> None:
        if span := g.pop("span", None):
            span.__exit__(None, None, None)
        if token := g.pop("log_token", None):
            logs.request_id.reset(token)


def _add_errors(app: Flask, settings: Settings) -> None:
    def answer(problem: Problem) -> Response:
        return render(problem, getattr(g, "request_id", ""))

    @app.errorhandler(Problem)
    def known(problem: Problem) -> Response:
        return answer(problem)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        return answer(Problem(413, f"the body is too large; at most {settings.max_body_bytes} bytes are accepted"))

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 405 and error.response is None:
            allowed = ", ".join(getattr(error, "valid_methods", None) or [])
            return answer(Problem(405, f"this path takes {allowed or 'other methods'}", headers={"Allow": allowed}))
        if status == 404:
            return answer(Problem(404, "there is no such path; see /api/docs"))
        return answer(Problem(status, error.name))

    @app.errorhandler(PyMongoError)
    def database(error: PyMongoError) -> Response:
        if is_away(error):
            unsafe = request.method not in ("GET", "HEAD", "OPTIONS")
            return answer(away("the database", changed=unsafe and getattr(g, "began_work", False)))
        _log.exception("a database operation failed")
        return answer(Problem(500, "an unexpected error; the log has it under this request id"))

    @app.errorhandler(RedisError)
    def redis(_: RedisError) -> Response:
        return answer(away("Redis"))

    @app.errorhandler(Exception)
    def unexpected(_: Exception) -> Response:
        _log.exception("a request failed")
        return answer(Problem(500, "an unexpected error; the log has it under this request id"))


def _add_own_routes(app: Flask, runtime: Runtime) -> None:
    description = orjson.dumps(describe(operations(), __version__))

    @app.get("/api/openapi.json")
    def openapi() -> Response:
        return Response(description, mimetype="application/json", headers={"Cache-Control": "public, max-age=300"})

    page = get_swaggerui_blueprint("/api/docs", "/api/openapi.json", config={"app_name": "Quern", "validatorUrl": None})
    app.register_blueprint(page, url_prefix="/api/docs")

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"status": "ok", "version": __version__}

    @app.get("/readyz")
    def readyz() -> Response:
        problems = runtime.unready()
        body = orjson.dumps({"status": "unready" if problems else "ready", "problems": problems})
        return Response(body, 503 if problems else 200, mimetype="application/json")

    @app.get("/metrics")
    def show_metrics() -> Response:
        # nginx does not pass this path on: it is for the scraper on the host.
        if request.headers.get("X-Forwarded-For"):
            raise Problem(404, "there is no such path; see /api/docs")
        return Response(generate_latest(metrics.registry()), content_type=CONTENT_TYPE_LATEST)
