"""What the engine promises when its native code dies: no answer is lost, and only the guilty request pays."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from quern.inference.client import EngineClient, EngineCrashed
from quern.inference.protocol import GenerateRequest, Generation, TokenEvent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.app.inference.conftest import RunningEngine

WaitUntil = Callable[[Callable[[], bool], str], None]
InThreads = Callable[[list[Callable[[], object]]], list[object]]
PATTERN = "one two three four " * 8


def _request(text: str = PATTERN, **fields: Any) -> GenerateRequest:
    fields = {"tenant": "t", "max_tokens": 16, **fields}
    return GenerateRequest(prompt=text, logit_bias={0: -1000.0, 2: -1000.0, 4: -1000.0}, **fields)


@pytest.fixture
def faulty(engine: RunningEngine) -> Iterator[RunningEngine]:
    """The shared engine, made well again afterwards."""
    engine.wait_ready()
    yield engine
    engine.wait_ready()
    engine.order("clear")


def _crashes(client: EngineClient) -> float:
    return client.stats()["quern_engine_crashes_total"]


def test_a_crash_in_native_code_costs_no_request(faulty: RunningEngine, in_threads: InThreads) -> None:
    before = _crashes(faulty.client)
    faulty.order("crash_next_step")
    answers = in_threads([lambda n=n: faulty.client.generate(_request(tenant=f"t{n}")) for n in range(12)])  # type: ignore[misc]
    assert all(isinstance(answer, Generation) and answer.completion_tokens == 16 for answer in answers), answers
    assert _crashes(faulty.client) == before + 1


def test_a_poisonous_prompt_ends_alone_and_harms_no_neighbour(faulty: RunningEngine, in_threads: InThreads) -> None:
    faulty.order("poison", "arsenic")
    poisonous = lambda: faulty.client.generate(_request("a cup of arsenic"))  # noqa: E731
    healthy = [lambda n=n: faulty.client.generate(_request(tenant=f"t{n}")) for n in range(8)]
    found, *answers = in_threads([poisonous, *healthy])
    assert isinstance(found, EngineCrashed)
    assert found.suspect
    assert all(isinstance(answer, Generation) and answer.completion_tokens == 16 for answer in answers), answers


def test_two_poisonous_prompts_are_both_found(faulty: RunningEngine, in_threads: InThreads) -> None:
    faulty.order("poison", "arsenic")
    texts = ["some arsenic", "more arsenic", PATTERN]
    found = in_threads([lambda text=text: faulty.client.generate(_request(text)) for text in texts])  # type: ignore[misc]
    assert isinstance(found[0], EngineCrashed)
    assert isinstance(found[1], EngineCrashed)
    assert isinstance(found[2], Generation)


def test_a_step_that_hangs_is_ended_and_its_request_answered(faulty: RunningEngine) -> None:
    before = faulty.client.stats()["quern_engine_hangs_total"]
    faulty.order("hang_next_step")
    assert faulty.client.generate(_request()).completion_tokens == 16
    assert faulty.client.stats()["quern_engine_hangs_total"] == before + 1


def test_a_stream_goes_on_where_a_sigkill_stopped_it(faulty: RunningEngine) -> None:
    before = _crashes(faulty.client)
    texts, counts, killed = [], [], False
    for event in faulty.client.stream(_request(max_tokens=60)):
        if isinstance(event, TokenEvent):
            texts.append(event.text)
            counts.append(event.tokens)
            if event.tokens >= 10 and not killed:
                os.kill(faulty.model_process(), signal.SIGKILL)
                killed = True
        else:
            assert "".join(texts) == event.text
            assert event.completion_tokens == 60
    assert counts == sorted(set(counts)), "a token was sent twice"
    assert _crashes(faulty.client) == before + 1


def test_a_request_that_is_killed_from_outside_again_and_again_is_not_blamed(
    faulty: RunningEngine, wait_until: WaitUntil
) -> None:
    result: list[Generation] = []
    thread = threading.Thread(target=lambda: result.append(faulty.client.generate(_request(max_tokens=300))))
    thread.start()
    for _ in range(3):
        wait_until(lambda: faulty.client.stats().get("quern_engine_live_sequences") == 1.0, "the request to run")
        crashes = _crashes(faulty.client)
        os.kill(faulty.model_process(), signal.SIGKILL)
        wait_until(lambda crashes=crashes: _crashes(faulty.client) > crashes, "the death to be noticed")  # type: ignore[misc]
    thread.join(timeout=300)
    assert result
    assert result[0].completion_tokens == 300


def test_embeddings_come_through_a_crash_too(faulty: RunningEngine, in_threads: InThreads) -> None:
    faulty.order("crash_next_step")
    calls: list[Callable[[], object]] = [lambda: faulty.client.generate(_request())]
    calls += [lambda n=n: faulty.client.embed("t", [f"text {n} {m}" for m in range(20)]) for n in range(4)]  # type: ignore[misc]
    generation, *vectors = in_threads(calls)
    assert isinstance(generation, Generation)
    assert all(isinstance(found, list) and len(found) == 20 for found in vectors)
