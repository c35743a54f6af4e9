"""The handlers of a workflow's steps: read the response, do the step, and write its result with what follows."""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pymongo import ReturnDocument
from pymongo.client_session import ClientSession

from quern.audit.entry import entry, record
from quern.forms.form import Version, Versions
from quern.inference.client import EngineClient
from quern.jobs.handler import Context, Followup, Handler, Obsolete, Refused, RetryLater
from quern.jobs.model import Job, State
from quern.mail.compose import MessageDraft, MessageRefusedError, compose
from quern.mail.send import PermanentMailError, TransientMailError, send
from quern.observe import traces
from quern.search import vectors
from quern.store import clock
from quern.store.connection import Db, Document
from quern.webhooks import RESEND_KIND
from quern.webhooks.settings import WebhookSettings
from quern.workflows import ai, prompt, run, template
from quern.workflows.definition import EmailStep, FromField, Step, WebhookStep, Workflow, parsed

AI_KINDS = ("summarize", "classify", "extract", "sentiment", "translate", "embed")


class Gone(Obsolete):
    """The response was erased while its job waited."""

    def __init__(self) -> None:
        super().__init__("the response was erased")


@dataclass(frozen=True)
class Material:
    """All that a step may see: its own response and form, nothing else."""

    response: Document
    version: Version
    workflow: Workflow
    step: Step


