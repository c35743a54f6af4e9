"""The description is true: it validates, its page is served from here, and fuzzing finds no answer outside of it."""

import re
from typing import Any

import hypothesis
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis.checks import CHECKS
from schemathesis.specs.openapi.checks import missing_required_header, positive_data_acceptance, unsupported_method

from quern import __version__
from quern.api.app import operations
from quern.api.openapi import describe
from tests.app.api.client import Client, House, until

FIELDS = [{"name": "comment", "type": "long_text"}, {"name": "score", "type": "number"}]
#: What is of the right shape may still be refused: an identifier may lead to nothing, a cursor is not for guessing.
#: nginx itself answers TRACE; and every case here has a key. Both are tested below and in test_operations.
_NOT_CHECKED = (positive_data_acceptance, unsupported_method, missing_required_header)
EXAMPLES = 12


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
    key = client.call("POST", "/keys", {"name": "fuzzed"}, status=201)["id"]
    return {"form": form, "response": response, "job": job, "key": key, "endpoint": endpoint}


schema = schemathesis.openapi.from_dict(describe(operations(), __version__))


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
        # A stream does not end; tests/app/events has its own.
        return
    if case.operation.method.upper() == "DELETE":
        known = {}
    for name in case.path_parameters or {}:
        # Every other case goes to something that is there.
        if name in known and len(str(case.body) + str(case.query)) % 2 == 0:
            case.path_parameters[name] = known[name]
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {client.key}"}
    case.call_and_validate(base_url=house.stack.url, excluded_checks=list(_NOT_CHECKED), timeout=60)


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
