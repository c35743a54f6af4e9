"""What a job is: one document in `jobs`, the only truth about the work."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from pymongo import ASCENDING, DESCENDING, IndexModel

from quern.store import identifier
from quern.store.connection import Document


class Queue(StrEnum):
    """Where a job waits. `batched` feeds the AI engine; the others are named for their urgency or their work."""

    HIGH = "high"
    DEFAULT = "default"
    WEBHOOKS = "webhooks"
    LOW = "low"
    BATCHED = "batched"


class State(StrEnum):
    """Where a job stands."""

    BLOCKED = "blocked"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


ENDED: Final = frozenset({State.DONE, State.DEAD, State.CANCELLED, State.SKIPPED})

#: Jobs of one queue that one worker process runs at once.
CONCURRENCY: Final = {Queue.HIGH: 8, Queue.DEFAULT: 4, Queue.WEBHOOKS: 16, Queue.LOW: 2, Queue.BATCHED: 8}

PRIORITIES: Final = {"urgent": 0, "normal": 5, "bulk": 9}

_STATE = {state: {"state": state.value} for state in State}

#: Jobs that work on no response. A query must ask for them in these words to be answered by their partial index.
WITHOUT_RESPONSE: Final[Document] = {
    "$or": [{"subject": {"$lt": "rsp_"}}, {"subject": {"$gte": "rsp`"}}, {"subject": None}]
}

INDEXES = {
    "jobs": [
        IndexModel(
            [
                ("queue", ASCENDING),
                ("priority", ASCENDING),
                ("tenant", ASCENDING),
                ("due", ASCENDING),
                ("_id", ASCENDING),
            ],
            partialFilterExpression=_STATE[State.QUEUED],
            name="claim",
        ),
        IndexModel([("lease_until", ASCENDING)], partialFilterExpression=_STATE[State.RUNNING], name="leases"),
        IndexModel([("wake", ASCENDING)], sparse=True, name="wake"),
        IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant"),
        IndexModel([("tenant", ASCENDING), ("state", ASCENDING), ("_id", DESCENDING)], name="by_state"),
        IndexModel(
            [("state", ASCENDING), ("ended", DESCENDING)], partialFilterExpression=_STATE[State.DEAD], name="dead"
        ),
        IndexModel([("queue", ASCENDING)], partialFilterExpression=_STATE[State.BLOCKED], name="blocked"),
        IndexModel([("subject", ASCENDING)], sparse=True, name="by_subject"),
        IndexModel(
            [("tenant", ASCENDING), ("created", ASCENDING)],
            partialFilterExpression=WITHOUT_RESPONSE,
            name="without_response",
        ),
        # An ended job keeps its deadline to be looked at; what is overdue is found among those that wait.
        IndexModel(
            [("state", ASCENDING), ("deadline", ASCENDING)],
            partialFilterExpression={"deadline": {"$exists": True}},
            name="overdue",
        ),
        IndexModel([("forget", ASCENDING)], sparse=True, expireAfterSeconds=0, name="forget"),
    ],
    "workers": [IndexModel([("until", ASCENDING)], expireAfterSeconds=3600, name="gone")],
    "turns": [IndexModel([("queue", ASCENDING), ("priority", ASCENDING), ("turn", ASCENDING)], name="next")],
}


#: The index that counts the jobs of a state.
COUNTED_BY: Final = {
    State.BLOCKED: "blocked",
    State.QUEUED: "claim",
    State.RUNNING: "leases",
    State.DEAD: "dead",
}
#: How long the document of a job that never ran is kept.
SKIPPED_KEPT: Final = timedelta(days=30)


@dataclass(frozen=True)
class NewJob:
    """A job to be made. `id` is derived from its cause, so that the same cause never makes two."""

    id: str
    tenant: str
    queue: Queue
    kind: str
    payload: dict[str, Any] = field(default_factory=dict)
    subject: str | None = None
    """The response it works on: erasing that ends the job."""
    priority: int = PRIORITIES["normal"]
    due: datetime | None = None
    deadline: datetime | None = None
    state: State = State.QUEUED
    """`blocked` until something releases it; `skipped` when it is known from the start that it will not run."""
    request_id: str | None = None
    traceparent: str | None = None

    @staticmethod
    def derived_id(tenant: str, *cause: str) -> str:
        """The identifier of the job that `cause` makes for `tenant`."""
        return identifier.derived("job", tenant, *cause)

    def document(self, now: datetime) -> Document:
        """Its first document. No `wake`: whoever inserts it opens its turn, see `turns`."""
        state = self.state
        document: Document = {
            "_id": self.id,
            "tenant": self.tenant,
            "queue": self.queue.value,
            "kind": self.kind,
            "payload": self.payload,
            "priority": self.priority,
            "state": state.value,
            "due": self.due or now,
            "created": now,
            "attempt": 0,
            "failures": 0,
            "lost": 0,
            "log": [{"seq": 1, "type": state.value, "at": now, "data": {}}],
        }
        if state in ENDED:
            document["ended"] = now
            document["forget"] = now + SKIPPED_KEPT
        optional = {
            "subject": self.subject,
            "deadline": self.deadline,
            "request_id": self.request_id,
            "traceparent": self.traceparent,
        }
        document.update({name: value for name, value in optional.items() if value is not None})
        return document


@dataclass(frozen=True)
class Job:
    """A claimed job, as its handler sees it."""

    id: str
    tenant: str
    queue: Queue
    kind: str
    payload: dict[str, Any]
    subject: str | None
    priority: int
    attempt: int
    failures: int
    due: datetime
    created: datetime
    deadline: datetime | None
    lease_id: str
    request_id: str | None
    traceparent: str | None

    @classmethod
    def from_document(cls, document: Document) -> "Job":
        return cls(
            id=document["_id"],
            tenant=document["tenant"],
            queue=Queue(document["queue"]),
            kind=document["kind"],
            payload=document["payload"],
            subject=document.get("subject"),
            priority=document["priority"],
            attempt=document["attempt"],
            failures=document["failures"],
            due=document["due"],
            created=document["created"],
            deadline=document.get("deadline"),
            lease_id=document.get("lease_id", ""),
            request_id=document.get("request_id"),
            traceparent=document.get("traceparent"),
        )
