"""Webhooks of background responses and batches, in the form of Standard Webhooks, to the tenant's own endpoints."""

import ssl
from datetime import datetime
from typing import Any

import orjson
from pymongo.client_session import ClientSession

from quern.jobs.handler import Context, Handler
from quern.jobs.model import Job, NewJob, Queue
from quern.observe import traces
from quern.store import identifier
from quern.store.connection import Db
from quern.webhooks.settings import WebhookSettings

KIND = "openai_webhook"


def jobs(
    db: Db, session: ClientSession, tenant: str, event: str, subject: str, at: datetime, cause: Job | None
) -> list[NewJob]:
    """One delivery for each endpoint of the tenant that wants `event`. `subject`: the public identifier it is about."""
    # As below: few requests come here, and what delivers is much to hold for those who only answer.
    from quern.webhooks import endpoints

    wanting = [endpoint.id for endpoint in endpoints.subscribed(db, tenant, event, session=session)]
    return [
        NewJob(
            id=NewJob.derived_id(tenant, KIND, subject, event, endpoint),
            tenant=tenant,
            queue=Queue.WEBHOOKS,
            kind=KIND,
            payload={"endpoint": endpoint, "event": event, "subject": subject, "at": int(at.timestamp())},
            request_id=cause.request_id if cause else None,
            traceparent=cause.traceparent if cause else None,
        )
        for endpoint in wanting
    ]


def body(job: Job) -> bytes:
    """The event as OpenAI's client unwraps it: what has ended, and nothing that anybody wrote."""
    payload = job.payload
    event = {
        "object": "event",
        "id": identifier.derived("evt", job.tenant, payload["subject"], payload["event"]),
        "type": payload["event"],
        "created_at": payload["at"],
        "data": {"id": payload["subject"]},
    }
    return orjson.dumps(event)


def handler(webhook: WebhookSettings, tls: ssl.SSLContext) -> Handler:
    """Delivers one event."""
    from quern.store.vault import Vault
    from quern.webhooks.handler import Message, attempt

    def run(job: Job, context: Context) -> dict[str, Any]:
        settings = context.store.settings
        message = Message(job.payload["endpoint"], job.payload["event"], body(job), None)
        vault = Vault(*settings.required("secret_keys"))
        with traces.span("deliver webhook", parent=context.traceparent) as traceparent:
            return attempt(job, context.db, message, settings.webhook, vault, tls, traceparent)

    return Handler(KIND, run, max_failures=webhook.max_attempts)
