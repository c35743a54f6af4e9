"""Intake: one durable insert of the validated response, carrying its audit entry and its jobs as an outbox.

The jobs are not spelled out in the outbox: a form's version never changes, so they are a pure function of the
response (`workflows.run.jobs`), and the relay makes them from it, as often as it takes.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from pymongo.errors import DuplicateKeyError

from quern.audit.entry import canonical, content_key, content_mac, entry
from quern.observe import metrics
from quern.store import clock, identifier
from quern.store.connection import Db, Document
from quern.tenants.keys import Principal


class AnotherBodyError(Exception):
    """The idempotency key was used before with another body."""


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


def accept(db: Db, submission: Submission) -> tuple[Document, bool]:
    """Keep a response, so that it survives a power cut; returns its document and whether it was new.

    With an idempotency key the identifier is derived from tenant, form and key, so the insert itself is the check:
    the same key with the same answers gives the response made before.

    Raises:
        AnotherBodyError: the same key came with other answers.
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
        document["fingerprint"] = fingerprint(submission.answers, submission.version)
    try:
        db.responses.insert_one(document)
    except DuplicateKeyError:
        return _same_again(db, document), False
    metrics.ACCEPTED.inc()
    return document, True


def identity(tenant: str, form: str, idempotency_key: str) -> str:
    """The identifier of the response that a client submits under a key of its own."""
    return identifier.derived("rsp", tenant, form, idempotency_key)


def fingerprint(answers: Any, version: int) -> str:
    """What makes two submissions the same: their answers and the version they were filled in for."""
    return hashlib.sha256(canonical([answers, version])).hexdigest()


def _same_again(db: Db, document: Document) -> Document:
    found = db.responses.find_one({"_id": document["_id"], "tenant": document["tenant"]})
    if found is None or found.get("fingerprint") != document.get("fingerprint"):
        raise AnotherBodyError(document["_id"])
    return found
