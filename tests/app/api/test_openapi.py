"""The description is true: it validates, its page is served from here, and fuzzing finds no answer outside of it."""

import copy
import json
import os
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import orjson
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis.checks import CHECKS, not_a_server_error
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
from tests.app.api.client import Client, House, Json, until

FIELDS = [{"name": "comment", "type": "long_text"}, {"name": "score", "type": "number"}]
#: What is of the right shape may still be refused: an identifier may lead to nothing, a cursor is not for guessing.
#: nginx itself answers TRACE; and every case here has a key. Both are tested below and in test_operations.
_NOT_CHECKED = (positive_data_acceptance, unsupported_method, missing_required_header, ignored_auth)
#: For each route; more by hand.
EXAMPLES = int(os.environ.get("QUERN_FUZZ_EXAMPLES", "5"))


@pytest.fixture(scope="module")
def client(house: House) -> Client:
    return house.client()


@pytest.fixture(scope="module")
def known(client: Client, house: House) -> dict[str, str]:
    """Path parameters that lead to something, so that the fuzzer gets past the 404."""
    endpoint = client.call("POST", "/webhooks", {"url": f"{house.stack.receiver.url}/fuzz"}, status=201)["id"]
    form = client.form(FIELDS, [{"name": "mood", "type": "sentiment"}])
    response = client.submit(form, {"comment": "for the fuzzer"})
    job = client.call("GET", f"/responses/{response}")["jobs"][0]["id"]
    ended = client.call("GET", f"/responses/{client.submit(form, {'comment': 'ended'})}")["jobs"][0]["id"]
    until(lambda: client.send("POST", f"/jobs/{ended}/cancel").status == 202)
    until(lambda: client.call("GET", f"/jobs/{ended}")["status"] == "cancelled")
    key = client.call("POST", "/keys", {"name": "fuzzed"}, status=201)["id"]
    return {"form": form, "response": response, "job": job, "ended": ended, "key": key, "endpoint": endpoint}


DESCRIPTION = describe(operations(), __version__)
#: Their bodies nest without end, and the fuzzer takes minutes to make a few; they have a fuzzer of their own below.
_DRAFTS = [("POST", "/api/v1/forms"), ("PUT", "/api/v1/forms/{form}")]
schema: BaseSchema = schemathesis.openapi.from_dict(DESCRIPTION)
for _method, _path in _DRAFTS:
    schema = schema.exclude(method=_method, path=_path)
#: This house has no engine: tests/app/openai/test_description.py holds `/v1` to the description, with one.
schema = schema.exclude(path_regex="^/v1/")


@schema.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_no_route_answers_outside_its_description(
    case: Any, client: Client, house: House, known: dict[str, str]
) -> None:
    if case.path.endswith("/events"):
        # The stream of a job that has ended, ends.
        known = {"job": known["ended"]}
    if case.operation.method.upper() == "DELETE":
        known = {}
    for name in case.path_parameters or {}:
        # Every other case goes to something that is there.
        if name in known and len(str(case.body) + str(case.query)) % 2 == 0:
            case.path_parameters[name] = known[name]
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {client.key}"}
    # This house has no engine, and a search by text says so with its 503.
    excluded = [*_NOT_CHECKED, *([not_a_server_error] if case.path.endswith("/search") else [])]
    answer = case.call_and_validate(base_url=house.stack.url, excluded_checks=excluded, timeout=60)
    assert answer.status_code != 500


SOUND: Json = {
    "name": "sound",
    "fields": [
        {"name": "a", "type": "text", "required": True, "max_length": 50, "pattern": "[a-z]{1,9}"},
        {"name": "b", "type": "choice", "options": [{"value": "x"}, {"value": "y", "label": "Y"}]},
        {"name": "c", "type": "date", "earliest": "2026-01-01"},
        {"name": "d", "type": "number", "minimum": 0, "integer": True},
        {"name": "e", "type": "email"},
        {"name": "g", "type": "group", "repeated": True, "max_items": 3, "fields": [{"name": "h", "type": "rating"}]},
    ],
    "workflow": {
        "steps": [
            {"name": "mood", "type": "sentiment", "deadline_seconds": 60},
            {"name": "facts", "type": "extract", "json_schema": {"type": "object", "properties": {"x": {}}}},
            {
                "name": "mail",
                "type": "email",
                "needs": ["mood"],
                "when": {"all": [{"path": "results.mood.label", "op": "eq", "value": "bad"}]},
                "to": {"field": "e"},
                "subject": "{{ answers.a }}",
                "body": "b",
            },
        ]
    },
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for name, part in members for inner in _places(part, (*place, name)))]


