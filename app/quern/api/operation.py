"""Operations: one declaration makes a route, guards it and documents it.

The order at the edge: who asks (401), may they (403), too often (429), is the request sound (4xx), then the handler;
an unsafe one in a transaction, with its audit entry and its idempotency record.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import pymongo
import pymongo.errors
from flask import Blueprint, Response, current_app, g, request
from pydantic import BaseModel, ConfigDict, ValidationError
from pymongo.client_session import ClientSession
from redis.exceptions import RedisError
from werkzeug.datastructures import Headers

from quern.api import idempotency
from quern.api.body import read_json
from quern.api.problem import Fault, Problem, away, invalid, not_found
from quern.audit.entry import entry, record
from quern.jobs import turns
from quern.jobs.queue import Opened
from quern.observe import metrics
from quern.runtime import Runtime
from quern.store import identifier
from quern.store.connection import Db
from quern.tenants import keys
from quern.tenants.keys import Principal
from quern.tenants.limit import LimiterAwayError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_log = logging.getLogger(__name__)

#: Seconds that a request may spend on the database, unless its operation says otherwise.
DATABASE_SECONDS: Final = 5.0

#: Path parameter to the prefix of the identifiers that it takes.
PREFIX_OF: Final = {"form": "frm", "response": "rsp", "job": "job", "key": "key", "endpoint": "whe", "delivery": "whd"}


class NoQuery(BaseModel):
    """Of operations that take no query parameters."""

    model_config = ConfigDict(extra="forbid")


@dataclass
class Reply:
    """What a handler answers."""

    body: BaseModel | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stream: Iterable[bytes] | None = None
    media_type: str = "application/json"


@dataclass
class Call:
    """What a handler gets."""

    runtime: Runtime
    principal: Principal
    request_id: str
    body: Any = None
    query: Any = None
    session: ClientSession | None = None
    idempotency_key: str | None = None
    after_commit: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # One client for the whole request: the next one may have other credentials, and sessions belong to a client.
        self.db: Db = self.runtime.store.db

    @property
    def tenant(self) -> str:
        return self.principal.tenant

    @property
    def transaction(self) -> ClientSession:
        """The transaction in which an unsafe request runs. RuntimeError: this operation has none."""
        if self.session is None:
            raise RuntimeError("expected an operation that runs in a transaction, found one that does not")
        return self.session

    def audit(self, action: str, subject: str, detail: dict[str, Any] | None = None) -> None:
        """Record a change, in its transaction."""
        document = entry(self.tenant, self.principal.key, action, subject, detail=detail, request_id=self.request_id)
        record(self.db, document, self.session)

    def open_after_commit(self, opened: Opened) -> None:
        """Open the turns of work that becomes ready with this request's transaction, and wake its queues."""

        def act() -> None:
            turns.open_many(self.db, opened)
            for name in {item[0] for item in opened}:
                self.runtime.nudge(name)

        self.after_commit.append(act)


@dataclass(frozen=True)
class Operation:
    """A documented route."""

    method: str
    path: str
    summary: str
    scope: str
    tag: str
    body: type[BaseModel] | None
    query: type[BaseModel] | None
    answers: dict[int, type[BaseModel] | str | None]
    """Status to model, to a media type for what is streamed, or to None for no body."""
    unsafe: bool
    description: str
    served_by: Literal["api", "events"] = "api"
    seconds: float = DATABASE_SECONDS
    """That a request may spend on the database before it answers 503."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of the good answers: name to what it says."""


