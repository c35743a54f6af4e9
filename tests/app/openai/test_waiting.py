"""Who waits: crashes under a stream, clients that go away, repetitions, and a queue that is full."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.app.api.client import until
from tests.app.openai.conftest import CHAT, MOST_QUEUED, Lab

LONG: list[Any] = [{"role": "user", "content": "Write a long story about the sea, with many chapters."}]


def asked(client: openai.OpenAI, lab: Lab) -> list[dict[str, Any]]:
    """The requests of the client's tenant."""
    key = "key_" + str(client.api_key).split("_")[2]
    return list(lab.db.ai_requests.find({"key": key}))


def states(client: openai.OpenAI, lab: Lab) -> list[str]:
    return [lab.db.jobs.find_one({"subject": one["_id"]})["state"] for one in asked(client, lab)]  # type: ignore[index]


def test_a_stream_outlives_its_worker(lab: Lab, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=CHAT, messages=LONG, max_tokens=120, stream=True)
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if number == 4:
            lab.stack.processes["worker-high"].kill()
            lab.stack.processes["worker-high"].start()
    assert chunk.choices[0].finish_reason in ("length", "stop")
    assert [text] == lab.answered(chunk.id)


def test_an_answer_outlives_the_engine(lab: Lab, client: openai.OpenAI) -> None:
    engine = lab.stack.processes["engine"]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(client.chat.completions.create, model=CHAT, messages=LONG, max_tokens=150)
        until(lambda: states(client, lab) == ["running"])
        engine.kill()
        engine.start()
        assert answer.result().choices[0].message.content


def test_the_job_of_a_client_that_went_away_is_cancelled(lab: Lab, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=CHAT, messages=LONG, max_tokens=3000, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: states(client, lab) == ["cancelled"])
    impatient = lab.client(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=CHAT, messages=LONG, max_tokens=3000)
    until(lambda: states(impatient, lab) == ["cancelled"])
    assert {one["state"] for one in asked(impatient, lab)} == {"cancelled"}


def test_a_repeated_request_joins_the_first_and_is_carried_out_once(lab: Lab, client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": CHAT, "messages": LONG, "max_tokens": 40}
    headers = {"Idempotency-Key": "order-4711"}

    def ask(_: int) -> str:
        answer: Any = client.chat.completions.create(**given, extra_headers=headers)
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(3) as pool:
        answers = set(pool.map(ask, range(3)))
    assert len(answers) == 1
    assert len(asked(client, lab)) == 1
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(**{**given, "max_tokens": 41}, extra_headers=headers)


def test_a_repetition_after_going_away_starts_again(lab: Lab) -> None:
    client = lab.client(timeout=0.5)
    headers = {"Idempotency-Key": "again"}
    given: dict[str, Any] = {"model": CHAT, "messages": LONG, "max_tokens": 300, "seed": 1}
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**given, extra_headers=headers)
    until(lambda: states(client, lab) == ["cancelled"])
    patient = client.with_options(timeout=120)
    assert patient.chat.completions.create(**given, extra_headers=headers).choices[0].message.content
    assert sorted(states(client, lab)) == ["cancelled", "done"]


def test_a_full_queue_says_so_and_when_to_come_again(lab: Lab, client: openai.OpenAI) -> None:
    made: list[Any] = []
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(100):
            made.append(
                client.responses.create(model=CHAT, input="Tell a story.", max_output_tokens=2000, background=True)
            )
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 600
    assert len(made) >= MOST_QUEUED
    # The first of those that wait knows its place.
    waiting = [one.id for one in made if client.responses.retrieve(one.id).status == "queued"]
    raw = client.responses.with_raw_response.retrieve(waiting[-1])
    assert int(raw.headers["X-Quern-Queue-Place"]) >= 1
    # Nobody else's queue is full.
    assert lab.client().responses.create(model=CHAT, input="Hi", max_output_tokens=16).output_text
    for one in made:
        with suppress(openai.BadRequestError):  # it has told its story meanwhile
            client.responses.cancel(one.id)


def test_a_client_that_retries_gets_through_a_restart(lab: Lab) -> None:
    client = lab.client(max_retries=8)
    events = lab.stack.processes["events"]
    ready = threading.Event()

    def restart() -> None:
        events.stop()
        ready.set()
        events.start()

    thread = threading.Thread(target=restart)
    thread.start()
    ready.wait()
    assert client.chat.completions.create(model=CHAT, messages=LONG, max_tokens=4).choices[0].message.content
    thread.join()


def test_waiting_clients_hold_no_thread(lab: Lab) -> None:
    events = lab.stack.processes["events"]
    lab.stack.processes["worker-high"].stop()
    streams = []
    try:
        with ThreadPoolExecutor(30) as pool:
            clients = [lab.client() for _ in range(30)]
            for one in clients:
                streams.append(
                    pool.submit(one.chat.completions.create, model=CHAT, messages=LONG, max_tokens=2, stream=True)
                )
            until(lambda: lab.db.jobs.count_documents({"kind": "openai_chat", "state": "queued"}) == 30)
            assert len(list(Path(f"/proc/{events.pid}/task").iterdir())) < 40
            lab.stack.processes["worker-high"].start()
            assert all(list(stream.result())[-1].choices[0].finish_reason for stream in streams)
    finally:
        if lab.stack.processes["worker-high"].pid is None:
            lab.stack.processes["worker-high"].start()
