"""What every route of `/v1` is given: who asks, how often and how much; a body once it may come in; and the way to the
stores, off the event loop."""

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import orjson
import pymongo
from pydantic import BaseModel, ValidationError
from pymongo.client_session import ClientSession
from pymongo.errors import PyMongoError
from quart import Response, g, request
from redis.exceptions import RedisError

from quern.audit.entry import entry, record
from quern.events.admission import Places
from quern.events.edge import Edge
from quern.events.exchange import held
from quern.events.problem import ProblemError
from quern.events.settings import EventSettings
from quern.events.v1.feeds import Feeds
from quern.events.v1.gate import open_gate
from quern.inference.client import EngineClient, EngineError
from quern.inference.protocol import ServedModel
from quern.jobs import estimate, queue, turns
from quern.jobs.queue import Opened
from quern.observe import metrics
from quern.observe.logs import request_id
from quern.openai import deltas
from quern.openai.error import ApiError, invalid
from quern.openai.ledger import Asked
from quern.openai.request import is_too_deep
from quern.openai.settings import OpenAISettings
from quern.runtime import Runtime
from quern.store import clock
from quern.store.connection import Db, Document
from quern.store.redis_connection import connect
from quern.tenants.keys import Principal
from quern.tenants.limit import LimiterAwayError

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

DATABASE_SECONDS: Final = 5.0
_THREADS: Final = 16
_MODELS_SECONDS: Final = 5.0
#: How long an engine that hangs is waited for.
_ENGINE_SECONDS: Final = 3.0
#: Uploads read at the same time: each may hold a file's bytes.
_UPLOADS: Final = 4


