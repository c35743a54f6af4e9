"""A response's course through intake, relay and workers in one process, with real stores and real outside ends."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import orjson

from quern.config import LiveSettings, Settings
from quern.embedded.receiver import Receiver
from quern.embedded.smtp_sink import SmtpSink
from quern.forms import form as forms
from quern.forms.fields import FormDefinition
from quern.jobs import queue
from quern.jobs.model import Queue
from quern.jobs.worker import Worker
from quern.mail.settings import MailSettings
from quern.responses import intake
from quern.responses import response as responses
from quern.runtime import Runtime
from quern.store import clock
from quern.store.connection import Document
from quern.tenants.keys import Principal
from quern.webhooks import endpoints
from quern.webhooks.settings import WebhookSettings
from quern.workflows import relay, run
from quern.workflows.definition import Workflow

TENANT = "ten_course"
FIELDS = [{"name": "comment", "type": "long_text"}, {"name": "email", "type": "email"}]


class Course:
    """Takes one step at a time, so that a test can step in between."""

    def __init__(self, settings: Settings, smtp: SmtpSink, receiver: Receiver) -> None:
        mail = MailSettings.model_validate(
            {"host": "localhost", "port": smtp.port, "tls": "none", "from_address": "forms@quern.example"}
        )
        webhook = WebhookSettings.model_validate(
            {"allow_http": True, "allow_networks": ["127.0.0.0/8"], "allow_ports": [str(receiver.port)]}
        )
        self.runtime = Runtime(LiveSettings(settings.model_copy(update={"mail": mail, "webhook": webhook})))
        self.db = self.runtime.store.db
        self._receiver = receiver

    def endpoint(self) -> str:
        """A webhook endpoint at the receiver."""
        draft = endpoints.EndpointDraft(url=f"{self._receiver.url}/hook")
        settings = self.runtime.settings.webhook
        made = endpoints.create(self.db, TENANT, draft, cipher=self.runtime.vault, settings=settings, now=clock.now())
        return made.endpoint.id

    def publish(self, *steps: dict[str, Any]) -> str:
        """A published form with this workflow."""
        fields = FormDefinition.model_validate({"fields": FIELDS}).model_dump(mode="json")
        workflow = Workflow.model_validate({"steps": list(steps)}).model_dump(mode="json", by_alias=True)
        made = forms.create(self.db, TENANT, "Course", fields, workflow)["_id"]
        queue.transact(self.runtime.store, lambda session: forms.publish(self.db, TENANT, made, session))
        return str(made)

    def submit(self, form: str, key: str | None = None, **answers: Any) -> str:
        """Accept a response; returns its identifier. Nothing is relayed yet."""
        version = self.runtime.versions.get(self.db, TENANT, form, 1)
        assert version is not None
        workflow = Workflow.model_validate_json(version.workflow)
        steps = run.begin(workflow, answers)
        accepted = intake.accept(
            self.db,
            intake.Submission(
                Principal(TENANT, "key_course", frozenset(), (), None, 0, None),
                form,
                1,
                answers,
                steps,
                run.status(workflow, steps),
                "req_course",
                "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
                key,
                intake.fingerprint(answers, None),
            ),
        )
        return str(accepted["_id"])

    def relay(self) -> None:
        """Fan out what waits."""
        while relay.drain(self.runtime.store, self.runtime.versions, self.runtime.waker):
            pass

    def work(self, queues: Sequence[Queue] = (Queue.DEFAULT, Queue.WEBHOOKS)) -> None:
        """Relay, then run every job that is due, and those that these make ready."""
        self.relay()
        for _ in range(4):
            for name in queues:
                Worker(self.runtime.store, self.runtime.registry, self.runtime.waker, name).drain()

    def make_due(self) -> None:
        """As if all the waiting were over."""
        past = clock.now() - timedelta(seconds=1)
        self.db.jobs.update_many({"state": "queued"}, {"$set": {"due": past}})
        self.db.turns.update_many({}, {"$set": {"ready": past}})

    def response(self, identity: str) -> Document:
        """As it is stored."""
        found = self.db.responses.find_one({"_id": identity})
        assert found is not None
        return found

    def job(self, response: str, step: str) -> Document:
        """The job of a response's step."""
        found = self.db.jobs.find_one({"_id": run.job_id(TENANT, response, step)})
        assert found is not None
        return found

    def erase(self, response: str) -> bool | None:
        """As the API does."""

        def work(session: Any) -> bool | None:
            return responses.erase(self.db, TENANT, response, "key_course", "req_course", session)

        erased: bool | None = queue.transact(self.runtime.store, work)
        return erased

    def everything(self) -> bytes:
        """All that the database holds, as one text to search for what must not be there."""
        names = self.db.list_collection_names(filter={"type": "collection"})
        rows = [list(self.db[name].find()) for name in names if not name.startswith("system.")]
        return orjson.dumps(rows, default=repr)


def email(name: str, **options: Any) -> dict[str, Any]:
    """An email step."""
    given = {"to": ["desk@example.org"], "subject": "Hello", "body": "{{ answers.comment }}"}
    return {"name": name, "type": "email"} | given | options


def webhook(name: str, endpoint: str, **options: Any) -> dict[str, Any]:
    """A webhook step."""
    return {"name": name, "type": "webhook", "endpoint": endpoint} | options
