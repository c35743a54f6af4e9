"""What fails is let alone for a while, then tried once."""

from collections.abc import Callable

import pytest

from quern.breaker import Breaker, CircuitOpenError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(3, 5.0, (OSError,), clock)


def fail(breaker: Breaker, kind: Callable[[], Exception] = OSError, times: int = 1) -> None:
    for _ in range(times):
        error = kind()
        with pytest.raises(type(error)), breaker.guard():
            raise error


def passes(breaker: Breaker) -> bool:
    try:
        with breaker.guard():
            return True
    except CircuitOpenError:
        return False


def test_failures_in_a_row_open_the_circuit(breaker: Breaker) -> None:
    fail(breaker, times=2)
    assert passes(breaker)
    fail(breaker, times=3)
    assert not passes(breaker)


def test_an_answer_that_is_no_success_is_no_failure_either(breaker: Breaker) -> None:
    fail(breaker, times=2)
    fail(breaker, ValueError)
    fail(breaker, times=2)
    assert passes(breaker)


def test_after_the_pause_one_probe_passes_and_closes_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, times=3)
    clock.now += 5.1
    with breaker.guard():
        assert not passes(breaker)
    assert passes(breaker)


def test_a_probe_that_fails_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, times=3)
    clock.now += 5.1
    fail(breaker)
    assert breaker.is_open
    assert not passes(breaker)
    clock.now += 5.1
    assert passes(breaker)
