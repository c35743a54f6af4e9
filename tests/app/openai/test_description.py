"""What `/api/openapi.json` says of `/v1` is so: its routes, scopes, requests, answers and errors."""

import json
import os
import re
from typing import Any

import hypothesis
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    missing_required_header,
    positive_data_acceptance,
    unsupported_method,
)

from quern import __version__
from quern.api.app import operations
from quern.api.openapi import describe
from quern.openai.endpoints import ENDPOINTS, READ, USE, WRITE, Endpoint
from tests.app.api.client import Answer, Client, until
from tests.app.openai.conftest import CHAT, EMBEDDING, Lab
from tests.app.openai.test_isolation import routes

DESCRIPTION = describe(operations(), __version__)
NOBODY = {"model": "gpt-99", "response": "resp_x", "file": "file-x", "batch": "batch_x"}
#: As in tests/app/api/test_openapi.py; and what is of the right shape goes to a model that does not exist: 404.
_NOT_CHECKED = (positive_data_acceptance, unsupported_method, missing_required_header, ignored_auth)
schema: BaseSchema = schemathesis.openapi.from_dict(DESCRIPTION).include(path_regex="^/v1/")
#: Their texts may have a million characters, and the fuzzer sends more: test_fuzz changes these bodies in small.
schema = schema.exclude(method="POST", path_regex="completions$|embeddings$|responses$")


def judge(schema: dict[str, Any], value: Any) -> None:
    """Raises ValidationError unless `value` is what the description says."""
    Draft202012Validator({**schema, "components": DESCRIPTION["components"]}).validate(value)


def judge_answer(endpoint: Endpoint, answer: Answer) -> None:
    described = DESCRIPTION["paths"][f"/v1{endpoint.path}"][endpoint.method.lower()]["responses"][str(answer.status)]
    kind = answer.headers["content-type"].split(";")[0]
    assert kind in described["content"], endpoint
    if kind == "application/json":
        judge(described["content"][kind]["schema"], answer.json())
    if kind == "text/event-stream":
        assert endpoint.event
        events = re.findall(r"^data: (.*)$", answer.content.decode(), flags=re.MULTILINE)
        assert len(events) > 2
        for event in events:
            if event != "[DONE]":
                judge({"$ref": f"#/components/schemas/{endpoint.event.__name__}"}, json.loads(event))


def send(client: Client, endpoint: Endpoint, body: Any = None, query: str = "", **names: str) -> Answer:
    return client.send(endpoint.method, f"//v1{endpoint.path.format(**{**NOBODY, **names})}{query}", body)


def test_the_description_names_every_route_and_no_other(lab: Lab) -> None:
    described = {
        f"{method.upper()} {re.sub('{[a-z]+}', '<>', path)}"
        for path, methods in DESCRIPTION["paths"].items()
        if path.startswith("/v1/")
        for method in methods
    }
    assert described == {re.sub("<[a-z:]+>", "<>", route) for route in routes(lab)}


@pytest.mark.parametrize("scope", [USE, READ, WRITE])
def test_each_route_takes_the_described_scope_and_no_other(lab: Lab, scope: str) -> None:
    with_it = lab.plain(lab.key(scopes=[scope]))
    without = lab.plain(lab.key(scopes=sorted({USE, READ, WRITE} - {scope})))
    for endpoint in ENDPOINTS:
        if endpoint.scope == scope:
            refused, taken = send(without, endpoint), send(with_it, endpoint)
            assert refused.status == 403, endpoint
            judge_answer(endpoint, refused)
            assert taken.status in (200, 400, 404), endpoint
            judge_answer(endpoint, taken)


def test_only_what_becomes_a_job_takes_an_idempotency_key(lab: Lab) -> None:
    plain = lab.plain(lab.key())
    for endpoint in ENDPOINTS:
        described = DESCRIPTION["paths"][f"/v1{endpoint.path}"][endpoint.method.lower()]["parameters"]
        assert ("Idempotency-Key" in {one["name"] for one in described}) == endpoint.is_job
    body = {"model": EMBEDDING, "input": "x"}
    answer = plain.send("POST", "//v1/embeddings", body, headers={"Idempotency-Key": "k" * 256})
    assert (answer.status, "Idempotency-Key" in answer.json()["error"]["message"]) == (400, True)


