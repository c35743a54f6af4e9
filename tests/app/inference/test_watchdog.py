"""A step that hangs is told from one that gets no processor."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from quern.inference.protocol import GenerateRequest
from quern.inference.steprecord import Entry
from quern.inference.watchdog import Thread, Watchdog, threads_of
from tests.app.inference.conftest import RunningEngine, _running_engine

STEP = Entry(100.0, frozenset({1}))
_SPIN = "while True: pass"


def looks(watchdog: Watchdog, seconds: int, state: Callable[[float], Mapping[str, Thread]]) -> list[float]:
    """When it was said that the step hangs, looking twice a second."""
    times = [100 + half / 2 for half in range(2 * seconds)]
    return [now for now in times if watchdog.hanging([STEP], now, state(now)) is not None]


@pytest.mark.parametrize(
    "state",
    [
        lambda now: {"1": Thread(False, 5.0), "2": Thread(False, 0.0)},
        lambda now: {"1": Thread(True, now), "2": Thread(False, 0.0)},
        lambda now: {},
    ],
    ids=["sleeping", "spinning", "unknown"],
)
def test_what_sleeps_or_spins_hangs_and_is_told_once(state: Callable[[float], Mapping[str, Thread]]) -> None:
    assert looks(Watchdog(20), 30, state) == [120.5]


def test_what_would_run_and_cannot_does_not_hang_until_it_has_run_for_its_time() -> None:
    assert looks(Watchdog(20), 900, lambda now: {"1": Thread(True, 0.02 * now)}) == []
    assert looks(Watchdog(20), 1100, lambda now: {"1": Thread(True, 0.02 * now)})[0] >= 1100


def test_each_step_has_its_own_time() -> None:
    watchdog = Watchdog(20)
    for second in range(200):
        step = Entry(second // 15 * 15.0, frozenset({second}))
        assert watchdog.hanging([step], second, {"1": Thread(True, second)}) is None


@contextmanager
def spinning(processor: int, count: int) -> Iterator[None]:
    """Some processes that want one processor all the time, each in a session of its own."""
    spinners = [subprocess.Popen([sys.executable, "-c", _SPIN], start_new_session=True) for _ in range(count)]
    try:
        for spinner in spinners:
            os.sched_setaffinity(spinner.pid, {processor})
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


@contextmanager
def starved(process: int, processor: int) -> Iterator[None]:
    """All threads of a process have what others leave of one processor, and nobody leaves anything."""
    threads, everywhere = [int(path.name) for path in Path(f"/proc/{process}/task").iterdir()], os.sched_getaffinity(0)
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {processor})
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        with spinning(processor, 8):
            yield
    finally:
        for thread in threads:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            os.sched_setaffinity(thread, everywhere)


@pytest.fixture
def impatient(models_dir: Path) -> Iterator[RunningEngine]:
    """An engine that takes a step of two seconds for hung, and whose steps take a small part of that."""
    with _running_engine(step_timeout="2", context="2048", batch_size="64") as running:
        yield running


def test_a_starved_step_is_not_taken_for_hung(impatient: RunningEngine) -> None:
    wanted = GenerateRequest(tenant="t", prompt="one two three four " * 100, max_tokens=4, deadline=600)
    processor = min(os.sched_getaffinity(0))
    process = impatient.model_process()
    with ThreadPoolExecutor(1) as asking:
        with starved(process, processor):
            answer = asking.submit(impatient.client.generate, wanted)
            # Five times as long as a hung step has; it may well be answered meanwhile.
            end = time.monotonic() + 10
            while time.monotonic() < end and not answer.done():
                time.sleep(0.1)
        assert answer.result(600).prompt_tokens > 300
    found = impatient.client.stats()
    assert (found["quern_engine_hangs_total"], found["quern_engine_crashes_total"]) == (0, 0)
    assert impatient.model_process() == process


def test_threads_are_told_by_what_they_do() -> None:
    with subprocess.Popen([sys.executable, "-c", _SPIN]) as spinner:
        try:
            end = time.monotonic() + 60
            while not any(thread.runnable and thread.ran > 0.5 for thread in threads_of(spinner.pid).values()):
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            spinner.kill()
    assert threads_of(spinner.pid) == {}
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        try:
            end = time.monotonic() + 60
            while any(thread.runnable for thread in threads_of(sleeper.pid).values()):
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            sleeper.kill()
