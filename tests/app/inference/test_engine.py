"""What the engine promises to those on the other side of its socket."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quern.inference.client import (
    EngineBusy,
    EngineCancelled,
    EngineClient,
    EngineDeadline,
    EngineOutputInvalid,
    EngineRefused,
    EngineUnavailable,
)
from quern.inference.protocol import (
    MAX_REQUEST_BYTES,
    FaultRequest,
    GenerateRequest,
    Generation,
    Label,
    Message,
    QueuedEvent,
    TokenEvent,
)

if TYPE_CHECKING:
    from tests.app.inference.conftest import RunningEngine

Start = Callable[..., "AbstractContextManager[RunningEngine]"]
Launch = Start
WaitUntil = Callable[[Callable[[], bool], str], None]
InThreads = Callable[[list[Callable[[], object]]], list[object]]

BABBLE = "one two three four " * 8


def _ask(text: str = "Complete this sentence: The capital of France is", **fields: Any) -> GenerateRequest:
    fields = {"tenant": "t", "max_tokens": 12, **fields}
    return GenerateRequest(messages=[Message(role="user", content=text)], **fields)


def _babble(**fields: Any) -> GenerateRequest:
    """A request that does not end by itself."""
    fields = {"tenant": "t", "max_tokens": 4000, **fields}
    return GenerateRequest(prompt=BABBLE, logit_bias={0: -1000.0, 2: -1000.0, 4: -1000.0}, **fields)


def _raw(path: Path, data: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        try:
            connection.sendall(data)
        except BrokenPipeError:
            pass
        received = b""
        while not received.endswith(b"\n"):
            chunk = connection.recv(65536)
            if not chunk:
                break
            received += chunk
    found: dict[str, Any] = json.loads(received.splitlines()[-1])
    return found


def test_a_conversation_gets_its_answer(client: EngineClient) -> None:
    answer = client.generate(_ask())
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens > 20
    assert answer.waited >= 0


def test_many_clients_at_once_each_get_their_own_answer(client: EngineClient, in_threads: InThreads) -> None:
    words = ["paper", "river", "stone", "candle", "window", "garden", "silver", "button", "planet", "winter"]

    def ask(word: str) -> str:
        # A sentence that is repeated is repeated on: no knowledge needed, and whose answer it is shows.
        return client.generate(GenerateRequest(tenant=word, prompt=f"The code is {word}. " * 8, max_tokens=8)).text

    answers = in_threads([lambda word=word: ask(word) for word in words])  # type: ignore[misc]
    for word, answer in zip(words, answers, strict=True):
        assert isinstance(answer, str), answer
        assert not [other for other in words if other != word and other in answer]
    assert sum(word in str(answer) for word, answer in zip(words, answers, strict=True)) >= 8


def test_a_schema_gives_an_answer_of_that_shape(client: EngineClient) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    text = "Extract the name and the age: I am Anna, 31 years old."
    answer = client.generate(_ask(text, json_schema=schema, max_tokens=60))
    assert answer.parsed["name"].startswith("Anna")
    assert answer.parsed["age"] == 31


def test_json_mode_gives_an_object(client: EngineClient) -> None:
    assert isinstance(client.generate(_ask("Describe a cat in JSON.", json_mode=True, max_tokens=80)).parsed, dict)


def test_an_answer_that_breaks_its_schema_is_an_error_and_no_text(client: EngineClient) -> None:
    with pytest.raises(EngineOutputInvalid):
        client.generate(_ask("A number?", json_schema={"type": "integer", "minimum": 9, "maximum": 8}))


def test_a_stream_adds_up_to_its_result(client: EngineClient) -> None:
    *tokens, whole = client.stream(_ask("Count to five."))
    assert isinstance(whole, Generation)
    assert len(tokens) > 2
    assert "".join(event.text for event in tokens if isinstance(event, TokenEvent)) == whole.text


def test_progress_is_told_while_it_runs(client: EngineClient) -> None:
    heard: list[TokenEvent | QueuedEvent] = []
    client.generate(_ask(stream=True), on_progress=heard.append)
    assert [event.tokens for event in heard if isinstance(event, TokenEvent)] == sorted(
        event.tokens for event in heard if isinstance(event, TokenEvent)
    )
    assert heard


def test_equal_seeds_give_equal_answers(client: EngineClient) -> None:
    # Not each one to the last bit: how many threads a step gets changes how attention is rounded, and a draw that falls
    # on the border between two tokens then goes the other way. A seed without effect would give about no equal pair.
    def begin(seed: int) -> str:
        request = GenerateRequest(tenant="t", prompt="Once upon a time", max_tokens=3, temperature=1.5, seed=seed)
        return client.generate(request).text

    pairs = [(begin(seed), begin(seed)) for seed in range(8)]
    assert sum(first == second for first, second in pairs) >= 4
    assert len({first for first, _ in pairs}) >= 4


def test_a_prompt_over_the_limit_is_refused_with_the_numbers(client: EngineClient) -> None:
    with pytest.raises(EngineRefused, match=r"expected prompt and answer to fit into 6144 tokens, found \d+ of prompt"):
        client.generate(_ask("word " * 7000))


def test_an_answer_over_the_limit_is_refused(client: EngineClient) -> None:
    with pytest.raises(EngineRefused, match="20000 of answer"):
        client.generate(_ask(max_tokens=20_000))


@pytest.mark.parametrize(
    "schema", [{"$ref": "https://example.org/x"}, {"type": "nonsense"}, {"type": "string", "minLength": 10**8}]
)
def test_an_impossible_schema_is_refused(client: EngineClient, schema: dict[str, Any]) -> None:
    with pytest.raises(EngineRefused):
        client.generate(_ask(json_schema=schema))


def test_an_unknown_model_is_refused_with_the_right_one(client: EngineClient) -> None:
    with pytest.raises(EngineRefused, match="smollm2-135m-instruct-q4_1"):
        client.generate(_ask(model="gpt-5"))


def test_a_deadline_ends_a_request(client: EngineClient) -> None:
    with pytest.raises(EngineDeadline):
        client.generate(_babble(deadline=0.5))


def test_a_caller_may_stop_waiting(client: EngineClient, wait_until: WaitUntil) -> None:
    started = threading.Event()
    with pytest.raises(EngineCancelled):
        client.generate(_babble(stream=True), on_progress=lambda _: started.set(), should_stop=lambda: started.is_set())
    wait_until(lambda: client.stats()["quern_engine_pending_requests"] <= 1, "the request to be dropped")


def test_a_client_that_vanishes_frees_its_place(client: EngineClient, wait_until: WaitUntil) -> None:
    before = client.stats()["quern_engine_cancelled_total"]
    for event in client.stream(_babble()):
        assert isinstance(event, TokenEvent)
        break  # leaving the loop closes the connection
    wait_until(lambda: client.stats()["quern_engine_cancelled_total"] > before, "the cancellation")
    wait_until(lambda: client.stats()["quern_engine_live_sequences"] == 0, "the place to be free")
    assert client.stats()["quern_engine_context_cells_reserved"] == 0


def test_user_waiting_requests_overtake_batch_work(client: EngineClient, in_threads: InThreads) -> None:
    ends: dict[str, float] = {}
    under_way = threading.Event()

    def heard(event: TokenEvent | QueuedEvent) -> None:
        if isinstance(event, TokenEvent):
            under_way.set()

    def call(name: str, request: GenerateRequest) -> None:
        client.generate(request, on_progress=heard)
        ends[name] = time.monotonic()

    def late() -> None:
        assert under_way.wait(120)
        call("interactive", _ask(max_tokens=2, priority="interactive"))

    batch = [lambda n=n: call(f"batch{n}", _babble(max_tokens=60, tenant=f"b{n}", stream=True)) for n in range(18)]
    in_threads([*batch, late])
    assert sum(end > ends["interactive"] for end in ends.values()) >= 6


def test_a_full_engine_says_when_to_come_again(start_engine: Start, in_threads: InThreads) -> None:
    with start_engine(max_waiting="3") as engine:
        found = in_threads([lambda: engine.client.generate(_babble(max_tokens=60)) for _ in range(8)])
        busy = [error for error in found if isinstance(error, EngineBusy)]
        assert len(busy) >= 1
        assert all(1 <= error.retry_after <= 60 for error in busy)
        assert sum(isinstance(answer, Generation) for answer in found) >= 3


def test_embeddings_and_classes_come_over_the_same_socket(client: EngineClient) -> None:
    one, other, third = client.embed("t", ["The parcel is late.", "My package is delayed.", "I like tea."])
    product = [sum(a * b for a, b in zip(one, vector, strict=True)) for vector in (other, third)]
    assert product[0] > product[1] + 0.2
    labels = [
        Label(name="delivery", description="parcels and shipping"),
        Label(name="drinks", description="tea, coffee"),
    ]
    found = client.classify("t", "When will my parcel come?", labels)
    assert found.label == "delivery"
    assert sum(found.scores.values()) == pytest.approx(1.0)


def test_tokens_are_counted_as_they_will_be_used(client: EngineClient) -> None:
    asked = _ask()
    assert client.count_tokens("t", messages=asked.messages) == client.generate(asked).prompt_tokens


def test_a_purge_forgets_vectors_and_prefixes(client: EngineClient, wait_until: WaitUntil) -> None:
    client.purge("purged")
    client.embed("purged", ["only once"])
    misses = client.stats()["quern_engine_embedding_cache_misses_total"]
    client.generate(_ask("A letter of some length, to be forgotten. " * 5, tenant="purged"))
    client.purge("purged")
    client.embed("purged", ["only once"])
    assert client.stats()["quern_engine_embedding_cache_misses_total"] == misses + 1
    answer = client.generate(_ask("A letter of some length, to be forgotten. " * 5, tenant="purged"))
    assert answer.cached_tokens == 0


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (b"not json\n", "JSON"),
        (b'"text"\n', "request"),
        (b'{"op": "explode"}\n', "op"),
        (b'{"op": "generate", "tenant": "t"}\n', "messages or prompt"),
        (b'{"op": "generate", "tenant": "t", "prompt": "x", "temperature": -1}\n', "temperature"),
        (b'{"op": "generate", "tenant": "t", "prompt": "x", "surprise": 1}\n', "surprise"),
        (b'{"op": "generate", "tenant": "", "prompt": "x"}\n', "tenant"),
        (b"\xff\xfe\n", "JSON"),
        (b"[" * 100_000 + b"\n", "JSON"),
    ],
)
def test_frames_that_are_none_are_refused_with_the_place(engine: RunningEngine, frame: bytes, complaint: str) -> None:
    found = _raw(engine.socket, frame)
    assert found["kind"] == "refused"
    assert complaint in found["message"]


def test_a_refusal_never_quotes_the_request(engine: RunningEngine) -> None:
    frame = b'{"op": "generate", "tenant": "t", "prompt": ["MY SECRET"], "seed": "MY SECRET"}\n'
    assert "SECRET" not in json.dumps(_raw(engine.socket, frame))


def test_a_frame_without_end_is_refused(engine: RunningEngine) -> None:
    found = _raw(engine.socket, b"x" * (MAX_REQUEST_BYTES + 70_000))
    assert found["kind"] == "refused"
    assert str(MAX_REQUEST_BYTES) in found["message"]


def test_orders_to_fail_are_refused_by_default(start_engine: Start) -> None:
    with start_engine(chat_model="") as engine:
        with pytest.raises(EngineRefused, match="no orders"):
            engine.client._call(FaultRequest(action="crash_next_step"), Generation)
        with pytest.raises(EngineRefused, match="no chat model"):
            engine.client.generate(_ask())
        assert len(engine.client.embed("t", ["x"])[0]) == 384


def test_the_socket_is_closed_to_others_and_gone_after_a_stop(start_engine: Start) -> None:
    with start_engine(chat_model="") as engine:
        assert stat.S_IMODE(engine.socket.stat().st_mode) == 0o660
        second = subprocess.run(
            [sys.executable, "-m", "quern.inference.engine", "--socket", str(engine.socket)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert second.returncode != 0
        assert "found one that answers" in second.stderr
        assert engine.client.health().status == "ready"
        child = engine.model_process()
        assert engine.stop() == 0
        assert not engine.socket.exists()
        assert not Path(f"/proc/{child}").exists()


def test_an_absent_engine_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="quern engine"):
        EngineClient(tmp_path / "nobody.sock").health()


def test_a_damaged_model_never_reaches_native_code_and_is_served_once_it_is_mended(
    models_dir: Path, tmp_path: Path, launch_engine: Launch, wait_until: WaitUntil
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models_dir, folder)
    path = folder / "smollm2-135m-instruct-q4_1" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with launch_engine(models=str(folder)) as engine:
        wait_until(engine.answers, "the engine to listen")
        wait_until(lambda: engine.client.health().status == "failed", "the engine to notice")
        assert "cut short" in engine.client.health().detail
        assert not engine.has_model_process()
        with pytest.raises(EngineUnavailable, match="cut short"):
            engine.client.generate(_ask())
        path.write_bytes(whole)
        engine.wait_ready()
        assert "Paris" in engine.client.generate(_ask()).text
