"""Every kind of step, for real: both models, an SMTP relay and a webhook receiver."""

import math
import time
from collections.abc import Iterator
from typing import Any

import httpcore2
import orjson
import pytest

from quern.embedded.demo import EXTRACTED, TOPICS, Client
from quern.embedded.stack import Stack, temporary_stack
from quern.tenants import keys, tenant
from quern.workflows.prompt import SENTIMENTS
from tests.app.accounts import ApplianceAccounts, refused

COMMENT = "My parcel with the number QX-48213 came two weeks late and the box was open. Please call me back."
PATIENCE_SECONDS = 600


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with temporary_stack(queues=("default", "webhooks", "batched"), accounts=ApplianceAccounts()) as running:
        yield running
        assert refused(running) == []


@pytest.fixture(scope="module")
def response(stack: Stack) -> dict[str, Any]:
    """A response whose workflow has every kind of step, when all of it has ended."""
    db = stack.runtime.store.db
    made = tenant.create(db, "steps", requests_per_minute=0)
    client = Client(stack.url, keys.create(db, made["_id"], "test")[1])
    endpoint = client.call("POST", "/api/v1/webhooks", {"url": f"{stack.receiver.url}/steps"})
    steps = [
        {"name": "summary", "type": "summarize", "max_words": 20},
        {"name": "topic", "type": "classify", "labels": TOPICS},
        {"name": "chosen", "type": "classify", "labels": TOPICS, "method": "model"},
        {"name": "facts", "type": "extract", "json_schema": EXTRACTED, "max_tokens": 96},
        {"name": "mood", "type": "sentiment"},
        {"name": "felt", "type": "sentiment", "method": "model"},
        {"name": "german", "type": "translate", "to": "German"},
        {"name": "vector", "type": "embed"},
        {
            "name": "mail",
            "type": "email",
            "needs": ["summary", "mood"],
            "to": ["desk@example.org"],
            "subject": "{{ results.mood.label }}",
            "body": "{{ results.summary.text }}",
        },
        {"name": "hook", "type": "webhook", "needs": ["mail", "german"], "endpoint": endpoint["id"]},
    ]
    fields = [{"name": "comment", "type": "long_text", "required": True}]
    form = client.call("POST", "/api/v1/forms", {"name": "all steps", "fields": fields, "workflow": {"steps": steps}})
    client.call("POST", f"/api/v1/forms/{form['id']}/publish")
    accepted = client.call("POST", f"/api/v1/forms/{form['id']}/responses", {"answers": {"comment": COMMENT}})
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found: dict[str, Any] = client.call("GET", accepted["href"])
        if found["status"] != "processing":
            return found
        assert time.monotonic() < deadline, found["jobs"]
        time.sleep(0.2)


def test_every_kind_of_step_ends_well(response: dict[str, Any]) -> None:
    assert {job["step"]: job["status"] for job in response["jobs"] if job["status"] != "done"} == {}
    assert response["status"] == "processed"


def test_each_result_is_of_its_kind(response: dict[str, Any]) -> None:
    results = response["results"]
    assert 1 <= len(results["summary"]["text"].split()) <= 21
    assert results["topic"]["label"] == "delivery"
    assert sum(results["topic"]["scores"].values()) == pytest.approx(1, abs=0.01)
    assert results["chosen"]["label"] in TOPICS
    assert results["facts"]["data"].keys() == {"order_number", "wants_reply"}
    assert results["mood"]["label"] == "negative"
    assert results["felt"]["label"] in SENTIMENTS
    assert results["german"]["language"] == "German"
    assert results["german"]["text"]
    assert math.hypot(*results["vector"]["vector"]) == pytest.approx(1, abs=1e-3)


def test_message_and_webhook_carry_what_the_model_wrote(stack: Stack, response: dict[str, Any]) -> None:
    results = response["results"]
    mail = stack.smtp.wait_for(lambda item: item.message["Message-ID"] == results["mail"]["message_id"]).message
    assert mail["Subject"] == results["mood"]["label"]
    assert results["summary"]["text"] in mail.get_content().replace("\r\n", "\n")
    told = stack.receiver.wait_for(lambda request: request.path == "/steps")
    assert results["hook"]["delivered"] is True
    assert orjson.loads(told.body)["data"]["results"]["german"] == results["german"]


def test_the_engine_shows_its_counters(stack: Stack, response: dict[str, Any]) -> None:
    with httpcore2.ConnectionPool(uds=str(stack.directory / "metrics-engine.sock")) as pool:
        shown = pool.request("GET", "http://localhost/metrics").content.decode()
    counted = [line for line in shown.splitlines() if line.startswith("quern_engine_results_total ")]
    assert counted
    assert float(counted[0].split()[1]) >= len(response["jobs"]) - 2


def test_what_was_embedded_is_found_by_its_meaning(stack: Stack, response: dict[str, Any]) -> None:
    db = stack.runtime.store.db
    owner = db.responses.find_one({"_id": response["id"]})
    assert owner is not None
    client = Client(stack.url, keys.create(db, owner["tenant"], "search")[1])
    question = {"text": "a late delivery in a damaged package", "include_answers": True}
    [hit] = client.call("POST", "/api/v1/search", question)["items"]
    assert (hit["response"], hit["step"]) == (response["id"], "vector")
    assert hit["answers"] == {"comment": COMMENT}
    assert hit["score"] > 0.3
    [like] = client.call("POST", "/api/v1/search", {"text": "how to bake bread"})["items"]
    assert like["score"] < hit["score"]
