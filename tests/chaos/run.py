"""The ordeal: a client submits responses while every part of the service is killed again and again.

    python -m tests.chaos.run --kills 100 --responses 1000 --seed 1

Everything is real: mongod, Redis, the API behind nginx, relay, scheduler, workers, the engine with its models, an SMTP
server and a webhook receiver. SIGKILL ends a process, not the machine: what the kernel holds of its files survives, so
this says nothing of power cuts.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pymongo.errors import PyMongoError

from quern.embedded.receiver import Answer
from quern.embedded.stack import Stack, temporary_stack
from quern.tenants import keys, tenant
from tests.chaos.client import Client, Numbers
from tests.chaos.kills import Killer
from tests.chaos.verdict import Verdict, judge

#: Short leases and quick retries, so that what a kill breaks is mended within seconds.
SETTINGS = {
    "QUERN_JOB__LEASE": "2",
    "QUERN_JOB__RECONCILE_EVERY": "0.2",
    "QUERN_JOB__BACKOFF_BASE": "0.2",
    "QUERN_JOB__BACKOFF_CAP": "2",
    "QUERN_JOB__MAX_LOST_LEASES": "1000",
    "QUERN_ENGINE_ADAPT_THREADS": "false",
}
QUEUES = ("default", "webhooks", "batched")
_SUBMITTERS = 4


def workflow(endpoint: str) -> dict[str, Any]:
    """AI, an email that needs it, and a webhook that needs both; one response in ten is summarized as well."""
    return {
        "steps": [
            {"name": "mood", "type": "sentiment", "fields": ["comment"]},
            {
                "name": "gist",
                "type": "summarize",
                "fields": ["comment"],
                "max_words": 5,
                "when": {"path": "answers.long", "op": "eq", "value": True},
            },
            {
                "name": "mail",
                "type": "email",
                "needs": ["mood"],
                "to": ["desk@example.org"],
                "subject": "Response {{ response.id }}",
                "body": "Mood: {{ results.mood.label }}\n\n{{ answers.comment }}\n",
            },
            {
                "name": "hook",
                "type": "webhook",
                "needs": ["mood", "mail", "gist"],
                "after_failure": "run",
                "endpoint": endpoint,
            },
        ]
    }


def prepare(stack: Stack) -> tuple[Client, str]:
    """A tenant without a limit, its key, a webhook endpoint and a published form; returns the client and the form."""
    db = stack.runtime.store.db
    made = tenant.create(db, "ordeal", requests_per_minute=0)
    _, key = keys.create(db, made["_id"], "ordeal")
    client = Client(stack.url, key)
    hook = client.call("POST", "/api/v1/webhooks", {"url": f"{stack.receiver.url}/ordeal"})
    fields = [
        {"name": "number", "type": "number", "integer": True, "required": True},
        {"name": "comment", "type": "long_text", "required": True},
        {"name": "long", "type": "consent"},
    ]
    form = client.call("POST", "/api/v1/forms", {"name": "Ordeal", "fields": fields, "workflow": workflow(hook["id"])})[
        "id"
    ]
    client.call("POST", f"/api/v1/forms/{form}/publish")
    return client, form


@dataclass
class Ordeal:
    """What came of it."""

    killer: Killer
    client: Client
    verdict: Verdict
    seconds: float

    def report(self) -> str:
        """All that is to be known, as text."""
        verdict = self.verdict
        fallen = ", ".join(f"{name} {count}" for name, count in self.killer.fallen.items()) or "none"
        return "\n".join(
            [
                self.killer.table(),
                f"Redis emptied: {self.killer.flushes} times; components that ended by themselves: {fallen}",
                f"acknowledged: {len(self.client.log)} in {self.client.tries} requests; jobs: {verdict.jobs}; "
                f"rescued: {verdict.rescued}",
                f"webhooks repeated (same webhook-id): {verdict.repeated_webhooks}; "
                f"emails repeated (same Message-ID): {verdict.repeated_emails}",
                f"seconds: {self.seconds:.0f}",
                *(verdict.problems or ["every promise held"]),
            ]
        )


def endure(kills: int, responses: int, seed: int, say: Callable[[str], None] = lambda _: None) -> Ordeal:
    """Run the ordeal. Work is released as the kills go on, so that there is some from the first to the last."""
    began = time.monotonic()
    with temporary_stack(settings=SETTINGS, queues=QUEUES, api_workers=2) as stack:
        # A receiver that takes its time keeps claims alive long enough to be struck.
        stack.receiver.default = Answer(delay=0.05)
        client, form = prepare(stack)
        say(f"the stack is up after {time.monotonic() - began:.0f} s")
        numbers = Numbers(responses)
        killer = Killer(stack, seed)
        submitters = [
            threading.Thread(target=client.run, args=(form, numbers, seed), daemon=True) for _ in range(_SUBMITTERS)
        ]
        for thread in submitters:
            thread.start()
        for number in range(kills):
            # The last kills meet what is left when nobody submits any more.
            numbers.release((number + 1) * responses * 10 // (kills * 9) + 1)
            kill = killer.strike(lambda: client.in_flight)
            say(
                f"kill {number + 1}: {kill.component}, {kill.claims} claims live, {len(client.log)} acknowledged, "
                f"{time.monotonic() - began:.0f} s"
            )
        _settle(stack, killer, submitters, say)
        verdict = judge(stack, client, form, responses)
        return Ordeal(killer, client, verdict, time.monotonic() - began)


def _settle(stack: Stack, killer: Killer, submitters: list[threading.Thread], say: Callable[[str], None]) -> None:
    """Wait until nothing is left to do: all submitted, relayed, ended and sealed. Gives up after 15 minutes."""
    deadline = time.monotonic() + 900
    said = 0.0
    while time.monotonic() < deadline:
        killer.restart_fallen()
        left = _left(stack)
        if not left and not any(thread.is_alive() for thread in submitters):
            return
        if time.monotonic() - said > 5:
            said = time.monotonic()
            say(f"left: {left}")
        time.sleep(0.2)


def _left(stack: Stack) -> dict[str, int]:
    db = stack.runtime.store.db
    # Those of responses: nobody runs the periodic ones here.
    unended = {"subject": {"$exists": True}, "state": {"$in": ["blocked", "queued", "running"]}}
    try:
        counts = {
            "outboxes": db.responses.count_documents({"outbox.at": {"$exists": True}}),
            "jobs": db.jobs.count_documents(unended),
            "unsealed": db.audit.count_documents({"pending": True}),
        }
    except PyMongoError:
        return {"database away": 1}
    return {name: count for name, count in counts.items() if count}


def main() -> int:
    """Exit 0 only if every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--responses", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    ordeal = endure(given.kills, given.responses, given.seed, lambda line: print(line, flush=True))
    print(ordeal.report())
    return 1 if ordeal.verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
