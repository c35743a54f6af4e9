"""The analytics service: questions over HTTP on a UNIX socket, for the API's processes. It never touches MongoDB.

Who may connect is the socket's rights; whose rows are meant is said by the API, which authenticated the client.
"""

import atexit
import gc
import logging
import os
import threading
from pathlib import Path
from typing import Any, Final, Literal

import orjson
from flask import Flask, Response, request
from gunicorn.app.base import BaseApplication
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict
from redis import Redis

from quern.analytics import render, sandbox
from quern.analytics.answer import TooManyRowsError, Warehouse, freshness
from quern.analytics.beforehand import answer_in_a_process
from quern.analytics.desk import Desk, GoneError
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.engine import Engine, EngineError, TimedOutError
from quern.analytics.kept import Kept
from quern.analytics.manifest import NoWarehouseError
from quern.analytics.places import BusyError, Places
from quern.analytics.plan import AskError
from quern.analytics.question import FRESHNESS_HEADER, Freshness, Question
from quern.analytics.settings import AnalyticsSettings
from quern.observe import logs, metrics
from quern.store import redis_connection
from quern.store.clock import rfc3339
from quern.store.cursor import BadCursorError

_log = logging.getLogger(__name__)
_MOST_BODY: Final = 1 << 20


class ProcessSettings(BaseSettings):
    """The part of the configuration that this process needs: no secret of MongoDB or of the API among it."""

    model_config = SettingsConfigDict(env_prefix="QUERN_", env_nested_delimiter="__", extra="ignore", frozen=True)

    analytics: AnalyticsSettings = AnalyticsSettings()
    redis_cache_url: SecretStr | None = Field(None, description="Redis `cache`; without it answers are not kept there")
    clickhouse_password: SecretStr | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_bind: str | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        secrets = (SecretsSettingsSource(settings_cls, secrets_dir=directory),) if directory else ()
        return (init_settings, env_settings, *secrets)


class NotConfiguredError(Exception):
    """A setting is missing; the text names it."""


class Asked(BaseModel):
    """What the API hands on of a tenant."""

    model_config = ConfigDict(extra="forbid")

    tenant: str
    question: Question
    limit: int = Field(100, ge=1, le=1000)
    cursor: str | None = None
    format: Literal["csv", "parquet", "arrow", "svg", "png"] = "csv"


class AskedSql(BaseModel):
    """A statement of a tenant."""

    model_config = ConfigDict(extra="forbid")

    tenant: str
    sql: str = Field(max_length=100_000)
    rows: int = Field(1000, ge=1, le=10_000)


def warehouse_of(settings: ProcessSettings) -> Path:
    """The folder of the warehouse. Raises NotConfiguredError for what an engine over it lacks."""
    chosen, root = settings.analytics.service, settings.analytics.warehouse
    if root is None:
        raise NotConfiguredError("QUERN_ANALYTICS__WAREHOUSE is not set: expected the folder of the warehouse")
    if chosen.engine == "clickhouse" and chosen.clickhouse_url is None:
        raise NotConfiguredError("QUERN_ANALYTICS__SERVICE__CLICKHOUSE_URL is not set")
    return root


def make_engine(settings: ProcessSettings) -> Engine:
    """The engine that the settings name. Raises NotConfiguredError."""
    chosen, root = settings.analytics.service, warehouse_of(settings)
    if chosen.clickhouse_url is not None and chosen.engine == "clickhouse":
        from quern.analytics.clickhouse_engine import ClickHouseEngine, Server

        password = settings.clickhouse_password
        secret = password.get_secret_value() if password else ""
        server = Server(chosen.clickhouse_url, chosen.clickhouse_user, secret, chosen.memory_megabytes)
        return ClickHouseEngine(server, root, chosen.clickhouse_root)
    threads = chosen.threads or len(os.sched_getaffinity(0))
    return DuckDbEngine(root, threads=threads, memory_megabytes=chosen.memory_megabytes)


def make_desk(settings: ProcessSettings) -> Desk:
    """What answers. Raises NotConfiguredError."""
    engine, root = make_engine(settings), warehouse_of(settings)
    service = settings.analytics.service
    cache: Redis | None = None
    if (url := settings.redis_cache_url) is not None:
        cache = redis_connection.connect(url.get_secret_value, timeout=0.5)
    return Desk(Warehouse(root, engine, seconds=service.seconds), Kept(cache, service.keep_seconds))


