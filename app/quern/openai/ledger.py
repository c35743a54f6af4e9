"""What was asked and what came of it: the collection `ai_requests`, one document for each request.

Bodies and answers are kept as JSON text: a JSON Schema may have member names that a database does not like. What is not
stored on purpose is forgotten `keep_minutes` after its end.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import orjson
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.jobs import queue
from quern.jobs.model import PRIORITIES, NewJob, Queue, State
from quern.jobs.queue import Opened
from quern.openai.error import ApiError
from quern.openai.outcome import Failure, Outcome
from quern.openai.settings import OpenAISettings
from quern.store import clock, identifier
from quern.store.connection import Db, Document

Kind = Literal["chat", "completion", "embedding", "response"]

#: Kind of a request to what its public identifier begins with.
PUBLIC: Final = {"chat": "chatcmpl-", "completion": "cmpl-", "embedding": "embd-", "response": "resp_"}
ENDED: Final = frozenset({"completed", "failed", "cancelled", "incomplete"})
#: How often a request with an idempotency key may be started again after its client went away.
_STARTS: Final = 20

INDEXES = {
    "ai_requests": [
        IndexModel([("forget", ASCENDING)], sparse=True, expireAfterSeconds=0, name="forget"),
        IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant"),
        IndexModel([("batch", ASCENDING), ("line", ASCENDING)], sparse=True, name="by_batch"),
    ]
}


@dataclass(frozen=True)
class Asked:
    """A request as it is kept. `id` begins with `air_`; clients see `public_id`."""

    id: str
    tenant: str
    key: str
    kind: Kind
    created: datetime
    body: dict[str, Any]
    seed: int
    state: str = "queued"
    stream: bool = False
    background: bool = False
    stored: bool = False
    previous: str | None = None
    batch: str | None = None
    line: int | None = None
    custom_id: str | None = None
    fingerprint: str | None = None
    answer: bytes | None = None
    vectors: bytes | None = None
    failure: dict[str, Any] | None = None
    ended: datetime | None = None

    @property
    def public_id(self) -> str:
        return PUBLIC[self.kind] + self.core

    @property
    def core(self) -> str:
        """The part of its identifier that all that belongs to it is named by."""
        return self.id.removeprefix("air_")

    @property
    def job_id(self) -> str:
        return NewJob.derived_id(self.tenant, self.id, "answer")

    @property
    def outcome(self) -> Outcome | None:
        """What the model answered; None before that, and for embeddings."""
        return Outcome.model_validate_json(self.answer) if self.answer is not None else None

    @property
    def error(self) -> Failure | None:
        return Failure.model_validate(self.failure) if self.failure else None

    @property
    def waits(self) -> bool:
        """Whether a client holds a connection for it."""
        return not self.background and self.batch is None

    def document(self) -> Document:
        names = ("tenant", "key", "kind", "created", "seed", "state")
        document: Document = {"_id": self.id, **{name: getattr(self, name) for name in names}}
        document["body"] = orjson.dumps(self.body)
        optional = ("stream", "background", "stored", "previous", "batch", "line", "custom_id", "fingerprint")
        document.update({name: value for name in optional if (value := getattr(self, name)) not in (None, False)})
        return document

    def job(
        self, *, request_id: str | None = None, traceparent: str | None = None, deadline: datetime | None = None
    ) -> NewJob:
        """Its job: `high` when somebody waits, else `batched`, where lines of a batch come after all others."""
        priority = PRIORITIES["bulk"] if self.batch else PRIORITIES["normal"]
        return NewJob(
            id=self.job_id,
            tenant=self.tenant,
            queue=Queue.HIGH if self.waits else Queue.BATCHED,
            kind=f"openai_{self.kind}",
            subject=self.id,
            priority=priority,
            deadline=deadline,
            request_id=request_id,
            traceparent=traceparent,
        )


def _asked(document: Document) -> Asked:
    names = Asked.__dataclass_fields__.keys() - {"id", "body"}
    given = {name: document[name] for name in names if name in document}
    return Asked(id=document["_id"], body=orjson.loads(document["body"]), **given)


def new_id(tenant: str, key: str, route: str, idempotency_key: str | None, start: int = 0) -> str:
    """A fresh identifier, or the one that this key of this client's always has for this route."""
    if idempotency_key is None:
        return identifier.new("air")
    return identifier.derived("air", tenant, key, route, idempotency_key, str(start))


