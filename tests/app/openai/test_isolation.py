"""Every route of `/v1` with the identifiers of another tenant: nothing is found, and nothing changes."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from quart import Quart

from quern.events.app import create_app
from quern.runtime import Runtime
from tests.app.api.client import until
from tests.app.openai.conftest import CHAT, EMBEDDING, Lab

#: What each route is sent. Those that name something of a tenant's have its identifier in their path.
BODIES: dict[str, Any] = {
    "POST /v1/chat/completions": {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "POST /v1/completions": {"model": CHAT, "prompt": "Hi", "max_tokens": 1},
    "POST /v1/embeddings": {"model": EMBEDDING, "input": "Hi"},
    "POST /v1/responses": {"model": CHAT, "input": "Hi", "max_output_tokens": 1},
    "POST /v1/responses/<identity>/cancel": None,
    "POST /v1/files": None,
    "POST /v1/batches": {"endpoint": "/v1/responses", "completion_window": "24h"},
    "POST /v1/batches/<identity>/cancel": None,
}


def routes(lab: Lab) -> list[str]:
    """Every method and path below /v1."""
    runtime: Runtime = lab.stack.runtime

    async def nobody(_: str | None) -> None:
        return None

    app: Quart = create_app(runtime.live, nobody, runtime)
    return sorted(
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        if rule.rule.startswith("/v1/")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    )


@pytest.fixture(scope="module")
def mine(lab: Lab) -> Iterator[dict[str, str]]:
    """A tenant's key, and one of each of its things."""
    key = lab.key()
    client = lab.client(key)
    response = client.responses.create(
        model=CHAT, input="The secret is xylophone.", max_output_tokens=16, background=True, stream=True
    )
    identity = next(iter(response)).response.id  # type: ignore[union-attr]
    content = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"xylophone": 1}})
    file = client.files.create(file=("xylophone.jsonl", content.encode()), purpose="batch").id
    batch = client.batches.create(input_file_id=file, endpoint="/v1/responses", completion_window="24h")
    until(lambda: client.batches.retrieve(batch.id).status == "completed")
    until(lambda: client.responses.retrieve(identity).status != "in_progress")
    yield {"key": key, "responses": identity, "files": file, "batches": batch.id}


def state(lab: Lab, mine: dict[str, str]) -> Any:
    """All that is kept of the tenant that owns `mine`."""
    client = lab.client(mine["key"])
    return (
        client.responses.retrieve(mine["responses"]).model_dump_json(),
        client.files.content(mine["files"]).read(),
        client.batches.retrieve(mine["batches"]).model_dump_json(),
    )


def test_no_route_gives_a_stranger_anything_of_a_tenants(lab: Lab, mine: dict[str, str]) -> None:
    before, stranger = state(lab, mine), lab.plain(lab.key())
    visited = 0
    for route in routes(lab):
        method, path = route.split(" ")
        kind = path.split("/")[2]
        target = path.replace("<path:name>", CHAT).replace("<identity>", mine.get(kind, ""))
        body = BODIES.get(route)
        if route == "POST /v1/batches":
            body = {**BODIES[route], "input_file_id": mine["files"]}
        if route == "POST /v1/responses":
            body = {**BODIES[route], "previous_response_id": mine["responses"]}
        answer = stranger.send(method, f"/{target}", body)
        assert b"xylophone" not in answer.content, route
        if "<identity>" in path:
            assert answer.status == 404, route
            visited += 1
        elif method == "GET" and kind in ("files", "batches"):
            assert answer.json()["data"] == [], route
            # A cursor of another tenant's list opens nothing either.
            paged = stranger.send(method, f"/{target}?after={mine[kind]}")
            assert paged.json()["data"] == [], route
            visited += 1
        elif route in ("POST /v1/batches", "POST /v1/responses"):
            assert answer.status in (400, 404), route
            visited += 1
    assert visited >= 13
    assert state(lab, mine) == before


def test_no_route_opens_without_a_key(lab: Lab, mine: dict[str, str]) -> None:
    nobody = lab.plain(None)
    for route in routes(lab):
        method, path = route.split(" ")
        target = path.replace("<path:name>", CHAT).replace("<identity>", mine.get(path.split("/")[2], ""))
        answer = nobody.send(method, f"/{target}", BODIES[route] if method == "POST" else None)
        assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key"), route


def test_a_publishable_key_opens_no_route(lab: Lab) -> None:
    public = lab.client(lab.key(kind="publishable"))
    with pytest.raises(openai.PermissionDeniedError):
        public.models.list()
