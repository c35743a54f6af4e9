"""`GET /api/v1/jobs/{id}/events`: a job's events, from the one after `Last-Event-ID` to its end."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Final

from pymongo.errors import PyMongoError
from quart import Blueprint, Response, request

from quern.events import metrics, sse
from quern.events.authentication import Principal
from quern.events.edge import Edge
from quern.events.exchange import held
from quern.events.hub import JobLog, Subscription
from quern.events.problem import ProblemError, unavailable
from quern.store import identifier

SCOPE: Final = "jobs:read"
_FIRST_READ_SECONDS: Final = 5.0
_RETRY_MILLISECONDS: Final = 2000
_LARGEST_NUMBER: Final = 2**53 - 1


def blueprint(edge: Edge) -> Blueprint:
    """The route over `edge`."""
    routes = Blueprint("jobs", __name__)

    @routes.get("/api/v1/jobs/<job>/events")
    async def events(job: str) -> Response:
        after = _last_event_id()
        principal = await edge.admit(SCOPE)
        subscription = held(request.scope).enter_context(edge.hub.subscribe(job))
        log = await _first_read(edge, subscription) if identifier.is_valid(job, "job") else None
        if log is None or log.tenant != principal.tenant:
            raise ProblemError(404, "No such job.")
        if log.ended and after >= log.last:
            # To an EventSource, any other answer means: connect again.
            return Response(status=204)
        authorization = request.headers["Authorization"]
        body = b"" if request.method == "HEAD" else _stream(edge, principal, authorization, subscription, after)
        response = Response(
            body, content_type=sse.CONTENT_TYPE, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        response.timeout = None
        return response

    return routes


def _last_event_id() -> int:
    # A browser repeats the URL it began with when it connects again, so the header is the newer one.
    given = request.headers.get("Last-Event-ID") or request.args.get("last_event_id") or "0"
    if not (given.isascii() and given.isdigit() and len(given) <= 16 and int(given) <= _LARGEST_NUMBER):
        raise ProblemError(400, "Expected the number of an event in `Last-Event-ID` (or `last_event_id`).")
    return int(given)


async def _first_read(edge: Edge, subscription: Subscription) -> JobLog | None:
    try:
        async with asyncio.timeout(0 if edge.hub.away else _FIRST_READ_SECONDS):
            await subscription.changed()
    except TimeoutError:
        raise unavailable("The database is away.") from None
    return subscription.log


async def _stream(
    edge: Edge, principal: Principal, authorization: str, subscription: Subscription, after: int
) -> AsyncIterator[bytes]:
    checked = time.monotonic()
    yield sse.retry(_RETRY_MILLISECONDS)
    while (log := subscription.log) is not None:
        if fresh := log.after(after):
            after = log.last
            yield b"".join(fresh)
            metrics.SENT.inc(len(fresh))
        if log.ended:
            return
        if edge.hub.draining:
            # Spread, so that the next process does not meet all of them in the same instant.
            yield sse.retry(random.randint(500, 5000))  # noqa: S311
            return
        try:
            # Spread as well: clients that came together are not all spoken to together.
            async with asyncio.timeout(edge.settings.heartbeat * random.uniform(0.7, 1.0)):  # noqa: S311
                await subscription.changed()
        except TimeoutError:
            yield sse.comment("waiting")
        if time.monotonic() - checked > edge.settings.reauthenticate:
            checked = time.monotonic()
            if not await _still_allowed(edge, principal, authorization):
                return


async def _still_allowed(edge: Edge, principal: Principal, authorization: str) -> bool:
    try:
        now = await edge.authenticate(authorization)
    except PyMongoError:
        # Nothing new can be read while the database is away, so nothing is given away by waiting for it.
        return True
    return now is not None and now.tenant == principal.tenant and SCOPE in now.scopes
