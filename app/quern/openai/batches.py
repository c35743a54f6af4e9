"""Batches: a file of requests becomes that many jobs of the `batched` queue, and their answers become a file.

`expand` reads the file twice: once to judge it whole, once to make each line a request with a job; each is named after
batch and line, so that an expansion which died goes on where it was. The end of each line counts it in the transaction
that ends its job; the last one makes the job that `collect`s. Then the lines are forgotten: the files have it all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import orjson
from pymongo import DESCENDING, IndexModel, ReturnDocument
from pymongo.client_session import ClientSession

from quern.jobs import queue, turns
from quern.jobs.handler import Context, Followup, Handler, Obsolete, Registry, RetryLater
from quern.jobs.model import ENDED, Job, NewJob, Queue, State
from quern.openai import answer, files, ledger, notice
from quern.openai.ledger import Asked
from quern.openai.outcome import Failure
from quern.openai.request import ENDPOINTS, BatchBody, is_too_deep
from quern.openai.settings import OpenAISettings
from quern.store import clock, identifier
from quern.store.connection import Db, Document

WINDOW: Final = timedelta(hours=24)
OPEN: Final = ("validating", "in_progress", "finalizing", "cancelling")
_FAULTS_SHOWN: Final = 50
_TOGETHER: Final = 200

INDEXES = {
    "ai_batches": [
        IndexModel([("forget", DESCENDING)], sparse=True, expireAfterSeconds=0, name="forget"),
        IndexModel([("tenant", DESCENDING), ("_id", DESCENDING)], name="by_tenant"),
    ]
}


@dataclass(frozen=True)
class Batch:
    """A batch as it is kept. `id` begins with `bat_`; clients see `public_id`. `at`: status to when it was reached."""

    id: str
    tenant: str
    key: str
    file: str
    endpoint: str
    created: datetime
    status: str
    metadata: dict[str, str] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    expanded: bool = False
    expired: bool = False
    faults: list[dict[str, Any]] = field(default_factory=list)
    output: str | None = None
    errors: str | None = None
    at: dict[str, datetime] = field(default_factory=dict)
    output_seconds: int | None = None

    @property
    def core(self) -> str:
        return self.id.removeprefix("bat_")

    @property
    def public_id(self) -> str:
        return f"batch_{self.core}"

    @property
    def expires(self) -> datetime:
        return self.created + WINDOW

    @property
    def shown(self) -> dict[str, Any]:
        """As OpenAI's clients know it."""

        def moment(status: str) -> int | None:
            return answer.unix(self.at[status]) if status in self.at else None

        return {
            "id": self.public_id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.faults} if self.faults else None,
            "input_file_id": _public_file(self.file),
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": _public_file(self.output),
            "error_file_id": _public_file(self.errors),
            "created_at": answer.unix(self.created),
            "expires_at": answer.unix(self.expires),
            **{f"{status}_at": moment(status) for status in _STAMPED},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


_STAMPED = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def _public_file(identity: str | None) -> str | None:
    return "file-" + identity.removeprefix("fil_") if identity else None


def _batch(document: Document) -> Batch:
    names = Batch.__dataclass_fields__.keys() - {"id"}
    return Batch(id=document["_id"], **{name: document[name] for name in names if name in document})


def internal_id(public_id: str) -> str | None:
    """The identifier behind one that a client gave; None for what is none."""
    own = f"bat_{public_id.removeprefix('batch_')}"
    return own if public_id.startswith("batch_") and identifier.is_valid(own, "bat") else None


def insert(
    db: Db, session: ClientSession, identity: str, tenant: str, key: str, body: BatchBody, file: str, request_id: str
) -> tuple[Batch, queue.Opened]:
    """Make a batch and the job that expands it durable."""
    document: Document = {
        "_id": identity,
        "tenant": tenant,
        "key": key,
        "file": file,
        "endpoint": body.endpoint,
        "created": clock.now(),
        "status": "validating",
        "metadata": body.metadata,
        "output_seconds": body.output_expires_after.seconds if body.output_expires_after else None,
    }
    db.ai_batches.insert_one(document, session=session)
    job = _job(tenant, identity, "expand", request_id)
    return _batch(document), queue.insert(db, [job], session=session)


def get(db: Db, tenant: str, identity: str | None, session: ClientSession | None = None) -> Batch | None:
    document = db.ai_batches.find_one({"_id": identity, "tenant": tenant}, session=session)
    return _batch(document) if document else None


def listing(db: Db, tenant: str, *, after: str | None, limit: int) -> list[Batch]:
    """Newest first."""
    query: Document = {"tenant": tenant}
    if after:
        query["_id"] = {"$lt": after}
    return [_batch(document) for document in db.ai_batches.find(query).sort("_id", -1).limit(limit)]