def fingerprint(body: dict[str, Any]) -> str:
    """Tells whether two requests under one idempotency key are the same."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def fresh_seed() -> int:
    """Of a request that names none: kept with it, so that a repetition after a crash goes the same way."""
    return secrets.randbits(48)


def find_repeated(
    db: Db, tenant: str, key: str, route: str, idempotency_key: str, print_: str
) -> tuple[str, Asked | None]:
    """The identifier to use for a request under an idempotency key, and the request that has it, if any.

    A request that was cancelled (its client had gone away) is started again under the next identifier.

    Raises:
        ApiError: 409, the key came with another request.
    """
    identity = ""
    for start in range(_STARTS):
        identity = new_id(tenant, key, route, idempotency_key, start)
        document = db.ai_requests.find_one({"_id": identity, "tenant": tenant})
        if document is None:
            return identity, None
        found = _asked(document)
        if found.fingerprint != print_:
            raise ApiError(
                409, "This Idempotency-Key was used with another request; use a new key.", code="idempotency_key_reused"
            )
        if found.state != "cancelled":
            return identity, found
    raise ApiError(409, "This Idempotency-Key was used too often; use a new key.", code="idempotency_key_reused")


def insert(db: Db, asked: Asked, job: NewJob, session: ClientSession) -> Opened:
    """Make a request and its job durable; returns what is to be opened after the commit."""
    db.ai_requests.insert_one(asked.document(), session=session)
    return queue.insert(db, [job], session=session)


def get(db: Db, tenant: str, identity: str, session: ClientSession | None = None) -> Asked | None:
    document = db.ai_requests.find_one({"_id": identity, "tenant": tenant}, session=session)
    return _asked(document) if document else None


def get_response(db: Db, tenant: str, public_id: str, session: ClientSession | None = None) -> Asked | None:
    """A stored response by the identifier that its client knows."""
    core = public_id.removeprefix("resp_")
    if not identifier.is_valid(f"air_{core}", "air") or not public_id.startswith("resp_"):
        return None
    document = db.ai_requests.find_one(
        {"_id": f"air_{core}", "tenant": tenant, "kind": "response", "stored": True}, session=session
    )
    return _asked(document) if document else None


def begin(db: Db, asked: Asked) -> None:
    """Note that it runs."""
    db.ai_requests.update_one({"_id": asked.id, "state": "queued"}, {"$set": {"state": "in_progress"}})


def end(
    db: Db,
    identity: str,
    state: str,
    settings: OpenAISettings,
    session: ClientSession,
    *,
    answer: bytes | None = None,
    vectors: bytes | None = None,
    failure: Failure | None = None,
) -> Asked | None:
    """Write how it ended. None: it is gone, or is a line of a batch that has ended before (and was counted)."""
    now = clock.now()
    change: Document = {"state": state, "ended": now}
    if answer is not None:
        change["answer"] = answer
    if vectors is not None:
        change["vectors"] = vectors
    if failure is not None:
        change["failure"] = failure.model_dump()
    document = db.ai_requests.find_one({"_id": identity}, {"stored": 1, "batch": 1, "state": 1}, session=session)
    if document is None or (document.get("batch") and document["state"] in ENDED):
        return None
    if document.get("stored") or document.get("batch"):
        change["forget"] = now + timedelta(days=settings.keep_stored_days)
    else:
        change["forget"] = now + timedelta(minutes=settings.keep_minutes)
    written = db.ai_requests.find_one_and_update(
        {"_id": identity}, {"$set": change}, session=session, return_document=True
    )
    return _asked(written) if written else None


def delete(db: Db, asked: Asked, session: ClientSession) -> None:
    """Forget a request and its answer; its job keeps no word of either."""
    db.ai_requests.delete_one({"_id": asked.id, "tenant": asked.tenant}, session=session)


def of_batch(db: Db, batch: str) -> Any:
    """The requests of a batch in the order of their lines, one at a time."""
    for document in db.ai_requests.find({"batch": batch}, batch_size=100).sort("line", 1):
        yield _asked(document)


def queued(db: Db, name: Queue, tenant: str | None, most: int) -> int:
    """Jobs that wait in a queue, of a tenant or of all, without those in bulk; counts no further than `most`."""
    query: Document = {"queue": name.value, "state": State.QUEUED.value, "priority": PRIORITIES["normal"]}
    if tenant is not None:
        query["tenant"] = tenant
    return int(db.jobs.count_documents(query, limit=most, hint="claim"))
