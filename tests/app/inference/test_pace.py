"""What the choice of threads promises: the fastest by measurement, and quick to notice when that changes."""

from __future__ import annotations

import os

from quern.inference.pace import ThreadPace, free_cores, thread_choices


def _pace(*choices: int, free: int = 64) -> ThreadPace:
    return ThreadPace(choices, free=lambda: free)


def _run(pace: ThreadPace, seconds: dict[int, float], steps: int, tokens: int = 8) -> dict[int, int]:
    used = dict.fromkeys(seconds, 0)
    for _ in range(steps):
        threads = pace.choose(tokens)
        used[threads] += 1
        pace.observe(tokens, threads, seconds[threads])
    return used


def test_a_quiet_machine_uses_every_thread() -> None:
    used = _run(_pace(2, 1), {2: 1.0, 1: 1.8}, 500)
    assert used[2] > 480


def test_a_busy_machine_uses_one_thread() -> None:
    used = _run(_pace(2, 1), {2: 10.0, 1: 2.0}, 500)
    assert used[1] > 480


def test_a_change_is_noticed_within_a_few_steps() -> None:
    pace = _pace(2, 1)
    _run(pace, {2: 1.0, 1: 1.8}, 500)
    used = _run(pace, {2: 20.0, 1: 2.0}, 20)
    assert used[1] >= 15


def test_a_machine_that_comes_to_rest_gets_its_threads_back() -> None:
    pace = _pace(2, 1)
    _run(pace, {2: 20.0, 1: 2.0}, 100)
    assert _run(pace, {2: 1.0, 1: 1.8}, 1500)[2] > 700


def test_sizes_of_steps_are_learnt_apart() -> None:
    pace = _pace(2, 1)
    _run(pace, {2: 1.0, 1: 0.5}, 100, tokens=1)
    assert _run(pace, {2: 1.0, 1: 1.8}, 200, tokens=512)[2] > 180


def test_choices_are_all_half_and_one() -> None:
    assert thread_choices(8) == (8, 4, 1)
    assert thread_choices(2) == (2, 1)
    assert thread_choices(1) == (1,)


def test_more_threads_than_free_cores_are_not_even_tried() -> None:
    assert _run(_pace(2, 1, free=1), {2: 1.0, 1: 1.8}, 100) == {2: 0, 1: 100}


def test_a_crowded_machine_gets_one_thread_whatever_was_fast_before() -> None:
    cores = 4
    pace = ThreadPace((2, 1), free=lambda: cores)
    _run(pace, {2: 1.0, 1: 1.8}, 50)
    cores = 0
    assert _run(pace, {2: 1.0, 1: 1.8}, 50) == {2: 0, 1: 50}


def test_free_cores_are_read_from_the_kernel() -> None:
    assert -10_000 < free_cores() <= (os.cpu_count() or 1)
