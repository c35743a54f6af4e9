"""A request becomes durable: with its job, in one transaction, and only if there is room for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pymongo.client_session import ClientSession
from pymongo.errors import DuplicateKeyError
from quart import request

from quern.events.v1.desk import Desk
from quern.jobs.model import Queue
from quern.jobs.queue import Opened
from quern.observe.logs import request_id
from quern.openai import ledger
from quern.openai.error import ApiError
from quern.openai.ledger import Asked, Kind
from quern.openai.request import Body
from quern.store import clock
from quern.tenants.keys import Principal

_HEADER = "Idempotency-Key"


@dataclass(frozen=True)
class Wish:
    """What is to be made durable."""

    kind: Kind
    body: Body
    stream: bool = False
    background: bool = False
    stored: bool = False
    previous: str | None = None


@dataclass(frozen=True)
class Submitted:
    """A request that is durable. `headers` say where its job stands; `joined`: it was made by an earlier one."""

    asked: Asked
    headers: dict[str, str]
    joined: bool


async def submit(desk: Desk, principal: Principal, wish: Wish, prepare: Callable[[str], None]) -> Submitted:
    """Make a request durable, or find the one that the same Idempotency-Key made before.

    Args:
        prepare: called on the event loop with the request's identifier, before anybody can answer it.

    Raises:
        ApiError: 400, 409 or 429.
    """
    given = request.headers.get(_HEADER)
    if given is not None and not (0 < len(given) <= 255 and given.isascii() and given.isprintable()):
        raise ApiError(400, f"{_HEADER}: expected 1 to 255 printable ASCII characters.", code="invalid_value")
    body = wish.body.model_dump(mode="json", by_alias=True, exclude_unset=True)
    print_ = ledger.fingerprint(body)
    found: Asked | None = None
    if given is None:
        identity = ledger.new_id(principal.tenant, principal.key, wish.kind, None)
    else:
        identity, found = await desk.run(
            ledger.find_repeated, desk.db, principal.tenant, principal.key, wish.kind, given, print_
        )
    prepare(identity)
    if found is not None:
        return Submitted(_lean(found), await desk.run(desk.standing, found.job_id), joined=True)
    asked = Asked(
        id=identity,
        tenant=principal.tenant,
        key=principal.key,
        kind=wish.kind,
        created=clock.now(),
        body=body,
        seed=ledger.fresh_seed(),
        stream=wish.stream,
        background=wish.background,
        stored=wish.stored,
        previous=wish.previous,
        fingerprint=print_ if given is not None else None,
    )
    return await desk.run(_insert, desk, principal, asked, request.headers.get("traceparent"))


def _insert(desk: Desk, principal: Principal, asked: Asked, traceparent: str | None) -> Submitted:
    db = desk.db
    job = asked.job(request_id=request_id.get(), traceparent=traceparent)
    _expect_room(desk, job.queue, asked.tenant)

    def work(session: ClientSession) -> Opened:
        opened = ledger.insert(db, asked, job, session)
        if asked.stored:
            desk.audit(session, principal, "ai_response.created", asked.public_id)
        return opened

    try:
        opened = desk.transact(work)
    except DuplicateKeyError:
        # Two requests with one idempotency key at the same moment: the other one was first.
        found = ledger.get(db, asked.tenant, asked.id)
        if found is None or found.fingerprint != asked.fingerprint:
            raise ApiError(
                409, "Another request with this Idempotency-Key has just come.", code="idempotency_key_reused"
            ) from None
        return Submitted(_lean(found), desk.standing(found.job_id), joined=True)
    desk.open(opened)
    return Submitted(_lean(asked), desk.standing(job.id), joined=False)


def _expect_room(desk: Desk, queue: Queue, tenant: str) -> None:
    settings = desk.settings
    if ledger.queued(desk.db, queue, tenant, settings.max_queued_per_tenant) >= settings.max_queued_per_tenant:
        raise desk.full(queue.value, tenant)
    if ledger.queued(desk.db, queue, None, settings.max_queued) >= settings.max_queued:
        raise desk.full(queue.value, None)


def _lean(asked: Asked) -> Asked:
    """Without what was asked, which is long and of which no answer speaks: a client that waits costs little."""
    body: dict[str, Any] = {**asked.body}
    for name in ("messages", "prompt", "input"):
        if name in body:
            body[name] = "-"
    return replace(asked, body=body)
