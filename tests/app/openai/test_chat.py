"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` with the real client and real models."""

import base64
import math
import socket
import struct
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.app.openai.conftest import CHAT, EMBEDDING, TAUGHT, Lab

QUESTION: list[Any] = [{"role": "user", "content": "Name three colours."}]


class Person(BaseModel):
    name: str
    age: int


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {CHAT, EMBEDDING, TAUGHT}
    assert client.models.retrieve(CHAT).owned_by == "quern"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-99")


def test_a_streamed_answer_is_the_whole_one_in_pieces(lab: Lab, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [text] == lab.answered(chunks[0].id)
    assert [whole.choices[0].message.content] == lab.answered(whole.id)
    assert len(chunks) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_choices_differ_and_begin_alike_with_the_same_seed(lab: Lab, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "messages": QUESTION, "max_tokens": 12, "n": 6, "seed": 7}
    made = client.chat.completions.create(**asked)
    first = [choice.message.content or "" for choice in made.choices]
    assert len(set(first)) >= 5
    streamed = [""] * 6
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == lab.answered(chunk.id)
    # Sequences that are decoded together may differ in the last bits from others, so one may go another way.
    assert sum(one[:3] == other[:3] for one, other in zip(first, streamed, strict=True)) >= 3


def test_log_probabilities_name_the_chosen_tokens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "messages": QUESTION, "max_tokens": 6, "temperature": 0, "logprobs": True}
    choice = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content
    # The likeliest token is chosen at temperature 0.
    assert all(token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob <= 0 for token in tokens)
    streamed = list(client.chat.completions.create(**asked, stream=True))
    told = [
        token.token
        for chunk in streamed
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert len(told) == 6
    assert "".join(told) == "".join(chunk.choices[0].delta.content or "" for chunk in streamed)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    stopped = client.chat.completions.create(**asked, stop=[" ", "\n"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content
    assert " " not in stopped.message.content


def test_a_biased_token_is_never_chosen(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "messages": QUESTION, "max_tokens": 1, "temperature": 0}
    first = client.chat.completions.create(**asked).choices[0].message.content
    biased = client.chat.completions.create(**asked, logit_bias={str(token): -100 for token in range(9, 40)})
    assert first == "1"
    assert biased.choices[0].message.content != "1"


def test_an_answer_in_a_format_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Ann is 7 years old. Who is it?"}]
    parsed = client.chat.completions.parse(model=CHAT, messages=messages, response_format=Person, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    answer = client.chat.completions.create(
        model=CHAT, messages=messages, response_format={"type": "json_object"}, max_tokens=60
    )
    assert (answer.choices[0].message.content or "").strip().startswith("{")


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"place": {"$ref": "#/$defs/place"}},
                "required": ["place"],
                "additionalProperties": False,
                "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
                                    "required": ["city"], "additionalProperties": False}},
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]  # fmt: skip