class Steps:
    """Makes the handlers of all kinds of steps. `tls` gives the context of webhooks."""

    def __init__(self, engine: EngineClient, versions: Versions, tls: Callable[[], ssl.SSLContext]) -> None:
        self._engine, self._versions, self._tls = engine, versions, tls

    def handlers(self, webhook: WebhookSettings) -> Sequence[Handler]:
        ai_steps = [Handler(kind, self._ai, self._on_end, keeps_result=False) for kind in AI_KINDS]
        return [
            *ai_steps,
            Handler("email", self._email, self._on_end, keeps_result=False),
            Handler("webhook", self._webhook, self._on_end, webhook.max_attempts, keeps_result=False),
            Handler(RESEND_KIND, self._webhook, None, webhook.max_attempts),
        ]

    def _material(self, db: Db, job: Job) -> Material:
        response = db.responses.find_one({"_id": job.subject, "tenant": job.tenant})
        if response is None or "erased" in response:
            raise Gone
        version = self._versions.get(db, job.tenant, response["form"], response["version"])
        if version is None:
            raise Refused("the form's version is missing")
        workflow = parsed(version.workflow)
        step = next((step for step in workflow.steps if step.name == job.payload["step"]), None)
        if step is None:
            raise Refused("the workflow has no such step")
        return Material(response, version, workflow, step)

    def _ai(self, job: Job, context: Context) -> dict[str, Any]:
        with traces.span("step", step=job.kind):
            material = self._material(context.db, job)
            step: Any = material.step
            text, cut = prompt.text_of(
                material.response["answers"], step.fields, ai.text_fields(material.version.definition)
            )
            reading = ai.Reading(text, cut, material.version.name)
            return ai.run(step, reading, job, context, self._engine)

    def _email(self, job: Job, context: Context) -> dict[str, Any]:
        settings = context.store.settings.mail
        if settings is None:
            raise Refused("no mail relay is configured; set QUERN_MAIL__HOST and QUERN_MAIL__FROM_ADDRESS")
        material = self._material(context.db, job)
        step = material.step
        if not isinstance(step, EmailStep):
            raise Refused("not an email step")
        answers = material.response["answers"]
        to = [answers.get(step.to.field)] if isinstance(step.to, FromField) else list(step.to)
        if not all(isinstance(address, str) for address in to):
            return {"sent": False, "reason": "no address was given"}
        values = template_values(material)
        try:
            draft = MessageDraft(
                to=tuple(str(address) for address in to),
                subject=" ".join(template.render(step.subject, values).split()),
                text=template.render(step.body, values),
            )
            message = compose(draft, job_id=job.id, date=job.created, settings=settings)
            served = set(job.payload.get("served", []))
            pending = [address for position, address in enumerate(draft.to) if position not in served]
            with traces.span("deliver email"):
                receipt = send(message, tuple(pending), settings)
        except template.RenderError as error:
            raise Refused(f"the templates of step {step.name}: {error}") from None
        except (MessageRefusedError, ValueError) as error:
            raise Refused(f"the message cannot be sent: {type(error).__name__}") from None
        except PermanentMailError as error:
            raise Refused(str(error)) from None
        except TransientMailError as error:
            raise RetryLater(str(error)) from None
        if receipt.deferred:
            later = [position for position, address in enumerate(draft.to) if address not in receipt.deferred]
            context.db.jobs.update_one({"_id": job.id, "lease_id": job.lease_id}, {"$set": {"payload.served": later}})
            raise RetryLater(f"the relay deferred {len(receipt.deferred)} of {len(draft.to)} recipients")
        return {"sent": True, "message_id": message["Message-ID"], "rejected": len(receipt.rejected)}

    def _webhook(self, job: Job, context: Context) -> dict[str, Any]:
        # Only the worker of webhooks comes here: the others need not hold an HTTP client and ciphers.
        from quern.store.vault import Vault
        from quern.webhooks.handler import Message, attempt

        material = self._material(context.db, job)
        step = material.step
        if not isinstance(step, WebhookStep):
            raise Refused("not a webhook step")
        body = job.payload.get("body") or self._body(job, context, material, step)
        settings = context.store.settings
        original = job.payload.get("original")
        message = Message(step.endpoint, step.event, body, job.subject, original)
        vault = Vault(*settings.required("secret_keys"))
        with traces.span("deliver webhook", parent=context.traceparent) as traceparent:
            return attempt(job, context.db, message, settings.webhook, vault, self._tls(), traceparent)

    def _body(self, job: Job, context: Context, material: Material, step: WebhookStep) -> bytes:
        """The message, kept with the job before it is first sent: one `webhook-id` never names two contents."""
        body = orjson.dumps(
            {
                "type": step.event,
                "timestamp": clock.rfc3339(job.payload.get("occurred", job.created)),
                "data": public(material.response, include_answers=step.include_answers, itself=step.name),
            }
        )
        held = {"_id": job.id, "lease_id": job.lease_id}
        if not context.db.jobs.update_one(held, {"$set": {"payload.body": body}}).matched_count:
            raise RetryLater("the lease was lost before anything was sent", charged=False)
        return body

    def _on_end(
        self, db: Db, session: ClientSession, job: Job, state: State, result: dict[str, Any] | None, error: str | None
    ) -> Followup:
        """Write a step's end into its response and release, or skip, the steps that waited for it."""
        name = job.payload["step"]
        change: Document = {f"steps.{name}": state.value}
        if state is State.DONE:
            change[f"results.{name}"] = result
        response = db.responses.find_one_and_update(
            {"_id": job.subject, "tenant": job.tenant, "erased": {"$exists": False}},
            {"$set": change},
            return_document=ReturnDocument.AFTER,
            session=session,
        )
        if response is None:
            return Followup()
        if result is not None and "vector" in result and state is State.DONE:
            vectors.keep(db, response, name, result["vector"], result["model"], session)
        version = self._versions.get(db, job.tenant, response["form"], response["version"])
        if version is None:
            return Followup()
        workflow = parsed(version.workflow)
        ahead = run.advance(workflow, response["steps"], response["answers"], response["results"])
        after: Document = {f"steps.{step}": ahead.steps[step] for step in (*ahead.release, *ahead.skip)}
        status = run.status(workflow, ahead.steps)
        if status != response["status"]:
            after["status"] = status
            if status != "processing":
                after["processed"] = clock.now()
                record(
                    db,
                    entry(job.tenant, "quern", f"response.{status}", response["_id"], request_id=job.request_id),
                    session,
                )
        if after:
            db.responses.update_one({"_id": response["_id"]}, {"$set": after}, session=session)
        ids = {step.name: run.job_id(job.tenant, response["_id"], step.name) for step in workflow.steps}
        return Followup(release=[ids[step] for step in ahead.release], skip=[ids[step] for step in ahead.skip])


def template_values(material: Material) -> dict[str, Any]:
    """What a message's template may show."""
    response = material.response
    return {
        "form": {"name": material.version.name, "id": response["form"]},
        "response": {"id": response["_id"], "created": clock.rfc3339(response["created"])},
        "answers": response["answers"],
        "results": response["results"],
    }


def public(response: Document, *, include_answers: bool, itself: str) -> dict[str, Any]:
    """A response as a webhook shows it: without vectors, and without the delivering step's own state and result."""
    results = {
        name: {key: value for key, value in result.items() if key != "vector"} | _dimensions(result)
        for name, result in response["results"].items()
        if name != itself
    }
    data = {
        "id": response["_id"],
        "form": response["form"],
        "version": response["version"],
        "created": clock.rfc3339(response["created"]),
        "steps": {name: state for name, state in response["steps"].items() if name != itself},
        "results": results,
    }
    return data | ({"answers": response["answers"]} if include_answers else {})


def _dimensions(result: dict[str, Any]) -> dict[str, Any]:
    return {"dimensions": len(result["vector"])} if "vector" in result else {}
