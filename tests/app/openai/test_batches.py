"""`/v1/files` and `/v1/batches` with the real client."""

import json
from typing import Any

import openai
import pytest

from tests.app.api.client import until
from tests.app.openai.conftest import CHAT, EMBEDDING, Lab

CHATS = "/v1/chat/completions"
OPEN = ("validating", "in_progress", "finalizing", "cancelling")


def line(name: str, body: dict[str, Any], url: str = CHATS) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def chat(text: str, **changes: Any) -> dict[str, Any]:
    return {"model": CHAT, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **changes}


def upload(client: openai.OpenAI, lines: list[dict[str, Any]]) -> str:
    content = "\n".join(json.dumps(one) for one in lines).encode()
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def start(client: openai.OpenAI, lines: list[dict[str, Any]], endpoint: Any = CHATS) -> str:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", metadata={"run": "1"}
    ).id


def ended(client: openai.OpenAI, identity: str) -> Any:
    """A batch, once it has ended."""

    def look() -> Any:
        found = client.batches.retrieve(identity)
        return None if found.status in OPEN else found

    return until(look, 120)


def read(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    assert file
    return [json.loads(one) for one in client.files.content(file).text.splitlines()]


def test_a_batch_gives_each_line_its_answer_or_its_error(lab: Lab, client: openai.OpenAI) -> None:
    lines = [line(f"r{number}", chat(f"Say {number}.")) for number in range(6)]
    lines[2]["body"]["model"] = "gpt-99"
    lines[4]["body"]["temperature"] = 9
    lines[5]["body"]["stream"] = True
    batch = ended(client, start(client, lines))
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (6, 3, 3)
    assert batch.metadata == {"run": "1"}
    good, bad = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert [one["custom_id"] for one in good] == ["r0", "r1", "r3"]
    assert all(one["response"]["status_code"] == 200 for one in good)
    assert all(one["response"]["body"]["choices"][0]["message"]["content"] for one in good)
    codes = [(one["custom_id"], one["response"]["body"]["error"]["code"]) for one in bad]
    assert codes == [("r2", "model_not_found"), ("r4", "invalid_value"), ("r5", "unsupported_parameter")]
    # The answers are in the files; of the lines nothing stays.
    until(lambda: lab.db.ai_requests.count_documents({"batch": f"bat_{batch.id.removeprefix('batch_')}"}) == 0)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/embeddings", {"model": EMBEDDING, "input": ["a", "b"]}),
        ("/v1/responses", {"model": CHAT, "input": "Say hi.", "max_output_tokens": 16}),
        ("/v1/completions", {"model": CHAT, "prompt": "Once", "max_tokens": 3}),
    ],
    ids=str,
)
def test_a_batch_takes_every_endpoint(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> None:
    batch = ended(client, start(client, [line("one", body, endpoint)], endpoint))
    [answer] = read(client, batch.output_file_id)
    assert answer["response"]["body"]["object"] in ("list", "response", "text_completion")


def test_a_file_that_is_no_batch_is_refused_with_its_lines(client: openai.OpenAI) -> None:
    lines: list[dict[str, Any]] = [line("a", chat("x")), line("a", chat("x")), line("b", {}, "/v1/files"), {"c": 1}]
    batch = ended(client, start(client, lines))
    assert batch.status == "failed"
    assert [(fault.line, fault.code) for fault in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "mismatched_endpoint"),
        (4, "invalid_request"),
    ]


def test_a_cancelled_batch_gives_what_was_done(client: openai.OpenAI) -> None:
    long = [line(f"r{number}", chat("Tell a long story.", max_tokens=500)) for number in range(24)]
    identity = start(client, long)
    until(lambda: client.batches.retrieve(identity).status == "in_progress")
    assert client.batches.cancel(identity).status == "cancelling"
    batch = ended(client, identity)
    assert batch.status == "cancelled"
    counts = batch.request_counts
    assert counts.completed + counts.failed == counts.total
    assert {one["error"]["code"] for one in read(client, batch.error_file_id)} == {"batch_cancelled"}
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(ended(client, start(client, [line("a", chat("x"))])).id)


def test_an_expansion_that_died_half_way_goes_on(lab: Lab, client: openai.OpenAI) -> None:
    lab.stack.processes["worker-low"].stop()
    url = "/v1/embeddings"
    lines = [line(f"r{number}", {"model": EMBEDDING, "input": f"text {number}"}, url) for number in range(210)]
    identity = start(client, lines, url)
    worker = lab.stack.processes["worker-low"]
    worker.start()
    until(lambda: lab.db.ai_requests.count_documents({"batch": f"bat_{identity.removeprefix('batch_')}"}) >= 200)
    worker.kill()
    worker.start()
    batch = ended(client, identity)
    assert (batch.status, batch.request_counts.completed) == ("completed", 210)
    names = [one["custom_id"] for one in read(client, batch.output_file_id)]
    assert names == [f"r{number}" for number in range(210)]


def test_files_come_back_as_they_were_and_can_be_deleted(client: openai.OpenAI) -> None:
    content = bytes(range(256)) * 500
    made = client.files.create(file=("raw.bin", content), purpose="user_data")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "raw.bin", "user_data")
    assert client.files.content(made.id).read() == content
    assert client.files.retrieve(made.id).id == made.id
    client.files.delete(made.id)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_files_and_batches_are_listed_a_page_at_a_time(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{number}.jsonl", b"{}"), purpose="batch").id for number in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert list(client.files.list(purpose="user_data")) == []
    begun = [
        client.batches.create(input_file_id=file, endpoint="/v1/responses", completion_window="24h").id
        for file in made[:3]
    ]
    assert [batch.id for batch in client.batches.list(limit=2)] == begun[::-1]


def test_a_file_beyond_the_limit_is_refused(client: openai.OpenAI) -> None:
    for size in (200_001, 300_000):
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("big.jsonl", b"x" * size), purpose="batch")
        assert caught.value.status_code == 413


@pytest.mark.parametrize("purpose", ["fine-tune", "vision"])
def test_a_purpose_without_a_use_is_refused(client: openai.OpenAI, purpose: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("a.jsonl", b"{}"), purpose=purpose)
    assert caught.value.param == "purpose"
