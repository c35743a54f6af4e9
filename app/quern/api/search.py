"""`/search`: responses by meaning, exact and filtered. When it is slow it fails fast, and everything else goes on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Final, Self

import pymongo
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pymongo.errors import PyMongoError

from quern.api.operation import Call, Edge, Reply
from quern.api.problem import Problem, away, not_found
from quern.api.responses import ANSWER_PATH, as_kept
from quern.breaker import Breaker, CircuitOpenError
from quern.forms import form as forms
from quern.inference.client import (
    EngineBusy,
    EngineClient,
    EngineCrashed,
    EngineDeadline,
    EngineError,
    EngineRefused,
    EngineUnavailable,
)
from quern.inference.protocol import EmbedRequest
from quern.responses import response as responses
from quern.search import vectors
from quern.store.moment import Moment

edge = Edge("search")

#: Seconds that the comparison may take, and that the engine may take to embed what is looked for.
SCAN_SECONDS: Final = 5.0
EMBED_SECONDS: Final = 3.0
#: Searches that one process does at once: each keeps a core busy, and intake needs the others.
_AT_ONCE: Final = 2
_FAILURES: Final = 3
_PAUSE_SECONDS: Final = 15.0

_places = threading.BoundedSemaphore(_AT_ONCE)
#: What makes the circuits open: the database or the engine is slow or away, whatever was asked.
SLOW: Final = (PyMongoError,)
BROKEN: Final = (EngineUnavailable, EngineDeadline, EngineBusy, EngineCrashed)
_scan = Breaker(_FAILURES, _PAUSE_SECONDS, SLOW)
_embedding = Breaker(_FAILURES, _PAUSE_SECONDS, BROKEN)

Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Path = Annotated[str, StringConstraints(pattern=ANSWER_PATH)]
Value = Annotated[str, StringConstraints(max_length=500)] | float | bool


class SearchIn(BaseModel):
    """What to look for, and among which responses."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, StringConstraints(min_length=1, max_length=4000, strip_whitespace=True)] | None = Field(
        None, description="look for what means about this"
    )
    like: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="or for what means about what this response says"
    )
    form: Annotated[str, StringConstraints(max_length=64)] | None = Field(None, description="only this form's")
    step: Name | None = Field(None, description="only what this `embed` step made; one response may have several")
    status: Name | None = None
    created_from: Moment | None = None
    created_before: Moment | None = None
    answers: dict[Path, Value] = Field(
        default_factory=dict, max_length=5, description="only responses that have exactly these answers; needs `form`"
    )
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    include_answers: bool = False

    @model_validator(mode="after")
    def _is_one_question(self) -> Self:
        if (self.text is None) == (self.like is None):
            raise ValueError("expected either `text` or `like`")
        if self.answers and self.form is None:
            raise ValueError("expected `form` with `answers`: fields are a form's")
        return self


class Hit(BaseModel):
    """A response, and how near it is."""

    response: str
    form: str
    step: str
    created: datetime
    score: float = Field(description="cosine of the two meanings: 1 is the same, 0 has nothing to do with it")
    answers: dict[str, Any] | None = None


class Hits(BaseModel):
    """The nearest first."""

    items: list[Hit]
    compared: int = Field(description="vectors that the filter let through; each was compared")
    model: str


@edge.operation(
    "POST",
    "/search",
    scope="responses:read",
    summary="Search responses by meaning",
    body=SearchIn,
    answers={200: Hits},
    safe=True,
)
def search(call: Call) -> Reply:
    """Among the responses that an `embed` step has read. Exact: every vector that the filter lets through is compared.

    503 with `Retry-After` while the engine is away, while the process does other searches, or after several searches
    in a row took too long; a filter makes the next one quicker.
    """
    # NumPy is much to hold for a host on which nobody searches.
    from quern.search.nearest import Among, nearest

    body: SearchIn = call.body
    if body.form is not None and forms.get(call.db, call.tenant, body.form) is None:
        raise not_found("form")
    wanted = _wanted(call, body)
    with place(), _guarded(_scan, "search"), pymongo.timeout(SCAN_SECONDS):
        among = Among(body.form, body.step, body.created_from, body.created_before, _filtered(call, body), body.like)
        found = nearest(call.db, call.tenant, wanted, among, body.limit)
        shown = _answers(call, {near.response for near in found.nearest}) if body.include_answers else {}
    hits = [
        Hit(
            response=near.response,
            form=near.form,
            step=near.step,
            created=near.created,
            score=round(near.score, 4),
            answers=shown.get(near.response),
        )
        for near in found.nearest
    ]
    return Reply(Hits(items=hits, compared=found.compared, model=wanted.model))


def _wanted(call: Call, body: SearchIn) -> vectors.Embedded:
    import numpy as np

    if body.like is not None:
        if responses.get(call.db, call.tenant, body.like) is None:
            raise not_found("response")
        found = vectors.of(call.db, call.tenant, body.like, body.step)
        if found is None:
            raise Problem(409, "the response has no vector: no `embed` step has read it yet")
        return found
    request = EmbedRequest(tenant=call.tenant, texts=[str(body.text)], priority="interactive", deadline=EMBED_SECONDS)
    try:
        with _guarded(_embedding, "the engine"):
            made = EngineClient(call.runtime.settings.engine_socket, timeout=EMBED_SECONDS).embeddings(request)
    except EngineRefused as error:
        raise Problem(422, f"the engine refused the text: {error}", kind="validation") from None
    except EngineError:
        raise away("the engine") from None
    return vectors.Embedded(np.array(made.vectors[0], np.float32), made.model)


def _filtered(call: Call, body: SearchIn) -> frozenset[str] | None:
    """The responses that have the status and the answers; None where neither is asked for."""
    if body.status is None and not body.answers:
        return None
    answers = {name: as_kept(value) if isinstance(value, str) else value for name, value in body.answers.items()}
    where = responses.Filter(body.form, body.status, body.created_from, body.created_before, answers)
    return frozenset(row["_id"] for row in call.db.responses.find(where.query(call.tenant), {"_id": 1}))


def _answers(call: Call, found: set[str]) -> dict[str, Any]:
    rows = call.db.responses.find(
        {"_id": {"$in": list(found)}, "tenant": call.tenant, "erased": {"$exists": False}}, {"answers": 1}
    )
    return {row["_id"]: row["answers"] for row in rows}


@contextmanager
def place() -> Iterator[None]:
    """One of the few searches that this process does at once. Raises Problem when they are all under way."""
    if not _places.acquire(blocking=False):
        raise Problem(503, "other searches are under way; try again", kind="busy", headers={"Retry-After": "1"})
    try:
        yield
    finally:
        _places.release()


@contextmanager
def _guarded(breaker: Breaker, what: str) -> Iterator[None]:
    try:
        with breaker.guard():
            yield
    except CircuitOpenError as error:
        seconds = str(max(1, round(error.seconds)))
        detail = f"{what} was too slow several times and is let alone for {seconds} s; everything else goes on"
        raise Problem(503, detail, kind="circuit-open", headers={"Retry-After": seconds}) from None