def test_a_forced_call_is_a_call_whole_and_streamed(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: dict[str, Any] = {"model": CHAT, "messages": messages, "tools": TOOLS, "max_tokens": 60, "temperature": 0}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    choice = client.chat.completions.create(**asked, tool_choice=named).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert '"city"' in call.function.arguments
    chunks = list(client.chat.completions.create(**asked, tool_choice=named, stream=True))
    calls = [found for chunk in chunks for found in chunk.choices[0].delta.tool_calls or []]
    assert [found.function and found.function.name for found in calls] == ["get_weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The call and what it gave go back as turns of the conversation.
    again: list[Any] = [*messages, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 °C"}]
    answer = client.chat.completions.create(model=CHAT, messages=again, tools=TOOLS, max_tokens=16)
    assert answer.choices[0].message.content


def test_plain_completions_echo_and_count(lab: Lab, client: openai.OpenAI) -> None:
    made = client.completions.create(model=CHAT, prompt=["Once upon", "Two and"], max_tokens=6, echo=True, n=2)
    assert [choice.text[:9].startswith(("Once upon", "Two and")) for choice in made.choices] == [True] * 4
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    probabilities = client.completions.create(model=CHAT, prompt="Once upon a", max_tokens=4, logprobs=2)
    told = probabilities.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or []) == probabilities.choices[0].text
    pieces = list(client.completions.create(model=CHAT, prompt="Once upon a", max_tokens=4, stream=True))
    assert ["".join(piece.choices[0].text for piece in pieces)] == lab.answered(pieces[0].id)


def test_embeddings_are_the_same_as_numbers_and_in_base64(lab: Lab, client: openai.OpenAI) -> None:
    made = client.embeddings.create(model=EMBEDDING, input=["a cat", "a kitten", "a tax form"])
    cat, kitten, form = (item.embedding for item in made.data)
    assert len(cat) == 384
    assert sum(x * y for x, y in zip(cat, kitten, strict=True)) > sum(x * y for x, y in zip(cat, form, strict=True))
    numbers = client.embeddings.create(model=EMBEDDING, input="a cat", encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(cat, abs=1e-6)
    assert numbers.usage.prompt_tokens > 0
    raw = lab.plain(client.api_key).send(
        "POST", "//v1/embeddings", {"model": EMBEDDING, "input": "a cat", "encoding_format": "base64"}
    )
    packed = base64.b64decode(raw.json()["data"][0]["embedding"])
    assert struct.unpack("<384f", packed) == pytest.approx(cat, abs=1e-6)


def test_fewer_dimensions_are_the_first_ones_scaled_to_length_1(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model=EMBEDDING, input="a cat").data[0].embedding
    short = client.embeddings.create(model=EMBEDDING, input="a cat", dimensions=8).data[0].embedding
    length = math.sqrt(sum(x * x for x in whole[:8]))
    assert short == pytest.approx([x / length for x in whole[:8]], abs=1e-5)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=EMBEDDING, input="a cat", dimensions=385)


@pytest.mark.parametrize(
    ("changes", "kind", "param", "code"),
    [
        ({"model": "gpt-99"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        ({"max_tokens": 60_000}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"max_tokens": 60_000, "stream": True}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"functions": []}, openai.BadRequestError, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://x"}}}},
         openai.BadRequestError, None, "invalid_value"),
        ({"tool_choice": "required"}, openai.BadRequestError, None, "invalid_value"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_request_gets_the_error_that_clients_know(
    client: openai.OpenAI, changes: dict[str, Any], kind: type[openai.APIStatusError], param: str | None, code: str
) -> None:
    asked = {"model": CHAT, "messages": QUESTION, "max_tokens": 4} | changes
    with pytest.raises(kind) as caught:
        client.post("/chat/completions", cast_to=object, body=asked)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id


def test_a_key_opens_what_its_scopes_say(lab: Lab) -> None:
    with pytest.raises(openai.AuthenticationError):
        lab.client("qrn_sk_nobody").models.list()
    reader = lab.client(lab.key(scopes=["ai:read"]))
    assert list(reader.files.list()) == []
    with pytest.raises(openai.PermissionDeniedError, match="ai:use"):
        reader.models.list()
    with pytest.raises(openai.PermissionDeniedError, match="ai:write"):
        reader.files.create(file=("a.jsonl", b"{}"), purpose="batch")


def test_a_tenants_limit_holds_here_too_and_says_when_to_come_again(lab: Lab) -> None:
    limited = lab.client(lab.key(requests_per_minute=2))
    limited.models.list()
    limited.models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        limited.models.list()
    assert int(caught.value.response.headers["Retry-After"]) >= 1


def test_what_is_no_request_is_refused_in_the_same_form(lab: Lab) -> None:
    plain = lab.plain(lab.key())
    for method, path, raw, status in [
        ("POST", "//v1/chat/completions", b"{", 400),
        ("POST", "//v1/chat/completions", b"[" * 3_000_000, 413),
        ("GET", "//v1/nothing", None, 404),
        ("PUT", "//v1/models", b"{}", 405),
        ("DELETE", "//v1/chat/completions", None, 405),
    ]:
        answer = plain.send(method, path, raw=raw)
        assert answer.status == status, (method, path)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("right", [True, False])
def test_a_refusal_reaches_who_still_sends_the_body(lab: Lab, right: bool) -> None:
    """Over the process's own socket: nginx, which sends there, would answer a closed connection with 503."""
    key, body = lab.key() if right else "qk_of_nobody", b"[" * 3_000_000
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(lab.stack.directory / "events.sock"))
            client.sendall(head.encode() + body)
            assert client.recv(4096).startswith(b"HTTP/1.1 413 " if right else b"HTTP/1.1 401 ")


def test_the_job_behind_an_answer_is_named_and_can_be_looked_at(lab: Lab, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=CHAT, messages=QUESTION, max_tokens=2)
    job = lab.plain(client.api_key).call("GET", f"/jobs/{raw.headers['X-Quern-Job']}")
    assert job["kind"] == "openai_chat"
    assert job["status"] == "done"
    assert "colours" not in str(job)