def create_app(desk: Desk, settings: ProcessSettings) -> Flask:
    """The service's routes."""
    app = Flask("quern-analytics", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _MOST_BODY
    service = settings.analytics.service
    statements = Places(service.sql_at_once, 1, "statements")
    # However dear the questions of one tenant are, those of another find a thread.
    threads = service.at_once + service.sql_at_once
    questions = Places(threads, max(1, service.at_once - 1), "questions")

    @app.post("/page")
    def page() -> Response:
        asked = Asked.model_validate_json(request.get_data())
        with questions.take(asked.tenant):
            made = desk.page(asked.question, asked.tenant, asked.limit, asked.cursor)
        return _stamped(Response(made.model_dump_json(), mimetype="application/json"), made.freshness)

    @app.post("/file")
    def file() -> Response:
        asked = Asked.model_validate_json(request.get_data())
        with questions.take(asked.tenant):
            answer = desk.ask(asked.question, asked.tenant).answer
        if asked.format == "svg" or asked.format == "png":
            from quern.analytics.chart import chart

            made = chart(asked.question, answer.table, asked.format, until=answer.freshness.complete_until)
        else:
            made = render.render(answer, asked.format)
        return _stamped(Response(made, mimetype=render.MEDIA_TYPES[asked.format]), answer.freshness)

    @app.post("/sql")
    def sql() -> Response:
        asked = AskedSql.model_validate_json(request.get_data())
        limits = sandbox.Limits(
            service.sql_seconds, service.sql_memory_megabytes, asked.rows, start_seconds=service.sql_start_seconds
        )
        with statements.take(asked.tenant):
            manifest = desk.warehouse.current()
            found = sandbox.run(asked.sql, manifest, [asked.tenant], limits)
        fresh = freshness(manifest)
        return _stamped(_json({**vars(found), "freshness": fresh.model_dump(mode="json")}), fresh)

    @app.get("/healthz")
    def health() -> Response:
        return _json({"status": "ok"})

    _add_errors(app)
    return app


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), mimetype="application/json")


def _stamped(response: Response, fresh: Freshness) -> Response:
    if fresh.complete_until is not None:
        response.headers[FRESHNESS_HEADER] = rfc3339(fresh.complete_until)
    return response


#: What went wrong to status and kind; the client turns it back into an exception.
_FAULTS: Final[list[tuple[type[Exception], int, str]]] = [
    (AskError, 422, "ask"),
    (TooManyRowsError, 422, "ask"),
    (BadCursorError, 422, "cursor"),
    (ValidationError, 422, "ask"),
    (sandbox.SqlError, 422, "sql"),
    (GoneError, 409, "gone"),
    (TimedOutError, 504, "slow"),
    (NoWarehouseError, 503, "empty"),
    (sandbox.SandboxError, 503, "sandbox"),
    (EngineError, 500, "engine"),
]


def _add_errors(app: Flask) -> None:
    def handler(status: int, kind: str) -> Any:
        def answer(error: Exception) -> tuple[Response, int]:
            if status >= 500:
                _log.warning("a question was not answered: %s", error)
            return _json({"kind": kind, "text": str(error)[:4000]}), status

        return answer

    @app.errorhandler(BusyError)
    def busy(error: BusyError) -> tuple[Response, int]:
        return _json({"kind": "turn" if error.own else "busy", "text": str(error)}), 429 if error.own else 503

    for known, status, kind in _FAULTS:
        app.register_error_handler(known, handler(status, kind))


class AnalyticsServer(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """One process of threads: what is held in memory is held once."""

    def __init__(self, settings: ProcessSettings) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        service = self._settings.analytics.service
        options: dict[str, Any] = {
            "bind": f"unix:{service.socket}",
            "workers": 1,
            "worker_class": "gthread",
            # Statements have places of their own: whatever they do, `at_once` questions go on beside them.
            "threads": service.at_once + service.sql_at_once,
            "timeout": 60,
            "graceful_timeout": 20,
            "keepalive": 60,
            "proc_name": "quern-analytics",
            "accesslog": None,
            "errorlog": "-",
            "loglevel": "warning",
            "control_socket_disable": True,
            # What the worker then never looks at stays shared with it.
            "when_ready": lambda _: gc.freeze(),
            # The group may connect: the API's processes are in it.
            "umask": 0o117,
        }
        for name, value in options.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Any:
        logs.configure("analytics", self._settings.log_level)
        metrics.serve(self._settings.metrics_bind)
        desk = make_desk(self._settings)
        stop = threading.Event()
        atexit.register(desk.warehouse.engine.close)
        atexit.register(stop.set)
        # Without Redis an answer is kept only where it was made.
        answer = answer_in_a_process if self._settings.redis_cache_url is not None else None
        threading.Thread(target=desk.follow, args=(stop, answer), name="beforehand", daemon=True).start()
        return create_app(desk, self._settings)


def serve(settings: ProcessSettings) -> None:
    """Run the service until it is told to stop. Raises NotConfiguredError."""
    if settings.analytics.service.socket is None:
        raise NotConfiguredError("QUERN_ANALYTICS__SERVICE__SOCKET is not set: expected the path of a UNIX socket")
    # The engine itself is the worker's: this process only watches it.
    warehouse_of(settings)
    AnalyticsServer(settings).run()
