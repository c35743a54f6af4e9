"""Webhooks of background responses and batches, as OpenAI's client unwraps them."""

from typing import Any

import openai
import pytest

from tests.app.api.client import until
from tests.app.openai.conftest import CHAT, Lab
from tests.app.openai.test_batches import chat, line, start


def received(lab: Lab, path: str, identity: str) -> list[Any]:
    """The deliveries to `path` that speak of `identity`."""
    return [one for one in lab.stack.receiver.requests if one.path == path and identity.encode() in one.body]


def test_the_end_of_a_background_response_is_told_and_signed(lab: Lab, client: openai.OpenAI) -> None:
    path = f"/openai/{client.api_key[-8:]}"
    plain = lab.plain(client.api_key)
    types = [f"response.{end}" for end in ("completed", "failed", "cancelled", "incomplete")] + ["batch.completed"]
    endpoint = plain.call(
        "POST", "/webhooks", {"url": f"{lab.stack.receiver.url}{path}", "event_types": types}, status=201
    )
    secret = endpoint["secret"]
    story: dict[str, Any] = {"model": CHAT, "input": "Tell a long story.", "temperature": 0, "background": True}
    cut = client.responses.create(**story, max_output_tokens=5)
    long = client.responses.create(**story, max_output_tokens=3000)
    whole = client.responses.create(
        model=CHAT, input="Is it day?", background=True, text=in_form({"enum": ["yes", "no"]}), max_output_tokens=40
    )
    never = {"type": "integer", "minimum": 9, "maximum": 8}
    broken = client.responses.create(
        model=CHAT, input="A number?", background=True, text=in_form(never), max_output_tokens=40
    )
    client.responses.cancel(long.id)
    batch = start(client, [line("a", chat("x"))])
    for identity, kind in [
        (cut.id, "response.incomplete"),
        (long.id, "response.cancelled"),
        (whole.id, "response.completed"),
        (broken.id, "response.failed"),
        (batch, "batch.completed"),
    ]:
        [delivery] = until(lambda identity=identity: received(lab, path, identity), 240)  # type: ignore[misc]
        event: Any = client.webhooks.unwrap(delivery.body, dict(delivery.headers.items()), secret=secret)
        assert (event.type, event.data.id) == (kind, identity)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(delivery.body + b" ", dict(delivery.headers.items()), secret=secret)


def in_form(answer: dict[str, Any]) -> Any:
    """The format of an object whose `answer` fits a schema."""
    schema = {
        "type": "object",
        "properties": {"answer": answer},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