def test_every_route_answers_in_its_described_shape(lab: Lab) -> None:
    key = lab.key()
    plain, client, seen = lab.plain(key), lab.client(key), set()
    tool = {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}}}
    said = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    called = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required", "max_tokens": 64}
    text = {"model": CHAT, "prompt": "One, two", "max_tokens": 3}
    asked = {"model": CHAT, "input": "Hi", "max_output_tokens": 3}
    measured = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    forced = {"tools": [{"type": "function", **tool}], "tool_choice": "required", "max_output_tokens": 64}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": asked})
    file = client.files.create(file=("a.jsonl", line.encode()), purpose="batch").id
    response = client.responses.create(**asked).id  # type: ignore[call-overload]

    def visit(method: str, path: str, body: Any = None, query: str = "", **names: str) -> Any:
        [endpoint] = [one for one in ENDPOINTS if (one.method, one.path) == (method, path)]
        answer = send(plain, endpoint, body, query, **names)
        assert answer.status == 200, (endpoint, answer.content)
        judge_answer(endpoint, answer)
        seen.add(endpoint)
        return answer.json() if "json" in answer.headers["content-type"] else answer.content

    visit("GET", "/models")
    visit("GET", "/models/{model}", model=CHAT)
    for more in ({}, {"logprobs": True, "top_logprobs": 2, "n": 2}, called):
        visit("POST", "/chat/completions", {**said, **more})
        visit("POST", "/chat/completions", {**said, **more, **usage})
    for more in ({}, {"logprobs": 2}):
        visit("POST", "/completions", {**text, **more})
        visit("POST", "/completions", {**text, **more, **usage})
    for form in ("float", "base64"):
        visit("POST", "/embeddings", {"model": EMBEDDING, "input": ["a", "b"], "encoding_format": form})
    for more in ({}, measured, forced):
        visit("POST", "/responses", {**asked, **more})
        visit("POST", "/responses", {**asked, **more, "stream": True})
    waiting = visit("POST", "/responses", {**asked, "background": True})["id"]
    visit("GET", "/responses/{response}", response=waiting)
    cancelled = visit("POST", "/responses", {**asked, "background": True, "max_output_tokens": 1000})["id"]
    visit("POST", "/responses/{response}/cancel", response=cancelled)
    visit("GET", "/responses/{response}/input_items", query="?limit=1&order=asc", response=response)
    visit("DELETE", "/responses/{response}", response=response)
    batch = visit("POST", "/batches", {"input_file_id": file, "endpoint": "/v1/responses", "completion_window": "24h"})
    until(lambda: visit("GET", "/batches/{batch}", batch=batch["id"])["status"] == "completed")
    visit("GET", "/batches")
    broken = client.files.create(file=("b.jsonl", b"no json"), purpose="batch").id
    doomed = visit(
        "POST", "/batches", {"input_file_id": broken, "endpoint": "/v1/responses", "completion_window": "24h"}
    )
    until(lambda: visit("GET", "/batches/{batch}", batch=doomed["id"])["status"] == "failed")
    other = visit("POST", "/batches", {"input_file_id": file, "endpoint": "/v1/responses", "completion_window": "24h"})
    [cancel] = [one for one in ENDPOINTS if one.path == "/batches/{batch}/cancel"]
    # It may have ended by then, which is a described answer, too.
    stopped = send(plain, cancel, batch=other["id"])
    judge_answer(cancel, stopped)
    assert stopped.status in (200, 409)
    seen.add(cancel)
    assert {one["purpose"] for one in visit("GET", "/files")["data"]} >= {"batch", "batch_output"}
    visit("GET", "/files/{file}", file=file)
    assert visit("GET", "/files/{file}/content", file=file) == line.encode()
    visit("DELETE", "/files/{file}", file=file)
    upload = next(one for one in ENDPOINTS if (one.method, one.path) == ("POST", "/files"))
    made = client.files.with_raw_response.create(file=("c.txt", b"x"), purpose="user_data", expires_after=EXPIRY)
    judge_answer(upload, Answer(made.http_response.status_code, dict(made.http_response.headers), made.content))
    assert seen | {upload} == set(ENDPOINTS)


EXPIRY: Any = {"anchor": "created_at", "seconds": 3600}


@schema.parametrize()
@hypothesis.settings(
    max_examples=int(os.environ.get("QUERN_FUZZ_EXAMPLES", "5")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_no_route_answers_outside_its_description(case: Any, lab: Lab, fuzzed: str) -> None:
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {fuzzed}"}
    answer = case.call_and_validate(base_url=lab.stack.url, excluded_checks=list(_NOT_CHECKED), timeout=60)
    assert answer.status_code != 500


@pytest.fixture(scope="module")
def fuzzed(lab: Lab) -> str:
    """A key of a tenant of its own."""
    return lab.key()
