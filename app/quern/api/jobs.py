"""`/jobs`: status, place and time left, cancel, replay. Their event streams are served by `quern.events`."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from quern.api.operation import Call, Edge, Operation, Reply
from quern.api.page import Page, PageQuery, page
from quern.api.problem import Problem, not_found
from quern.jobs import estimate, queue
from quern.store import clock
from quern.store.connection import Document
from quern.workflows.replay import replay

edge = Edge("jobs")

Status = Literal["blocked", "queued", "running", "done", "dead", "cancelled", "skipped"]


class JobEvent(BaseModel):
    seq: int
    type: str
    at: datetime
    data: dict[str, Any]


class Job(BaseModel):
    id: str
    kind: str
    queue: str
    status: Status
    attempt: int
    response: str | None = None
    step: str | None = None
    created: datetime
    due: datetime
    started: datetime | None = None
    ended: datetime | None = None
    deadline: datetime | None = None
    error: str | None = None
    result: Any = None
    place: int | None = Field(None, description="1 is next; null when it does not wait")
    seconds_left: float | None = Field(None, description="expected time until it has ended; null when nobody can say")
    cancelling: bool = False
    events: str = Field(description="where its event stream is")
    log: list[JobEvent]


class JobQuery(PageQuery):
    status: Status | None = None


class JobPage(Page[Job]):
    """Jobs."""


def show(document: Document, estimated: estimate.Estimate | None = None) -> Job:
    return Job(
        id=document["_id"],
        kind=document["kind"],
        queue=document["queue"],
        status=document["state"],
        attempt=document["attempt"],
        response=document.get("subject"),
        step=document["payload"].get("step"),
        created=document["created"],
        due=document["due"],
        started=document.get("started"),
        ended=document.get("ended"),
        deadline=document.get("deadline"),
        error=document.get("error"),
        result=document.get("result"),
        place=estimated.place if estimated else None,
        seconds_left=round(estimated.seconds, 3) if estimated and estimated.seconds is not None else None,
        cancelling=bool(document.get("cancel")),
        events=f"/api/v1/jobs/{document['_id']}/events",
        log=[JobEvent.model_validate(event) for event in document["log"]],
    )


@edge.operation("GET", "/jobs", scope="jobs:read", summary="List jobs", query=JobQuery, answers={200: JobPage})
def list_jobs(call: Call) -> Reply:
    """By identifier. `?status=dead` lists the dead letters."""
    query: JobQuery = call.query
    after = query.position(1)
    found = queue.listing(
        call.db, call.tenant, state=query.status, after=after[0] if after else None, limit=query.limit + 1
    )
    items, following = page(found, query.limit, show, lambda document: [document["_id"]])
    return Reply(JobPage(items=items, next_cursor=following))


@edge.operation("GET", "/jobs/{job}", scope="jobs:read", summary="Read a job", answers={200: Job})
def get_job(call: Call, job: str) -> Reply:
    """With its place in the queue and an estimate of the time left. A step's result stands in its response."""
    document = queue.get(call.db, call.tenant, job)
    if document is None:
        raise not_found("job")
    return Reply(show(document, estimate.estimate(call.db, document, clock.now())))


@edge.operation("POST", "/jobs/{job}/cancel", scope="jobs:write", summary="Cancel a job", answers={202: Job})
def cancel_job(call: Call, job: str) -> Reply:
    """A waiting job ends at once; a running one is asked to stop (`cancelling`). Asking again is no error."""
    try:
        found = queue.cancel(call.runtime.store, call.runtime.registry, call.tenant, job, call.session)
    except queue.NotPossibleError as error:
        before = queue.get(call.db, call.tenant, job, call.session)
        if before is not None and before["state"] == "cancelled":
            return Reply(show(before), 202)
        raise Problem(409, str(error)) from None
    if found is None:
        raise not_found("job")
    call.audit("job.cancelled", job)
    call.open_after_commit(found[1])
    return Reply(show(found[0]), 202)


@edge.operation("POST", "/jobs/{job}/replay", scope="jobs:write", summary="Run a dead job again", answers={202: Job})
def replay_job(call: Call, job: str) -> Reply:
    """Dead letters only. A webhook keeps its `webhook-id`, so a receiver that had it already can tell."""
    try:
        document = replay(call.runtime.store, call.tenant, job, call.transaction)
    except queue.NotPossibleError as error:
        raise Problem(409, str(error)) from None
    if document is None:
        raise not_found("job")
    call.audit("job.replayed", job)
    call.open_after_commit(queue.opening(document))
    return Reply(show(document), 202)


edge.document(
    Operation(
        "GET",
        "/jobs/{job}/events",
        "Follow a job",
        "jobs:read",
        "jobs",
        None,
        None,
        {200: "text/event-stream"},
        False,
        "Server-sent events, one for each entry of the job's log; resumes by `Last-Event-ID`; ends with the job.",
        served_by="events",
    )
)
