"""`quern job`, `queue`, `dead`, `outbox`: the work of all tenants, for whoever operates it."""

from typing import Any

import click
from pymongo.client_session import ClientSession

from quern.audit.entry import entry, record
from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.cli.runtime import open_runtime
from quern.jobs import estimate, queue, turns
from quern.jobs.model import Queue
from quern.jobs.wake import RELAY
from quern.store import clock
from quern.store.connection import Document
from quern.workflows import outbox
from quern.workflows.replay import replay

JOB_COLUMNS = ["id", "tenant", "queue", "kind", "state", "attempt", "created", "error"]


@click.group("job")
def job_group() -> None:
    """Jobs: look at one, list, cancel."""


def _job_row(document: dict[str, Any]) -> dict[str, Any]:
    hidden = ("_id", "payload", "result", "log", "lease_id")
    return {"id": document["_id"], **{name: value for name, value in document.items() if name not in hidden}}


@job_group.command("list")
@click.option("--tenant", "tenant_id", help="Only this tenant's.")
@click.option("--state", help="queued, running, blocked, done, dead, cancelled or skipped.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_jobs(tenant_id: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List jobs."""
    found = queue.listing(open_runtime().store.db, tenant_id, state=state, limit=limit)
    emit([_job_row(document) for document in found], JOB_COLUMNS, as_json, "No such jobs.")


@job_group.command("show")
@click.argument("identity")
@json_option
def show_job(identity: str, as_json: bool) -> None:
    """Show a job, its place and its log."""
    db = open_runtime().store.db
    document = db.jobs.find_one({"_id": identity})
    if document is None:
        fail(f"there is no job {identity}; `quern job list` shows some")
    guess = estimate.estimate(db, document, clock.now())
    row = {**_job_row(document), "place": guess.place, "seconds_left": guess.seconds}
    if as_json:
        emit_json({**row, "log": document["log"]})
        return
    emit([{"name": name, "value": value} for name, value in row.items()], ["name", "value"], False, "")
    click.echo()
    emit(
        [{**event, "data": event["data"] or ""} for event in document["log"]], ["seq", "type", "at", "data"], False, ""
    )


@job_group.command("cancel")
@click.argument("identity")
@json_option
def cancel_job(identity: str, as_json: bool) -> None:
    """Cancel a waiting job, or ask a running one to stop."""
    runtime = open_runtime()
    document = runtime.store.db.jobs.find_one({"_id": identity}, {"tenant": 1})
    if document is None:
        fail(f"there is no job {identity}; `quern job list` shows some")
    tenant = document["tenant"]

    def cancel(session: ClientSession) -> tuple[Document, queue.Opened] | None:
        found = queue.cancel(runtime.store, runtime.registry, tenant, identity, session)
        record(runtime.store.db, entry(tenant, "operator", "job.cancelled", identity), session)
        return found

    try:
        found = queue.transact(runtime.store, cancel)
    except queue.NotPossibleError as error:
        fail(str(error))
    if found is None:
        fail(f"there is no job {identity}; `quern job list` shows some")
    after, opened = found
    turns.open_many(runtime.store.db, opened)
    runtime.waker.wake_all(opened)
    outcome = "asked to stop" if after["state"] == "running" else "cancelled"
    emit_outcome({"id": identity, "outcome": outcome}, as_json)


@click.group("queue")
def queue_group() -> None:
    """The queues."""


@queue_group.command("list")
@json_option
def list_queues(as_json: bool) -> None:
    """How many jobs stand where."""
    emit(queues(), ["queue", "blocked", "queued", "running", "dead"], as_json, "No queues.")


def queues() -> list[dict[str, Any]]:
    counts = queue.depth(open_runtime().store.db)
    states = ("blocked", "queued", "running", "dead")
    return [{"queue": name.value, **{state: counts[name.value].get(state, 0) for state in states}} for name in Queue]


@click.group("dead")
def dead_group() -> None:
    """Dead letters: jobs that failed for good."""


@dead_group.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_dead(limit: int, as_json: bool) -> None:
    """List dead letters and why they died."""
    found = queue.listing(open_runtime().store.db, None, state="dead", limit=limit)
    emit([_job_row(document) for document in found], JOB_COLUMNS, as_json, "No dead letters.")


@dead_group.command("replay")
@click.argument("identities", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Replay every dead letter.")
@json_option
def replay_dead(identities: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Run dead letters again, by IDENTITIES or --all."""
    runtime = open_runtime()
    if everything == bool(identities):
        fail("expected either identifiers or --all; `quern dead list` shows them")
    chosen: Any = identities
    if everything:
        chosen = [row["_id"] for row in runtime.store.db.jobs.find({"state": "dead"}, {"_id": 1})]
    done: list[str] = []
    for identity in chosen:
        try:
            document = _replay(identity)
        except queue.NotPossibleError as error:
            if everything:
                click.echo(f"{identity}: {error}", err=True)
                continue
            fail(f"{identity}: {error}")
        if document is None:
            fail(f"there is no job {identity}; `quern dead list` shows the dead ones")
        done.append(identity)
    emit_outcome({"jobs": done, "outcome": f"queued again: {len(done)}"}, as_json)


def _replay(identity: str) -> Document | None:
    runtime = open_runtime()

    def again(session: ClientSession) -> Document | None:
        document = replay(runtime.store, None, identity, session)
        if document is not None:
            record(runtime.store.db, entry(document["tenant"], "operator", "job.replayed", identity), session)
        return document

    document: Document | None = queue.transact(runtime.store, again)
    if document is not None:
        opened = queue.opening(document)
        turns.open_many(runtime.store.db, opened)
        runtime.waker.wake_all(opened)
    return document


@click.group("outbox")
def outbox_group() -> None:
    """Responses that were acknowledged and have no jobs, because something is wrong with their outbox."""


@outbox_group.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_outboxes(limit: int, as_json: bool) -> None:
    """List the outboxes that were set aside; the relay's log says why."""
    found = outbox.unrelayed(open_runtime().store.db, limit)
    rows = [{"id": row.pop("_id"), **row} for row in found]
    emit(rows, ["id", "tenant", "form", "version", "created"], as_json, "None was set aside.")


@outbox_group.command("retry")
@click.argument("responses", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Retry every one.")
@json_option
def retry_outboxes(responses: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Have the relay try again, by RESPONSES or --all. It also does so whenever it starts."""
    runtime = open_runtime()
    if everything == bool(responses):
        fail("expected either identifiers of responses or --all; `quern outbox list` shows them")
    count = outbox.bring_back(runtime.store.db, None if everything else responses)
    if not everything and count < len(set(responses)):
        click.echo(f"{len(set(responses)) - count} of them were not set aside", err=True)
    runtime.waker.wake(RELAY)
    emit_outcome({"responses": count, "outcome": f"handed to the relay again: {count}"}, as_json)
