"""No body brings down `/v1`: each is answered, or refused in the form that clients know."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quern.openai.request import BODIES, ENDPOINTS, BatchBody
from tests.app.openai.conftest import Lab
from tests.app.openai.test_description import judge

#: Whole but for the model, which does not exist: what is sound is a 404, and nothing is ever carried out.
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
BASES: dict[str, Any] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "logit_bias": {"1": 1},
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {"prompt": ["x"], "stop": ["y"], "logprobs": 1},
    "/v1/embeddings": {"input": ["x"], "encoding_format": "float", "dimensions": 3},
    "/v1/responses": {
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}],
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "metadata": {"a": "b"},
    },
    "/v1/batches": {"input_file_id": "file-x", "endpoint": "/v1/responses", "completion_window": "24h"},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def changed(part: Any, path: list[int], value: Any) -> Any:
    """A copy in which something, found by following `path`, is `value`."""
    if not path or not isinstance(part, dict | list) or not part:
        return value
    if isinstance(part, list):
        place = path[0] % len(part)
        return [changed(item, path[1:], value) if index == place else item for index, item in enumerate(part)]
    name = sorted(part)[path[0] % len(part)]
    return {key: changed(item, path[1:], value) if key == name else item for key, item in part.items()}


@pytest.mark.parametrize("route", BASES)
def test_any_body_gets_a_refusal_in_the_known_form(lab: Lab, route: str) -> None:
    plain = lab.plain(lab.key())
    model = BatchBody if route == "/v1/batches" else BODIES[ENDPOINTS[route]]
    names = st.sampled_from(sorted(model.model_json_schema()["properties"]))
    base = BASES[route] if route == "/v1/batches" else {"model": "gpt-99", **BASES[route]}
    assert plain.send("POST", f"/{route}", base).status == (400 if route == "/v1/batches" else 404)

    @settings(max_examples=50, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, 9), max_size=6), JSON, st.lists(st.tuples(names, JSON), max_size=2))
    def check(path: list[int], value: Any, further: list[tuple[str, Any]]) -> None:
        body = changed(base, path, value)
        if isinstance(body, dict):
            body = {**body, **{name: other for name, other in further if name != "model"}}
        try:
            answer = plain.send("POST", f"/{route}", body)
        except TypeError:
            # A number that the test's own encoder does not write.
            return
        assert answer.status in (400, 404), (answer.status, answer.content[:500])
        judge({"$ref": "#/components/schemas/ApiFailure"}, answer.json())

    check()


def test_a_body_nested_deeply_is_refused(lab: Lab) -> None:
    plain = lab.plain(lab.key())
    before = b'{"model":"smollm2-135m-instruct-q4_1","input":"x","text":{"format":{"type":"json_schema","name":"x",'
    for depth in (200, 900, 5000):
        deep = b'{"type":"object","properties":{"a":' * depth + b"{}" + b"}}" * depth
        answer = plain.send("POST", "//v1/responses", raw=before + b'"schema":' + deep + b"}}}")
        assert answer.status == 400, answer.content[:300]