def unended(db: Db, tenant: str) -> int:
    """Batches of a tenant that have not ended."""
    return db.ai_batches.count_documents({"tenant": tenant, "status": {"$in": list(OPEN)}})


def cancel(db: Db, session: ClientSession, batch: Batch, request_id: str) -> tuple[Batch | None, queue.Opened]:
    """Begin to cancel a batch that has not ended. (None, nothing) when it has."""
    written = db.ai_batches.find_one_and_update(
        {"_id": batch.id, "tenant": batch.tenant, "status": {"$in": ["validating", "in_progress"]}},
        {"$set": {"status": "cancelling", "at.cancelling": clock.now()}},
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    if written is None:
        return None, []
    job = _job(batch.tenant, batch.id, "cancel", request_id)
    return _batch(written), queue.insert(db, [job], session=session)


def count(db: Db, session: ClientSession, line: Asked, cause: Job) -> list[NewJob]:
    """Count a line that has ended, in the transaction that ends it; returns the job that collects after the last."""
    good = line.state in ("completed", "incomplete")
    change: Document = {"$inc": {"completed" if good else "failed": 1}}
    if line.error is not None and line.error.code == "expired":
        change["$set"] = {"expired": True}
    document = db.ai_batches.find_one_and_update(
        {"_id": line.batch}, change, session=session, return_document=ReturnDocument.AFTER
    )
    return _collecting(document, cause.request_id) if document else []


def _collecting(document: Document, request_id: str | None) -> list[NewJob]:
    batch = _batch(document)
    if not batch.expanded or batch.completed + batch.failed < batch.total or batch.status not in OPEN:
        return []
    return [_job(batch.tenant, batch.id, "collect", request_id)]


def _job(tenant: str, batch: str, what: str, request_id: str | None) -> NewJob:
    return NewJob(
        id=NewJob.derived_id(tenant, batch, what),
        tenant=tenant,
        queue=Queue.LOW,
        kind=f"openai_batch_{what}",
        subject=batch,
        request_id=request_id,
    )


class BatchJobs:
    """Makes the handlers that expand, cancel, collect and clear. `registry` gives all handlers, these among them."""

    def __init__(self, settings: OpenAISettings, registry: Callable[[], Registry]) -> None:
        self._settings, self._registry = settings, registry

    def handlers(self) -> list[Handler]:
        return [
            Handler("openai_batch_expand", self._expand, self._expanded, keeps_result=False),
            Handler("openai_batch_cancel", self._cancel),
            Handler("openai_batch_collect", self._collect, self._collected, keeps_result=False),
            Handler("openai_batch_clear", self._clear),
        ]

    # ---- a file becomes requests

    def _expand(self, job: Job, context: Context) -> dict[str, Any]:
        db = context.db
        batch = self._of(job, db)
        file = files.get(db, batch.tenant, batch.file)
        if file is None:
            return {"faults": [_fault(None, "invalid_file", "The input file was deleted.")], "total": 0}
        if batch.status == "validating":
            total, faults = self._judge(batch, files.lines(db, file))
            if faults:
                return {"faults": faults, "total": total}
            db.ai_batches.update_one(
                {"_id": batch.id, "status": "validating"},
                {"$set": {"status": "in_progress", "at.in_progress": clock.now(), "total": total}},
            )
        if batch.status == "cancelling":
            return {"total": self._made(db, batch)}
        pending: list[tuple[int, dict[str, Any]]] = []
        for number, line in enumerate(_filled(files.lines(db, file))):
            pending.append((number, orjson.loads(line)))
            if len(pending) == _TOGETHER:
                if context.stop.is_set():
                    raise RetryLater("stopped", after=0, charged=False)
                if self._is_cancelling(db, batch):
                    pending = []
                    break
                self._make(context, batch, job, pending)
                pending = []
        if pending and not self._is_cancelling(db, batch):
            self._make(context, batch, job, pending)
        return {"total": self._made(db, batch)}

    def _judge(self, batch: Batch, lines: Iterator[bytes]) -> tuple[int, list[dict[str, Any]]]:
        seen: set[str] = set()
        faults: list[dict[str, Any]] = []
        total = 0
        for number, line in enumerate(_filled(lines), start=1):
            total = number
            if number > self._settings.max_batch_requests:
                most = self._settings.max_batch_requests
                faults.append(_fault(number, "too_many_requests", f"A batch has at most {most} requests."))
                break
            if len(line) > self._settings.max_body_bytes:
                faults.append(_fault(number, "too_large", f"Expected at most {self._settings.max_body_bytes} bytes."))
            elif (found := _wrong(line, batch.endpoint, seen)) is not None:
                faults.append(_fault(number, *found))
            if len(faults) == _FAULTS_SHOWN:
                break
        if not total:
            faults.append(_fault(None, "empty_file", "The input file has no requests."))
        return total, faults

    def _make(self, context: Context, batch: Batch, job: Job, pending: list[tuple[int, dict[str, Any]]]) -> None:
        db = context.db
        kind = ENDPOINTS[batch.endpoint]
        asked = [
            Asked(
                id=identifier.derived("air", batch.tenant, batch.id, str(number)),
                tenant=batch.tenant,
                key=batch.key,
                kind=kind,  # type: ignore[arg-type]
                created=clock.now(),
                body=line["body"],
                seed=ledger.fresh_seed(),
                batch=batch.id,
                line=number,
                custom_id=line["custom_id"],
            )
            for number, line in pending
        ]
        known = {row["_id"] for row in db.ai_requests.find({"_id": {"$in": [one.id for one in asked]}}, {"_id": 1})}
        fresh = [one for one in asked if one.id not in known]
        if fresh:
            db.ai_requests.insert_many([one.document() for one in fresh])
        jobs = [one.job(request_id=job.request_id, deadline=batch.expires) for one in asked]
        turns.open_many(db, queue.insert(db, jobs))

    @staticmethod
    def _made(db: Db, batch: Batch) -> int:
        return db.ai_requests.count_documents({"batch": batch.id})

    @staticmethod
    def _is_cancelling(db: Db, batch: Batch) -> bool:
        return db.ai_batches.find_one({"_id": batch.id, "status": "cancelling"}, {"_id": 1}) is not None

    def _expanded(
        self, db: Db, session: ClientSession, job: Job, state: State, result: dict[str, Any] | None, error: str | None
    ) -> Followup:
        result = result or {"faults": [_fault(None, "server_error", f"The batch could not be read: {error}.")]}
        if faults := result.get("faults"):
            now = clock.now()
            change = {"status": "failed", "at.failed": now, "faults": faults, "forget": self._forget(now)}
            batch = self._set(db, session, job, change)
            if batch is None:
                return Followup()
            event = notice.jobs(db, session, job.tenant, "batch.failed", _batch(batch).public_id, now, job)
            return Followup(enqueue=event)
        document = self._set(db, session, job, {"expanded": True, "total": result["total"]})
        return Followup(enqueue=_collecting(document, job.request_id) if document else [])

    # ---- a batch is ended

    def _cancel(self, job: Job, context: Context) -> dict[str, Any]:
        db, store = context.db, context.store
        batch = self._of(job, db)
        if not batch.expanded:
            raise RetryLater("the batch is still being read", after=0.5, charged=False)
        waiting = db.ai_requests.find({"batch": batch.id, "state": {"$in": ["queued", "in_progress"]}}, {"_id": 1})
        cancelled = 0
        for row in waiting:
            if context.stop.is_set():
                raise RetryLater("stopped", after=0, charged=False)
            identity = NewJob.derived_id(batch.tenant, row["_id"], "answer")
            found = queue.get(db, batch.tenant, identity)
            if found is None and (line := ledger.get(db, batch.tenant, row["_id"])) is not None:
                # The expansion died between the line and its job: only an end of a job counts the line.
                queue.insert(db, [line.job(request_id=job.request_id)])
            elif found is None or State(found["state"]) in ENDED:
                continue
            try:
                ended = queue.cancel(store, self._registry(), batch.tenant, identity)
            except queue.NotPossibleError:
                continue
            if ended is not None:
                turns.open_many(db, ended[1])
            cancelled += 1
        return {"cancelled": cancelled}

    # ---- answers become files

    def _collect(self, job: Job, context: Context) -> dict[str, Any]:
        db = context.db
        batch = self._of(job, db)
        now = clock.now()
        db.ai_batches.update_one(
            {"_id": batch.id, "status": "in_progress"}, {"$set": {"status": "finalizing", "at.finalizing": now}}
        )
        # Named once, so that a collection which died writes the same files again.
        fresh = {name: identifier.new("fil") for name in ("output", "errors")}
        db.ai_batches.update_one({"_id": batch.id, "results": {"$exists": False}}, {"$set": {"results": fresh}})
        planned = db.ai_batches.find_one({"_id": batch.id}, {"results": 1}) or {"results": fresh}
        kept = timedelta(seconds=batch.output_seconds) if batch.output_seconds else None
        forget = now + kept if kept else self._forget(now)
        written: dict[str, Any] = {"forget": forget}
        for name, good in (("output", True), ("errors", False)):
            identity = planned["results"][name]
            size = files.write_content(db, batch.tenant, identity, _results(db, batch, good), forget)
            if size:
                written[name] = {"id": identity, "size": size}
        return written

    def _collected(
        self, db: Db, session: ClientSession, job: Job, state: State, result: dict[str, Any] | None, error: str | None
    ) -> Followup:
        document = db.ai_batches.find_one({"_id": job.subject}, session=session)
        if document is None:
            return Followup()
        batch, now = _batch(document), clock.now()
        change: Document = {"forget": self._forget(now)}
        if result is None:
            status = "failed"
            change["faults"] = [_fault(None, "server_error", f"The results could not be written: {error}.")]
        else:
            status = "cancelled" if batch.status == "cancelling" else "expired" if batch.expired else "completed"
            for name in ("output", "errors"):
                if (made := result.get(name)) is None:
                    continue
                file = files.insert(
                    db,
                    session,
                    identity=made["id"],
                    tenant=batch.tenant,
                    purpose="batch_output",
                    filename=f"{batch.public_id}_{name}.jsonl",
                    size=made["size"],
                    forget=result["forget"],
                )
                change[name] = file.id
        self._set(db, session, job, change | {"status": status, f"at.{status}": now})
        event = notice.jobs(db, session, batch.tenant, f"batch.{status}", batch.public_id, now, job)
        return Followup(enqueue=[*event, _job(batch.tenant, batch.id, "clear", job.request_id)])

    def _clear(self, job: Job, context: Context) -> dict[str, Any]:
        return {"deleted": context.db.ai_requests.delete_many({"batch": job.subject}).deleted_count}

    # ----

    def _of(self, job: Job, db: Db) -> Batch:
        batch = get(db, job.tenant, job.subject)
        if batch is None:
            raise Obsolete("the batch was forgotten")
        return batch

    def _forget(self, now: datetime) -> datetime:
        return now + timedelta(days=self._settings.keep_stored_days)

    @staticmethod
    def _set(db: Db, session: ClientSession, job: Job, change: Document) -> Document | None:
        return db.ai_batches.find_one_and_update(
            {"_id": job.subject, "tenant": job.tenant},
            {"$set": change},
            session=session,
            return_document=ReturnDocument.AFTER,
        )


def _filled(lines: Iterator[bytes]) -> Iterator[bytes]:
    return (line for line in lines if line.strip())


def _wrong(line: bytes, endpoint: str, seen: set[str]) -> tuple[str, str] | None:
    """Code and message of what is wrong with a line's frame; its body is judged when it is carried out."""
    try:
        value = orjson.loads(line)
    except ValueError:
        return "invalid_json_line", "Expected a JSON object in each line."
    if not isinstance(value, dict) or not isinstance(value.get("body"), dict) or is_too_deep(value):
        return "invalid_request", "Expected an object with custom_id, method, url and body."
    if not isinstance(name := value.get("custom_id"), str) or not 0 < len(name) <= 512:
        return "missing_required_parameter", "Expected custom_id, a string of 1 to 512 characters."
    if name in seen:
        return "duplicate_custom_id", "Expected each custom_id once."
    seen.add(name)
    if value.get("method") != "POST" or value.get("url") != endpoint:
        return "mismatched_endpoint", f"Expected method POST and url {endpoint}."
    return None


def _fault(line: int | None, code: str, message: str) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": None}


def _results(db: Db, batch: Batch, good: bool) -> Iterator[bytes]:
    for asked in ledger.of_batch(db, batch.id):
        if (asked.state in ("completed", "incomplete")) == good:
            yield orjson.dumps(_result(asked)) + b"\n"


def _result(asked: Asked) -> dict[str, Any]:
    head = {"id": f"batch_req_{asked.core}", "custom_id": asked.custom_id}
    if asked.state in ("completed", "incomplete"):
        shown = {"status_code": 200, "request_id": asked.job_id, "body": answer.whole(asked)}
        return {**head, "response": shown, "error": None}
    if asked.state == "cancelled" or asked.error is None:
        error = {"code": "batch_cancelled", "message": "The batch was cancelled before this request was carried out."}
        return {**head, "response": None, "error": error}
    failure: Failure = asked.error
    if failure.code == "expired":
        error = {"code": "batch_expired", "message": "The batch expired before this request was carried out."}
        return {**head, "response": None, "error": error}
    shown = {"status_code": failure.status, "request_id": asked.job_id, "body": {"error": failure.document}}
    return {**head, "response": shown, "error": None}
