"""The verdict: judged by the client's own log of 202 answers, not by what the service believes."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson

from quern.audit import chain
from quern.embedded.stack import Stack
from quern.webhooks.handler import message_id
from tests.chaos.client import Acknowledged, Client

_SHOWN = 10


@dataclass
class Verdict:
    """`problems` is empty when every promise held."""

    problems: list[str] = field(default_factory=list)
    repeated_webhooks: int = 0
    repeated_emails: int = 0
    rescued: int = 0
    jobs: int = 0

    def complain(self, what: str, cases: list[Any]) -> None:
        """Note a broken promise, with the first few cases."""
        if cases:
            self.problems.append(f"{what}: {len(cases)}, for example {cases[:_SHOWN]}")


def judge(stack: Stack, client: Client, form: str, submitted: int) -> Verdict:
    """Check every promise against what the client was told."""
    verdict = Verdict()
    log = client.log
    verdict.complain("the client was refused", client.faults)
    told = Counter(entry.number for entry in log)
    verdict.complain("numbers never acknowledged", sorted(set(range(submitted)) - told.keys()))
    _responses(stack, verdict, client, log, form, submitted)
    _jobs(stack, verdict, log)
    _audit(stack, verdict, log)
    _webhooks(stack, verdict, log)
    _emails(stack, verdict, log)
    return verdict


def _responses(
    stack: Stack, verdict: Verdict, client: Client, log: list[Acknowledged], form: str, submitted: int
) -> None:
    lost, unprocessed, incomplete, wrong = [], [], [], []
    for entry in log:
        found = stack.runtime.store.db.responses.find_one({"_id": entry.response})
        if found is None:
            lost.append(entry.response)
            continue
        if found["status"] != "processed" or "outbox" in found:
            unprocessed.append((entry.response, found["status"], found["steps"]))
        wanted = {step for step, state in found["steps"].items() if state != "skipped"}
        if found["results"].keys() != wanted or not wanted >= {"mood", "mail", "hook"}:
            incomplete.append((entry.response, sorted(found["results"]), found["steps"]))
        if found["answers"]["number"] != entry.number:
            wrong.append((entry.response, entry.number, found["answers"]["number"]))
    verdict.complain("acknowledged responses that do not exist", lost)
    verdict.complain("responses that were not processed", unprocessed)
    verdict.complain("responses without one result a step", incomplete)
    verdict.complain("responses with another's answers", wrong)
    stored = stack.runtime.store.db.responses.count_documents({"form": form})
    if stored != submitted:
        verdict.problems.append(f"stored responses: expected {submitted}, found {stored}")
    if log:
        seen = client.call("GET", f"/api/v1/responses/{log[0].response}")
        if seen["status"] != "processed":
            verdict.problems.append(f"the API says {seen['status']} of a response that is processed")


def _jobs(stack: Stack, verdict: Verdict, log: list[Acknowledged]) -> None:
    db = stack.runtime.store.db
    bad: list[tuple[str | None, ...]] = []
    twice: list[tuple[str, str, list[str]]] = []
    for entry in log:
        for step, job in entry.jobs.items():
            found = db.jobs.find_one({"_id": job})
            if found is None:
                bad.append((job, step, "missing"))
                continue
            verdict.jobs += 1
            types = [event["type"] for event in found["log"]]
            verdict.rescued += types.count("rescued")
            wanted = "skipped" if step == "gist" and entry.number % 10 else "done"
            if found["state"] != wanted:
                bad.append((job, step, found["state"], found.get("error")))
            if types.count(wanted) != 1:
                twice.append((job, step, types))
    verdict.complain("jobs that did not end as they should", bad)
    verdict.complain("jobs whose end was not written exactly once", twice)
    expected = sum(len(entry.jobs) for entry in log)
    # Beside the periodic ones, which the scheduler makes whatever is tested.
    if (stored := db.jobs.count_documents({"subject": {"$exists": True}})) != expected:
        verdict.problems.append(f"jobs: expected {expected}, found {stored}")


def _audit(stack: Stack, verdict: Verdict, log: list[Acknowledged]) -> None:
    db = stack.runtime.store.db
    key = chain.KeyRing(stack.runtime.settings.required("audit_key"))
    found = chain.verify(db, key)
    verdict.complain("the audit chain does not hold", found.problems)
    if found.unsealed:
        verdict.problems.append(f"audit entries never sealed: {found.unsealed}")
    if found.contents_checked != len(log):
        verdict.problems.append(f"answers vouched for: expected {len(log)}, found {found.contents_checked}")
    causes = Counter((entry["subject"], entry["action"]) for entry in db.audit.find({}, {"subject": 1, "action": 1}))
    wrong = [
        (entry.response, action, causes[(entry.response, action)])
        for entry in log
        for action in ("response.submitted", "response.processed")
        if causes[(entry.response, action)] != 1
    ]
    verdict.complain("changes without exactly one audit entry", wrong)


def _webhooks(stack: Stack, verdict: Verdict, log: list[Acknowledged]) -> None:
    ids: dict[str, set[str]] = defaultdict(set)
    bodies: dict[str, set[bytes]] = defaultdict(set)
    arrivals: Counter[str] = Counter()
    for request in stack.receiver.requests:
        response = orjson.loads(request.body)["data"]["id"]
        ids[response].add(str(request.headers["webhook-id"]))
        bodies[response].add(request.body)
        arrivals[response] += 1
    verdict.complain("webhooks that never arrived", [e.response for e in log if not arrivals[e.response]])
    wrong = [(e.response, ids[e.response]) for e in log if ids[e.response] != {message_id(e.jobs["hook"])}]
    verdict.complain("webhooks whose webhook-id is not the job's", wrong)
    verdict.complain("repeated webhooks that say something else", [r for r, said in bodies.items() if len(said) > 1])
    strangers = arrivals.keys() - {entry.response for entry in log}
    verdict.complain("webhooks of responses that nobody submitted", sorted(strangers))
    verdict.repeated_webhooks = sum(arrivals.values()) - len(arrivals)


def _emails(stack: Stack, verdict: Verdict, log: list[Acknowledged]) -> None:
    ids: dict[str, set[str]] = defaultdict(set)
    messages = stack.smtp.messages
    for received in messages:
        ids[str(received.message["Subject"]).removeprefix("Response ")].add(str(received.message["Message-ID"]))
    verdict.complain("emails that never arrived", [e.response for e in log if not ids[e.response]])
    verdict.complain("emails under several Message-IDs", [r for r, found in ids.items() if len(found) > 1])
    verdict.repeated_emails = len(messages) - len(ids)