class Desk:
    """The parts that all routes of `/v1` share."""

    def __init__(self, edge: Edge, runtime: Runtime) -> None:
        self.edge, self.runtime = edge, runtime
        self.settings: OpenAISettings = runtime.settings.openai
        self.feeds = Feeds(runtime.store.redis_queue_url)
        self.uploads = asyncio.Semaphore(_UPLOADS)
        limits = EventSettings(
            max_streams=self.settings.max_waiting, max_streams_per_tenant=self.settings.max_waiting_per_tenant
        )
        self._places = Places(limits)
        self._pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="v1")
        self._engine = EngineClient(runtime.settings.engine_socket, timeout=_ENGINE_SECONDS)
        self._asking = asyncio.Lock()
        self._models: tuple[float, list[ServedModel]] = (-_MODELS_SECONDS, [])
        self._waiting: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._redis = connect(runtime.store.redis_queue_url, timeout=1.0)

    @property
    def db(self) -> Db:
        return self.runtime.store.db

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call what may block, in a thread; a database that is away is noticed after DATABASE_SECONDS."""

        def bounded() -> T:
            with pymongo.timeout(DATABASE_SECONDS):
                return call(*arguments)

        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(context.run, bounded))

    # ---- who asks

    async def admit(self, scope: str) -> Principal:
        """The caller, who may do this, and not too often. Its body may come in from now on.

        Raises:
            ApiError: 401, 403, 429 or 503.
        """
        if self.edge.hub.draining:
            raise ApiError(503, "The server is restarting.", code="restarting", headers={"Retry-After": "2"})
        header = request.headers.get("Authorization")
        principal = await self.run(lambda: self.runtime.authenticate(self.db, header))
        if principal is None:
            message = "Expected a valid API key in `Authorization: Bearer …`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope not in principal.scopes:
            raise ApiError(403, f"This key lacks the scope {scope}.", code="insufficient_permissions")
        if principal.limits:
            try:
                allowance = await self.run(self.runtime.limiter.take, principal.limits)
            except LimiterAwayError:
                raise ApiError(503, "The rate limiter is away.", code="away", headers={"Retry-After": "2"}) from None
            g.limits = allowance.headers()
            if not allowance.allowed:
                metrics.LIMITED.inc()
                message = f"Too many requests; try again in {allowance.retry_after} s."
                raise ApiError(429, message, code="rate_limit_exceeded", headers=allowance.headers())
        open_gate(request.scope)
        return principal

    # ---- what is asked

    async def json(self, model: type[Body]) -> Body:
        """The body, validated.

        Raises:
            ApiError: 400 or 413.
        """
        most = self.settings.max_body_bytes
        raw = bytearray()
        async for piece in request.body:
            raw += piece
            if len(raw) > most:
                raise ApiError(413, f"The body is too large; at most {most} bytes are accepted.", code="too_large")
        try:
            value = orjson.loads(raw)
        except ValueError:
            raise ApiError(400, "Expected a body in JSON.", code="invalid_json") from None
        if is_too_deep(value):
            raise ApiError(400, "The body is nested too deeply.", code="invalid_value")
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise invalid(error) from None

    async def models(self) -> list[ServedModel]:
        """What the engine serves, as of some seconds ago; what it served last while it is away."""
        async with self._asking:
            asked, known = self._models
            if time.monotonic() - asked > _MODELS_SECONDS:
                try:
                    known = await self.run(self._engine.models)
                except EngineError:
                    # What it served last; asked again some seconds later, by one request and not by all.
                    pass
                self._models = (time.monotonic(), known)
        if not known:
            raise ApiError(503, "The engine is away.", code="away", headers={"Retry-After": "2"})
        return known

    async def expect_model(self, name: str, kind: str) -> None:
        """Raises ApiError 404 for a model that the engine does not serve; while nobody knows, the job will tell."""
        try:
            served = await self.models()
        except ApiError:
            return
        if not any(model.name == name and model.kind == kind for model in served):
            there = ", ".join(model.name for model in served if model.kind == kind) or "none"
            message = f"The model '{name}' does not exist here as a model for this; there is: {there}."
            raise ApiError(404, message, code="model_not_found", param="model")

    # ---- how much

    async def take_place(self, tenant: str) -> None:
        """Hold a place among those who wait until the answer has ended.

        Raises:
            ApiError: 429.
        """
        try:
            held(request.scope).enter_context(self._places.take(tenant))
        except ProblemError:
            message = "As many clients wait for answers as may; try again later."
            after = await self.run(self._seconds_of_queue, "high", None)
            raise ApiError(429, message, code="too_many_waiting", headers={"Retry-After": str(after)}) from None

    def full(self, name: str, tenant: str | None) -> ApiError:
        """429 of a queue that has as much as it takes; `Retry-After` is when what waits now will have begun."""
        whose = "of this tenant " if tenant else ""
        message = f"The queue is full: too many requests {whose}wait already. Try again later, or use a batch."
        after = self._seconds_of_queue(name, tenant)
        return ApiError(429, message, code="queue_full", headers={"Retry-After": str(after)})

    def _seconds_of_queue(self, name: str, tenant: str | None) -> int:
        query: Document = {"queue": name, "state": "queued"} | ({"tenant": tenant} if tenant else {})
        newest = self.db.jobs.find_one(query, sort=[("due", -1)])
        found = estimate.estimate(self.db, newest, clock.now()).seconds if newest else None
        return 30 if found is None else min(600, max(1, int(found) + 1))

    def standing(self, job: str) -> dict[str, str]:
        """Headers that say where a job stands."""
        headers = {"X-Quern-Job": job}
        document = self.db.jobs.find_one({"_id": job})
        if document is not None:
            found = estimate.estimate(self.db, document, clock.now())
            if found.place is not None:
                headers["X-Quern-Queue-Place"] = str(found.place)
            if found.seconds is not None:
                headers["X-Quern-Expected-Seconds"] = f"{found.seconds:.1f}"
        return headers

    # ---- what changes

    def transact(self, work: Callable[[ClientSession], T]) -> T:
        """Run `work` in a transaction. Blocks."""
        with self.runtime.store.client.start_session() as session:
            return session.with_transaction(work)

    def audit(
        self, session: ClientSession, principal: Principal, action: str, subject: str, detail: Document | None = None
    ) -> None:
        """Record a change, in its transaction."""
        document = entry(principal.tenant, principal.key, action, subject, detail=detail, request_id=request_id.get())
        record(self.db, document, session)

    def open(self, opened: Opened) -> None:
        """Open the turns of work that a transaction made ready, and wake its queues. Blocks."""
        try:
            turns.open_many(self.db, opened)
        except PyMongoError:
            # What was asked for is durable; the reconciler makes up for it.
            return
        for name in {item[0] for item in opened}:
            self.runtime.nudge(name)

    def cancel(self, asked: Asked) -> bool:
        """End a request's job; False when it has ended already. Blocks."""
        try:
            # The worker looks there several times a second, and at its job every other second.
            self._redis.set(deltas.gone_key(asked.id), 1, ex=deltas.KEPT)
        except (RedisError, OSError):
            pass
        try:
            ended = queue.cancel(self.runtime.store, self.runtime.registry, asked.tenant, asked.job_id)
        except queue.NotPossibleError:
            return False
        if ended is not None:
            self.open(ended[1])
        return ended is not None

    # ---- who waits

    def attend(self, asked: Asked) -> Callable[[], None]:
        """Count a client that waits for a request, until its exchange ends; call what this returns once it is served.

        When the last of them goes without, the request's job is cancelled.
        """
        served = False
        self._waiting[asked.id] += 1

        def done() -> None:
            nonlocal served
            served = True

        def leave() -> None:
            self._waiting[asked.id] -= 1
            if self._waiting[asked.id] > 0:
                return
            del self._waiting[asked.id]
            if not served and asked.waits:
                task = asyncio.get_running_loop().create_task(self._abandon(asked))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        held(request.scope).callback(leave)
        return done

    async def _abandon(self, asked: Asked) -> None:
        try:
            await self.run(self.cancel, asked)
        except PyMongoError:
            # The job runs to its end, which is bounded; nobody waits for it.
            return


def answered(error: ApiError) -> Response:
    """The answer to a request that ended in `error`."""
    return Response(
        orjson.dumps({"error": error.document}),
        status=error.status,
        headers=error.headers,
        content_type="application/json",
    )


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(orjson.dumps(value), status=status, headers=headers, content_type="application/json")
