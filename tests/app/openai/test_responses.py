"""`/v1/responses` with the real client: plain, streamed, in the background, resumed, cancelled, deleted, continued."""

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.app.api.client import until
from tests.app.openai.conftest import CHAT, Lab

LONG = "Write a long story about the sea, with many chapters."


class Person(BaseModel):
    name: str
    age: int


def numbers(events: list[Any]) -> list[int]:
    return [event.sequence_number for event in events]


def text_of(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def ended(client: openai.OpenAI, identity: str) -> Any:
    """A response, once it has ended."""

    def look() -> Any:
        found = client.responses.retrieve(identity)
        return None if found.status in ("queued", "in_progress") else found

    return until(look)


def test_a_response_is_kept_and_can_be_read_again(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model=CHAT,
        input=LONG,
        instructions="Be a poet.",
        max_output_tokens=6,
        temperature=0,
        metadata={"order": "4711"},
    )
    assert made.output_text
    found = client.responses.retrieve(made.id)
    assert found.output_text == made.output_text
    assert (found.instructions, found.metadata) == ("Be a poet.", {"order": "4711"})
    assert made.usage is not None
    assert made.usage.output_tokens == 6
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"


def test_one_that_is_not_stored_cannot_be_read_again(client: openai.OpenAI) -> None:
    made = client.responses.create(model=CHAT, input="Say hi.", max_output_tokens=16, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_the_events_of_a_stream_are_numbered_and_end_with_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model=CHAT, input="Ann is 7.", text_format=Person, max_output_tokens=60) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert numbers(events) == list(range(len(events)))
    assert text_of(events) == final.output_text
    assert isinstance(final.output_parsed, Person)


def test_an_answer_in_a_format_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=CHAT, input="Ann is 7.", text_format=Person, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Person)


def test_a_background_response_is_answered_later(client: openai.OpenAI) -> None:
    made = client.responses.create(model=CHAT, input="Say hi.", max_output_tokens=16, background=True)
    assert made.status == "queued"
    assert ended(client, made.id).output_text


def test_a_broken_stream_goes_on_after_the_last_event_seen(lab: Lab, client: openai.OpenAI) -> None:
    seen: list[Any] = []
    stream = client.responses.create(
        model=CHAT, input=LONG, max_output_tokens=100, temperature=0, background=True, stream=True
    )
    for event in stream:
        seen.append(event)
        if event.sequence_number == 8:
            break
    stream.close()
    identity = seen[0].response.id
    rest = list(client.responses.retrieve(identity, stream=True, starting_after=8))
    assert numbers(seen + rest) == list(range(len(seen) + len(rest)))
    assert text_of(seen + rest) == client.responses.retrieve(identity).output_text
    # Long after, when nothing is on its way any more, it is told in the same pieces.
    assert lab.forget_stream(identity)
    again = list(client.responses.retrieve(identity, stream=True, starting_after=5))
    assert [(event.sequence_number, event.type) for event in again] == [
        (event.sequence_number, event.type) for event in (seen + rest)[6:]
    ]
    assert text_of(again) == text_of((seen + rest)[6:])


def test_a_background_response_can_be_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model=CHAT, input=LONG, max_output_tokens=2000, background=True)
    until(lambda: client.responses.retrieve(made.id).status == "in_progress")
    client.responses.cancel(made.id)
    assert ended(client, made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"
    done = client.responses.create(model=CHAT, input="Say hi.", max_output_tokens=16)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(done.id)


def test_a_conversation_goes_on_from_the_response_before(lab: Lab, client: openai.OpenAI) -> None:
    first = client.responses.create(model=CHAT, input="My name is Zebulon.", max_output_tokens=16)
    alone = client.responses.create(model=CHAT, input="What is my name?", max_output_tokens=16)
    second = client.responses.create(
        model=CHAT, input="What is my name?", max_output_tokens=16, previous_response_id=first.id
    )
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert alone.usage is not None
    assert second.usage.input_tokens >= alone.usage.input_tokens + 8
    with pytest.raises(openai.NotFoundError) as caught:
        lab.client().responses.create(model=CHAT, input="And?", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


def test_a_deleted_response_is_gone_with_what_was_asked(lab: Lab, client: openai.OpenAI) -> None:
    made = client.responses.create(model=CHAT, input="The secret is xylophone.", max_output_tokens=16)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    core = made.id.removeprefix("resp_")
    assert lab.db.ai_requests.find_one({"_id": f"air_{core}"}) is None
    assert "xylophone" not in str(list(lab.db.jobs.find({"subject": f"air_{core}"})))
    actions = [entry["action"] for entry in lab.db.audit.find({"subject": made.id})]
    assert sorted(actions) == ["ai_response.created", "ai_response.deleted"]


def test_input_items_are_listed_a_page_at_a_time(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": f"Turn {number}."} for number in range(5)]
    made = client.responses.create(model=CHAT, input=turns, max_output_tokens=16)
    found: list[Any] = list(client.responses.input_items.list(made.id, limit=2, order="asc"))
    assert [item.content[0].text for item in found] == [f"Turn {number}." for number in range(5)]


TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_call_is_an_item_and_its_output_is_answered(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "tools": [TOOL], "max_output_tokens": 60}
    made = client.responses.create(**asked, input="The weather in Paris?", tool_choice="required")
    [call] = made.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    told = client.responses.create(**asked, input=[output], previous_response_id=made.id, tool_choice="none")
    assert told.output_text
    events = list(client.responses.create(**asked, input="And in Rome?", tool_choice="required", stream=True))
    kinds = [event.type for event in events]
    assert kinds[2:6] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert numbers(events) == list(range(len(events)))


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "web_search"}]},
        {"reasoning": {"effort": "high"}},
        {"conversation": "conv_1"},
        {"background": True, "store": False},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
        {"truncation": "auto"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, changes: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", cast_to=object, body={"model": CHAT, "input": "Hi"} | changes)
    assert caught.value.code in ("unsupported_parameter", "invalid_value", "missing_required_parameter")