class Edge:
    """The operations of one resource, and their blueprint."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.operations: list[Operation] = []
        self.blueprint = Blueprint(tag, __name__, url_prefix="/api/v1")

    def operation(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        summary: str,
        answers: dict[int, type[BaseModel] | str | None],
        body: type[BaseModel] | None = None,
        query: type[BaseModel] | None = None,
        transaction: bool = True,
        safe: bool = False,
        seconds: float = DATABASE_SECONDS,
        headers: dict[str, str] | None = None,
    ) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
        """Declare a route.

        Args:
            transaction: False for an unsafe handler that sees to its own durability and idempotency.
            safe: a question too long for a URL; nothing changes, whatever its method.
        """
        unsafe = method in ("POST", "PUT", "PATCH", "DELETE") and not safe

        def declare(handler: Callable[..., Reply]) -> Callable[..., Reply]:
            made = Operation(
                method,
                path,
                summary,
                scope,
                self.tag,
                body,
                query,
                answers,
                unsafe,
                (handler.__doc__ or "").strip(),
                seconds=seconds,
                headers=headers or {},
            )
            self.operations.append(made)
            rule = path.replace("{", "<string:").replace("}", ">")

            def view(**arguments: str) -> Response:
                return _serve(made, handler, unsafe and transaction, arguments)

            self.blueprint.add_url_rule(
                rule, f"{handler.__name__}", view, methods=[method], provide_automatic_options=False
            )
            return handler

        return declare

    def document(self, operation: Operation) -> None:
        """Document a route that another process serves."""
        self.operations.append(operation)


def _serve(
    operation: Operation, handler: Callable[..., Reply], transaction: bool, arguments: dict[str, str]
) -> Response:
    runtime: Runtime = current_app.extensions["quern"]
    g.route = f"{operation.method} {operation.path}"
    with pymongo.timeout(operation.seconds):
        call = Call(runtime, _authenticate(runtime, operation), g.request_id)
        g.limits = _limit(runtime, call.principal)
        for name, value in arguments.items():
            if not identifier.is_valid(value, PREFIX_OF[name]):
                raise not_found(name)
        raw = b""
        call.query = _query(operation.query or NoQuery)
        if operation.body is not None:
            value, raw = read_json(request, runtime.settings.max_body_bytes, runtime.settings.api_receive_seconds)
            call.body = _validated(operation.body, value)
        if operation.unsafe:
            call.idempotency_key = idempotency.check_key(request.headers.get(idempotency.HEADER))
        g.began_work = True
        if not transaction:
            return _respond(handler(call, **arguments))
        return _transact(operation, handler, call, arguments, raw)


def _authenticate(runtime: Runtime, operation: Operation) -> Principal:
    principal = runtime.authenticate(runtime.store.db, request.headers.get("Authorization"))
    if principal is None:
        raise Problem(
            401,
            "expected `Authorization: Bearer <API key>` with a key that is valid",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if operation.scope not in principal.scopes:
        raise Problem(403, f"this key does not have the scope {operation.scope}", kind="scope-missing")
    return principal


def _limit(runtime: Runtime, principal: Principal) -> dict[str, str]:
    if not principal.limits:
        return {}
    try:
        allowance = runtime.limiter.take(principal.limits)
    except LimiterAwayError:
        raise away("the rate limiter (Redis)") from None
    if not allowance.allowed:
        metrics.LIMITED.inc()
        raise Problem(
            429,
            f"{_said(principal)}; try again in {allowance.retry_after} s",
            kind="rate-limited",
            headers=allowance.headers(),
        )
    return allowance.headers()


def _said(principal: Principal) -> str:
    whose = {"key": "this key", "tenant": "all keys of this tenant together"}
    return " and ".join(
        f"{whose[limit.name]} may make {limit.requests_per_minute} requests a minute" for limit in principal.limits
    )


def _query(model: type[BaseModel]) -> BaseModel:
    values: dict[str, Any] = {}
    for name, found in request.args.lists():
        if len(found) > 1:
            detail = f"came {len(found)} times; expected once"
            fault = Fault(pointer=f"?{name[:100]}", detail=detail)
            raise Problem(422, f"a query parameter {detail}", kind="validation", errors=[fault])
        values[name] = found[0]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = invalid(error, values)
        for fault in problem.errors:
            fault.pointer = "?" + fault.pointer.removeprefix("/")
        raise problem from None


def _validated(model: type[BaseModel], value: Any) -> BaseModel:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error, value) from None


def _transact(
    operation: Operation, handler: Callable[..., Reply], call: Call, arguments: dict[str, str], raw: bytes
) -> Response:
    kept: idempotency.Record | None = None
    if call.idempotency_key is not None:
        route = f"{operation.method} {request.path}"
        begun = idempotency.begin(
            call.db,
            call.tenant,
            route,
            call.idempotency_key,
            keys.token(request.headers.get("Authorization")),
            raw + b"\0" + request.query_string,
        )
        if isinstance(begun, idempotency.Kept):
            answer = _answer(begun.body, begun.status, begun.headers)
            answer.headers["Idempotent-Replayed"] = "true"
            return answer
        kept = begun

    def work(session: ClientSession) -> Response:
        call.session = session
        call.after_commit.clear()
        response = _respond(handler(call, **arguments))
        if kept is not None:
            shown = {name: value for name, value in response.headers.items() if name in ("Location", "ETag")}
            idempotency.finish(
                call.db, kept, idempotency.Kept(response.status_code, response.get_data(), shown), session
            )
        return response

    try:
        with call.db.client.start_session() as session:
            response = session.with_transaction(work)
    except Exception:
        if kept is not None:
            _abandon(call.db, kept)
        raise
    for act in call.after_commit:
        try:
            act()
        except (pymongo.errors.PyMongoError, RedisError):
            # What was asked for is done and durable; the reconciler makes up for what could not follow.
            _log.warning("could not follow a commit up", exc_info=True)
    return response


def _abandon(db: Db, kept: idempotency.Record) -> None:
    try:
        idempotency.abandon(db, kept)
    except pymongo.errors.PyMongoError:
        # Its lease runs out by itself; the failure that brought us here is the one to report.
        return


class _Plain(Response):
    """An answer whose headers are complete: what werkzeug would still make of a `Location` is in it already."""

    def get_wsgi_headers(self, environ: "WSGIEnvironment") -> Headers:
        return self.headers if "Content-Length" in self.headers else super().get_wsgi_headers(environ)


def _respond(reply: Reply) -> Response:
    if reply.stream is not None:
        return Response(reply.stream, reply.status, reply.headers, mimetype=reply.media_type)
    return _answer(b"" if reply.body is None else dump(reply.body), reply.status, reply.headers)


def _answer(body: bytes, status: int, headers: dict[str, str]) -> Response:
    response = _Plain(body, status, headers, mimetype="application/json")
    if body:
        response.headers["Content-Length"] = str(len(body))
    else:
        del response.headers["Content-Type"]
    return response


def dump(model: BaseModel) -> bytes:
    """A model as JSON: times in RFC 3339 with `Z`, unset optional members left out."""
    return model.model_dump_json(by_alias=True).encode()


def observe(began: float, status: int) -> None:
    """Count one answered request."""
    route = getattr(g, "route", "unmatched")
    metrics.REQUESTS.labels(route, request.method if route != "unmatched" else "-", status).inc()
    metrics.REQUEST_SECONDS.labels(route, request.method if route != "unmatched" else "-").observe(
        time.monotonic() - began
    )
