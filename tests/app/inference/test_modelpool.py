"""What an engine with several models promises: loaded on demand, never let go of at work, nobody waits for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quern.inference import modelpool, registry
from quern.inference.client import EngineClient, EngineDeadline, EngineRefused, EngineUnavailable
from quern.inference.protocol import GenerateRequest, Generation, QueuedEvent, TokenEvent
from tests.app.inference.lending import lend

if TYPE_CHECKING:
    from tests.app.inference.conftest import RunningEngine

Start = Callable[..., "AbstractContextManager[RunningEngine]"]
WaitUntil = Callable[[Callable[[], bool], str], None]
CHAT = "smollm2-135m-instruct-q4_1"
#: What the first model comes to with 512 tokens of context, and what each further one is said to need.
FIRST_MIB, NEED_MIB = 202, 300
COUNTING = "one two three four " * 8


@pytest.fixture(scope="module")
def folder(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three more models: the same weights under other names."""
    made = tmp_path_factory.mktemp("models")
    first = registry.find(CHAT, "chat", models_dir)
    source = registry.file_path(first, first.files[0], models_dir)
    (made / CHAT).mkdir()
    lend(source, made / CHAT / source.name)
    entries = []
    for name in ("red", "green", "blue"):
        (made / name).mkdir()
        lend(source, made / name / "weights.gguf")
        entries.append(
            f"- {{name: {name}, kind: chat, licence: MIT, context: 512, memory_mib: {NEED_MIB}, context_kib: 0,"
            f" files: [{{path: weights.gguf, sha256: {first.files[0].sha256}}}]}}\n"
        )
    entries.append(
        "- {name: huge, kind: chat, licence: MIT, context: 512, memory_mib: 99999, context_kib: 0,"
        f" files: [{{path: weights.gguf, sha256: {first.files[0].sha256}}}]}}\n"
    )
    (made / "huge").mkdir()
    lend(source, made / "huge" / "weights.gguf")
    (made / "models.yml").write_text("".join(entries), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def room_for_one(folder: Path, models_dir: Path) -> Any:
    """An engine with memory for its first model and one more at a time."""
    from tests.app.inference.conftest import _running_engine

    limit = str(FIRST_MIB + NEED_MIB + 50)
    with _running_engine(
        models=str(folder), embedding_model="", context="512", memory_mib=limit, residence="1", blas="false"
    ) as running:
        yield running


def _ask(
    client: EngineClient,
    model: str,
    on_progress: Callable[[TokenEvent | QueuedEvent], None] | None = None,
    **fields: Any,
) -> Generation:
    values: dict[str, Any] = {"tenant": "t", "max_tokens": 4, **fields}
    bias = {0: -1000.0, 2: -1000.0, 4: -1000.0}
    request = GenerateRequest(prompt=COUNTING, model=model, logit_bias=bias, **values)
    return client.generate(request, on_progress=on_progress)


def _loaded(client: EngineClient) -> set[str]:
    return {model.name for model in client.models() if model.loaded}


def test_a_model_is_loaded_by_its_first_request_and_named_in_the_answer(room_for_one: RunningEngine) -> None:
    client = room_for_one.client
    assert {model.name for model in client.models()} == {CHAT, "red", "green", "blue", "huge"}
    assert _ask(client, "red").model == "red"
    assert _loaded(client) == {CHAT, "red"}


def test_the_model_used_longest_ago_makes_room_and_its_memory_is_free(
    room_for_one: RunningEngine, wait_until: WaitUntil
) -> None:
    client = room_for_one.client
    _ask(client, "red")
    evictions = client.stats()["quern_engine_model_evictions_total"]
    assert _ask(client, "green").model == "green"
    assert _loaded(client) == {CHAT, "green"}
    stats = client.stats()
    assert stats["quern_engine_model_evictions_total"] == evictions + 1
    assert stats["quern_engine_models_memory_bytes"] <= stats["quern_engine_models_memory_limit_bytes"]
    wait_until(lambda: len(room_for_one._children()) == 2, "the other model's process to be gone")


def test_a_model_at_work_is_never_let_go_of_and_the_other_still_gets_its_turn(room_for_one: RunningEngine) -> None:
    client = room_for_one.client
    answers: dict[str, Generation | Exception] = {}
    ended: list[str] = []

    at_work = threading.Event()

    def heard(event: TokenEvent | QueuedEvent) -> None:
        if isinstance(event, TokenEvent):
            at_work.set()

    def ask(label: str, model: str, tokens: int) -> None:
        try:
            answers[label] = _ask(client, model, heard, max_tokens=tokens, tenant=label, stream=True)
        except Exception as error:
            answers[label] = error
        ended.append(label)

    _ask(client, "red")
    long = threading.Thread(target=ask, args=("long", "red", 300))
    long.start()
    assert at_work.wait(120)
    other = threading.Thread(target=ask, args=("other", "blue", 4))
    other.start()
    # A stream of work for the busy model does not keep the other one out.
    stop = time.monotonic() + 120
    more: list[threading.Thread] = []
    while other.is_alive() and time.monotonic() < stop:
        more.append(threading.Thread(target=ask, args=(f"more{len(more)}", "red", 2)))
        more[-1].start()
        time.sleep(0.5)
    for thread in [long, other, *more]:
        thread.join(timeout=180)
    assert [error for error in answers.values() if isinstance(error, Exception)] == []
    found = answers["long"]
    assert isinstance(found, Generation)
    assert found.completion_tokens == 300
    assert ended.index("long") < ended.index("other") < len(ended) - 1


def test_a_request_for_a_model_that_is_being_let_go_of_is_answered_by_its_next_load(
    room_for_one: RunningEngine, wait_until: WaitUntil
) -> None:
    # On a busy machine the process may have ended before it is looked for: then once more.
    assert any(_asked_while_it_is_let_go_of(room_for_one, wait_until) for _ in range(5))


def _asked_while_it_is_let_go_of(engine: RunningEngine, wait_until: WaitUntil) -> bool:
    """Whether the second request for `red` came while the process of the first was ending."""
    _ask(engine.client, "red")
    answers: list[Generation] = []
    other = threading.Thread(target=lambda: answers.append(_ask(engine.client, "green")))
    # A process that is stopped takes its time to end: the request below comes in the midst of it.
    newest = int(engine._children()[-1])
    os.kill(newest, signal.SIGSTOP)
    other.start()
    wait_until(lambda: "red" not in _loaded(engine.client), "the model to be let go of")
    ending = str(newest) in engine._children()
    assert _ask(engine.client, "red", deadline=60.0).model == "red"
    other.join(timeout=180)
    assert [answer.model for answer in answers] == ["green"]
    return ending


def test_a_request_that_waits_for_room_ends_at_its_deadline_and_holds_nobody_up(room_for_one: RunningEngine) -> None:
    client = room_for_one.client
    _ask(client, "red")
    long = threading.Thread(target=lambda: _ask(client, "red", max_tokens=60))
    long.start()
    with pytest.raises(EngineDeadline):
        _ask(client, "green", deadline=0.05)
    long.join(timeout=180)
    assert _ask(client, "red").model == "red"


def test_a_model_that_can_never_fit_is_refused_with_the_numbers(room_for_one: RunningEngine) -> None:
    with pytest.raises(EngineRefused, match="huge needs 99999 MiB; at most"):
        _ask(room_for_one.client, "huge")


def test_a_damaged_model_is_refused_and_the_others_go_on(room_for_one: RunningEngine, folder: Path) -> None:
    path = folder / "blue" / "weights.gguf"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 3])
    _ask(room_for_one.client, "green")  # so that blue is not loaded
    with pytest.raises(EngineUnavailable, match="cut short"):
        _ask(room_for_one.client, "blue")
    assert _ask(room_for_one.client, "green").model == "green"
    assert _ask(room_for_one.client, CHAT).model == CHAT
    path.write_bytes(whole)
    assert _ask(room_for_one.client, "blue").model == "blue"


def test_pinned_models_are_there_from_the_start_and_stay(
    folder: Path, start_engine: Start, wait_until: WaitUntil
) -> None:
    limit = str(FIRST_MIB + 2 * NEED_MIB + 50)
    with start_engine(
        models=str(folder),
        embedding_model="",
        context="512",
        memory_mib=limit,
        pinned="green",
        residence="0",
        blas="false",
    ) as engine:
        wait_until(lambda: "green" in _loaded(engine.client), "the pinned model to be loaded")
        for name in ("red", "blue"):
            assert _ask(engine.client, name).model == name
            assert _loaded(engine.client) == {CHAT, "green", name}


def test_memory_limits_of_the_control_group_are_known() -> None:
    total = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) / 1024
    assert 0 < modelpool.usable_memory_mib() <= total
