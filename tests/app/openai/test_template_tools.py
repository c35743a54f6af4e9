"""A model whose template has tools: what it is told, what it calls, and what a client of OpenAI's sees of that.

The weights are the small model's own. It calls what it saw called before, so each conversation begins with such calls.
"""

import json
from typing import Any

import openai
import pytest

from quern.inference import llama
from quern.inference.chat import ChatTemplate
from quern.inference.protocol import Message
from quern.openai.tools import find_calls
from tests.app.openai.conftest import TAUGHT, Lab
from tests.app.openai.teaching import HERMES, LLAMA, MISTRAL

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather there", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time", "description": "The time there", "parameters": CITY}},
]
SEEN = (
    ("What is the weather in Paris?", "get_weather", "Paris", "sunny", "It is sunny in Paris."),
    ("What is the weather in Oslo?", "get_weather", "Oslo", "snow", "It snows in Oslo."),
    ("What time is it in Oslo?", "get_time", "Oslo", "12:00", "It is 12:00 in Oslo."),
    ("What is the weather in Madrid?", "get_weather", "Madrid", "rain", "It rains in Madrid."),
    ("What time is it in Athens?", "get_time", "Athens", "13:00", "It is 13:00 in Athens."),
)
#: Each token of the call to get_weather leads the next likeliest by 4 and more, where rounding moves them by 1.
ROME = "What is the weather in Rome?"


def conversation(question: str) -> list[Any]:
    """Calls that were made and answered, and then the question."""
    messages: list[Any] = []
    for number, (asked, name, city, result, answer) in enumerate(SEEN):
        function = {"name": name, "arguments": json.dumps({"city": city})}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": result},
            {"role": "assistant", "content": answer},
        ]
    return [*messages, {"role": "user", "content": question}]


def asked(question: str, **more: Any) -> dict[str, Any]:
    whole = {"model": TAUGHT, "messages": conversation(question), "tools": TOOLS, "max_tokens": 60, "temperature": 0}
    return whole | more


def test_a_model_calls_by_itself_and_the_call_is_read(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**asked(ROME)).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
    # Nothing of the form in which the model wrote it is left for the client.
    assert choice.message.content is None


def test_a_streamed_call_comes_whole(client: openai.OpenAI) -> None:
    usage = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked(ROME, stream=True, stream_options=usage)))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    [call] = [call for delta in deltas for call in delta.tool_calls or []]
    assert call.function
    assert (call.index, call.type, call.function.name) == (0, "function", "get_weather")
    assert json.loads(call.function.arguments or "") == {"city": "Rome"}
    assert call.id
    assert not any(delta.content for delta in deltas)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [
        "tool_calls"
    ]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens > 5


def test_the_clients_own_helper_puts_a_streamed_call_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**asked(ROME)) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Rome"})
    ]


def test_tool_choice_decides_over_the_model(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    for choice, names in (("required", {"get_weather", "get_time"}), (named, {"get_time"})):
        made = client.chat.completions.create(**asked(ROME, tool_choice=choice)).choices[0]
        [call] = made.message.tool_calls or []
        assert made.finish_reason == "tool_calls"
        assert call.type == "function"
        assert call.function.name in names
        assert set(json.loads(call.function.arguments)) == {"city"}
    none = client.chat.completions.create(**asked(ROME, tool_choice="none")).choices[0]
    assert not none.message.tool_calls
    assert none.finish_reason in ("stop", "length")


def test_responses_call_too(client: openai.OpenAI) -> None:
    items: list[Any] = []
    for message in conversation(ROME):
        calls = message.get("tool_calls") or []
        items += [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]
        if message["role"] == "tool":
            output = {"call_id": message["tool_call_id"], "output": message["content"]}
            items.append({"type": "function_call_output", **output})
        elif not calls:
            items.append({"role": message["role"], "content": message["content"]})
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    made = client.responses.create(
        model=TAUGHT, input=items, tools=tools, max_output_tokens=60, temperature=0, store=False
    )
    [call] = made.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Rome"})


@pytest.fixture(scope="module")
def model(lab: Lab) -> llama.Model:
    return llama.Model(lab.taught)


@pytest.mark.parametrize(
    ("family", "before", "written"),
    [
        (HERMES, "<tools>", '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'),
        (LLAMA, "functions are yours:", '{"name": "get_time", "parameters": {"city": "Rome"}}'),
        (MISTRAL, "[AVAILABLE_TOOLS]", '[TOOL_CALLS] [{"name": "get_time", "arguments": {"city": "Rome"}}]'),
    ],
    ids=["hermes", "llama", "mistral"],
)
def test_each_familys_template_is_told_of_tools_and_its_calls_are_read(
    model: llama.Model, family: str, before: str, written: str
) -> None:
    template = ChatTemplate(family, model.vocabulary)
    assert template.knows_tools
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}
    messages = [
        Message(role="user", content="The time?"),
        Message(role="assistant", tool_calls=[call]),
        Message(role="tool", content="12:00", tool_call_id="c"),
        Message(role="user", content="And now?"),
    ]
    tokens = template.tokens(messages, TOOLS)
    prompt = b"".join(model.vocabulary.piece(token, control=True) for token in tokens).decode()
    told = prompt[prompt.index(before) :]
    for name in ("get_weather", "get_time", "The weather there", "maxLength"):
        assert name in told
    # The earlier call stands there in the very form that is read when the model writes it.
    assert written in prompt
    calls, rest = find_calls(written, {"get_weather", "get_time"})
    assert [(one.name, json.loads(one.arguments)) for one in calls] == [("get_time", {"city": "Rome"})]
    assert not rest
    assert "12:00" in prompt
