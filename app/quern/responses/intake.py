"""Intake: one durable insert of the validated response, carrying its audit entry and its jobs as an outbox.

The jobs are not spelled out in the outbox: a form's version never changes, so they are a pure function of the
response (`workflows.run.jobs`), and the relay makes them from it, as often as it takes.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from pymongo.errors import (
    BulkWriteError,
    DuplicateKeyError,
    PyMongoError,
    WriteConcernError,
    WriteError,
    WTimeoutError,
)
from pymongo.read_concern import ReadConcern

from quern.audit.entry import canonical, content_key, content_mac, entry
from quern.observe import metrics
from quern.store import clock, identifier
from quern.store.combine import Combiner
from quern.store.connection import Db, Document
from quern.tenants.keys import Principal

_WRITE_CONCERN_FAILED = 64
_DUPLICATE_KEY = 11000


class SubmittedBeforeError(Exception):
    """A response was, or is being, submitted with the same idempotency key; `submitted` gives it once it is durable."""


@dataclass(frozen=True)
class Submission:
    """A validated submission, ready to be kept."""

    principal: Principal
    form: str
    version: int
    answers: dict[str, Any]
    steps: dict[str, str]
    status: str
    request_id: str
    traceparent: str
    idempotency_key: str | None
    fingerprint: str
    """Of the request, see `fingerprint`."""


def accept(db: Db, submission: Submission) -> Document:
    """Keep a response, so that it survives a power cut; returns its document.

    With an idempotency key the identifier is derived from tenant, form and key, so the insert itself is the check.

    Raises:
        SubmittedBeforeError: the same key came before.
    """
    principal, now = submission.principal, clock.now()
    key = content_key()
    if submission.idempotency_key is None:
        response = identifier.new("rsp")
    else:
        response = identity(principal.tenant, submission.form, submission.idempotency_key)
    mac = content_mac(key, submission.answers)
    record = entry(
        principal.tenant,
        principal.key,
        "response.submitted",
        response,
        detail={"form": submission.form, "version": submission.version},
        mac=mac,
        request_id=submission.request_id,
        at=now,
        cause=("submitted",),
    )
    document: Document = {
        "_id": response,
        "tenant": principal.tenant,
        "form": submission.form,
        "version": submission.version,
        "actor": principal.key,
        "status": submission.status,
        "created": now,
        "answers": submission.answers,
        "audit_key": key,
        "steps": submission.steps,
        "results": {},
        "outbox": {
            "at": now,
            "audit": record,
            "request_id": submission.request_id,
            "traceparent": submission.traceparent,
        },
    }
    if submission.idempotency_key is not None:
        document["fingerprint"] = submission.fingerprint
    try:
        _keep((db, document))
    except DuplicateKeyError:
        raise SubmittedBeforeError(response) from None
    metrics.ACCEPTED.inc()
    return document


def _insert(wanted: list[tuple[Db, Document]]) -> list[PyMongoError | None]:
    """Insert the responses of several requests at once; for each what went wrong with it, or None."""
    if len(wanted) == 1:
        db, document = wanted[0]
        db.responses.insert_one(document)
        return [None]
    clients = {id(db.client): db for db, _ in wanted}
    outcomes: list[PyMongoError | None] = [None] * len(wanted)
    for client, db in clients.items():
        places = [place for place, (other, _) in enumerate(wanted) if id(other.client) == client]
        for place, error in zip(places, _insert_together(db, [wanted[place][1] for place in places]), strict=True):
            outcomes[place] = error
    return outcomes


def _insert_together(db: Db, documents: list[Document]) -> list[PyMongoError | None]:
    outcomes: list[PyMongoError | None] = [None] * len(documents)
    try:
        db.responses.insert_many(documents, ordered=False)
    except BulkWriteError as failure:
        details = failure.details
        for concern in details.get("writeConcernErrors", []):
            # Written, but not known to be durable: to each of them as if it had come alone.
            code, text = concern.get("code"), concern.get("errmsg", "the write concern failed")
            outcomes = [WTimeoutError(text, code) if code == _WRITE_CONCERN_FAILED else WriteConcernError(text, code)]
            outcomes *= len(documents)
        for wrong in details.get("writeErrors", []):
            kind = DuplicateKeyError if wrong["code"] == _DUPLICATE_KEY else WriteError
            outcomes[wrong["index"]] = kind(wrong.get("errmsg", ""), wrong["code"], wrong)
    except PyMongoError as failure:
        # The client's side failed: none of them may be acknowledged.
        outcomes = [failure] * len(documents)
    return outcomes


#: Two batches on their way: while one waits for the journal the next is sent.
_keep: Combiner[tuple[Db, Document], None] = Combiner(_insert, at_once=2)


def submitted(db: Db, tenant: str, form: str, idempotency_key: str) -> Document | None:
    """The response that was submitted with a key, if it would survive a power cut by now."""
    durable = db.responses.with_options(read_concern=ReadConcern("majority"))
    return durable.find_one({"_id": identity(tenant, form, idempotency_key), "tenant": tenant})


def identity(tenant: str, form: str, idempotency_key: str) -> str:
    """The identifier of the response that a client submits under a key of its own."""
    return identifier.derived("rsp", tenant, form, idempotency_key)


def fingerprint(answers: Any, version: int | None) -> str:
    """What makes two submissions the same: the answers as they were sent, and the version that was named with them."""
    return hashlib.sha256(canonical([answers, version])).hexdigest()