@st.composite
def drafts(draw: st.DrawFn) -> Any:
    """A sound draft with one to three places replaced, removed or added to."""
    body = copy.deepcopy(SOUND)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(_places(body)[1:]))
        parent: Any = body
        for name in way:
            parent = parent[name]
        act = draw(st.sampled_from(["replace", "remove", "add"]))
        if act == "remove":
            del parent[last]
        elif act == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=10))] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
    return body


@pytest.mark.parametrize(("method", "path"), _DRAFTS)
def test_no_draft_is_answered_outside_the_description(
    client: Client, known: dict[str, str], method: str, path: str
) -> None:
    described = DESCRIPTION["paths"][path][method.lower()]["responses"]
    judges = {
        int(status): Draft202012Validator(
            {**next(iter(answer["content"].values()))["schema"], "components": DESCRIPTION["components"]}
        )
        for status, answer in described.items()
    }
    target = path.removeprefix("/api/v1").format(form=known["form"])
    seen = set()

    @hypothesis.settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @hypothesis.example(SOUND)
    @hypothesis.given(drafts() | VALUES)
    def check(body: Any) -> None:
        try:
            raw = orjson.dumps(body)
        except orjson.JSONEncodeError:
            # Beyond what this encoder writes: another one's words for the same.
            raw = json.dumps(body).encode()
        answer = client.send(method, target, raw=raw)
        seen.add(answer.status)
        assert answer.status in judges, (answer.status, answer.content, body)
        assert answer.status < 500
        judges[answer.status].validate(answer.json())

    check()
    assert seen >= {201 if method == "POST" else 200, 422}


PATHS = sorted({operation.path for operation in operations() if operation.served_by == "api"})


@pytest.mark.parametrize("path", PATHS)
def test_a_path_takes_its_documented_methods_only_and_says_which(client: Client, house: House, path: str) -> None:
    documented = {operation.method for operation in operations() if operation.path == path}
    documented |= {"HEAD"} if "GET" in documented else set()
    direct = house.direct(client.key)
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} - documented:
        answer = direct.send(method, path)
        assert answer.status == 405, (method, path)
        assert set(answer.headers["allow"].split(", ")) == documented
        assert answer.headers["content-type"] == "application/problem+json"


def test_the_fuzzer_checks_what_it_can() -> None:
    assert {check.__name__ for check in CHECKS.get_all()} >= {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    }


def test_the_description_is_a_valid_openapi_3_1(client: Client) -> None:
    described = client.with_key(None).call("GET", "//api/openapi.json")
    assert described == describe(operations(), __version__)
    assert described["openapi"] == "3.1.0"
    judge = schemathesis.openapi.from_dict(described)
    judge.validate()
    for name, model in described["components"]["schemas"].items():
        Draft202012Validator.check_schema(model)
        assert name
    described_ones = [operation for methods in described["paths"].values() for operation in methods.values()]
    identifiers = [operation["operationId"] for operation in described_ones]
    assert len(set(identifiers)) == len(identifiers) > 25
    for operation in described_ones:
        assert operation["summary"]
        assert "401" in operation["responses"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', str(described).replace("'", '"')))
    assert references <= described["components"]["schemas"].keys()


def test_the_page_to_try_it_comes_whole_from_this_server(client: Client) -> None:
    page = client.with_key(None).send("GET", "//api/docs/")
    assert page.status == 200
    text = page.content.decode()
    linked = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert linked
    for link in linked:
        assert not link.startswith(("http:", "https:", "//")), link
        asset = client.with_key(None).send("GET", "/" + (link if link.startswith("/") else f"/api/docs/{link}"))
        assert asset.status == 200, link
        assert asset.content
    assert "/api/openapi.json" in text


def test_health_is_told_without_a_key_and_metrics_are_not_told_outside(client: Client, house: House) -> None:
    nobody = client.with_key(None)
    assert nobody.call("GET", "//healthz")["status"] == "ok"
    until(lambda: nobody.send("GET", "//readyz").json() == {"status": "ready", "problems": []})
    assert nobody.send("GET", "//metrics").status == 404
    assert house.direct().send("GET", "//metrics").status == 200
