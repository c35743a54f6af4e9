"""A hundred answers that try to give orders: no schema escapes, and nobody else's output changes."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator

from quern.embedded.demo import TOPICS, Client
from quern.embedded.stack import Stack, temporary_stack
from quern.tenants import keys, tenant
from quern.workflows import prompt
from quern.workflows.definition import ExtractStep, SummarizeStep

ATTACKS: list[dict[str, Any]] = [
    orjson.loads(line)
    for line in (Path(__file__).parent / "corpus" / "injected_answers.jsonl").read_text().splitlines()
]
HARMLESS = [
    "My parcel arrived two weeks late and the driver threw it over the fence. The order was QX-48213.",
    "Thank you, the lady at the desk was very friendly and helped me at once. I will gladly come back.",
    "The web site logs me out each time I open the page with my bills, and the search finds nothing.",
    "You charged me twice for the same invoice. Please send the money back and write to me when it is done.",
]
EXTRACTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "order_number": {"type": ["string", "null"], "maxLength": 20},
        "chosen": {"type": "string", "enum": list(TOPICS)},
        "wants_reply": {"type": "boolean"},
    },
    "required": ["order_number", "chosen", "wants_reply"],
    "additionalProperties": False,
}
MOODS = ("positive", "neutral", "negative")
FORM: dict[str, Any] = {
    "name": "Service feedback",
    "fields": [{"name": "comment", "type": "long_text", "required": True, "max_length": 20_000}],
    "workflow": {
        "steps": [
            {"name": "facts", "type": "extract", "json_schema": EXTRACTED, "max_tokens": 64},
            {"name": "topic", "type": "classify", "labels": TOPICS},
            {"name": "mood", "type": "sentiment"},
        ]
    },
}
PATIENCE_SECONDS = 900


class Tenant:
    """A tenant with the form, and a client of its own."""

    def __init__(self, stack: Stack, name: str) -> None:
        db = stack.runtime.store.db
        made = tenant.create(db, name, requests_per_minute=0)
        self.client = Client(stack.url, keys.create(db, made["_id"], "test")[1])
        self.form = self.client.call("POST", "/api/v1/forms", FORM)["id"]
        self.client.call("POST", f"/api/v1/forms/{self.form}/publish")

    def submit(self, comment: str) -> str:
        body = {"answers": {"comment": comment}}
        return str(self.client.call("POST", f"/api/v1/forms/{self.form}/responses", body)["id"])

    def finished(self, response: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found: dict[str, Any] = self.client.call("GET", f"/api/v1/responses/{response}")
            if found["status"] != "processing":
                return found
            assert time.monotonic() < deadline, f"{response} is still processing: {found['jobs']}"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def outcome() -> Iterator[dict[str, Any]]:
    """What harmless answers give alone, then beside all attacks, and what the attacks give."""
    with temporary_stack(queues=("batched",)) as stack:
        attacker, bystander = Tenant(stack, "attacker"), Tenant(stack, "bystander")
        quiet = [bystander.finished(bystander.submit(text)) for text in HARMLESS]
        attacks, beside, own = [], [], []
        for number, attack in enumerate(ATTACKS):
            attacks.append(attacker.submit(attack["answer"]))
            if number % 25 == 12:
                text = HARMLESS[number // 25]
                beside.append(bystander.submit(text))
                own.append(attacker.submit(text))
        yield {
            "quiet": quiet,
            "attacks": [attacker.finished(response) for response in attacks],
            "beside": [bystander.finished(response) for response in beside],
            "own": [attacker.finished(response) for response in own],
        }


def test_no_injected_answer_escapes_its_schema(outcome: dict[str, Any]) -> None:
    validator = Draft202012Validator(EXTRACTED)
    assert len(outcome["attacks"]) == 100
    for response in outcome["attacks"]:
        states = {job["step"]: job["status"] for job in response["jobs"]}
        results = response["results"]
        for step, state in states.items():
            # A step may fail closed; it may not succeed with something else.
            assert state in ("done", "dead"), (response["id"], states)
            assert (step in results) == (state == "done")
        if "facts" in results:
            assert validator.is_valid(results["facts"]["data"]), results["facts"]
        assert results["topic"]["label"] in TOPICS
        assert results["mood"]["label"] in MOODS


def test_hardly_any_injected_answer_costs_its_own_results(outcome: dict[str, Any]) -> None:
    failed = [response["id"] for response in outcome["attacks"] if response["status"] != "processed"]
    assert len(failed) <= 5, failed


@pytest.mark.parametrize("who", ["beside", "own"])
def test_no_injected_answer_changes_the_output_of_another_response(outcome: dict[str, Any], who: str) -> None:
    for before, after in zip(outcome["quiet"], outcome[who], strict=True):
        assert after["status"] == "processed"
        assert after["answers"] == before["answers"]
        for step in ("topic", "mood"):
            # To the last digit: a batch that is scaled together would show here.
            assert after["results"][step] == before["results"][step]
        shown = orjson.dumps(after["results"]).decode()
        assert [marker for marker in _markers() if marker in shown] == []


def _markers() -> list[str]:
    """Words that stand out in the attacks and in no harmless answer: none may turn up in another's output."""
    found = set()
    for attack in ATTACKS:
        found |= set(re.findall(r"\b(?=[A-Z0-9-]*[A-Z])[A-Z0-9-]{5,}\b", attack["answer"]))
    return sorted(word for word in found if not any(word in text for text in HARMLESS))


def test_the_markers_would_be_noticed() -> None:
    assert "PWNED" in _markers()
    assert "QX-48213" not in _markers()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack["id"]))
def test_an_answer_never_reaches_the_instructions(attack: dict[str, Any]) -> None:
    own = "Summarize for {{ form.name }}."
    for step in (
        SummarizeStep(type="summarize", name="s"),
        SummarizeStep(type="summarize", name="s", instructions=own),
        ExtractStep(type="extract", name="e", json_schema=EXTRACTED),
    ):
        hostile = prompt.messages(step, "Feedback", attack["answer"])
        harmless = prompt.messages(step, "Feedback", "Fine.")
        assert hostile[0] == harmless[0]
        assert hostile[1:] == [{"role": "user", "content": attack["answer"]}]
