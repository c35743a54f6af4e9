"""Combining: nobody alone waits, a crowd shares trips, and each thread gets its own outcome."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from quern.store.combine import Combiner

LIMIT = 30.0


def test_one_alone_goes_at_once_and_alone() -> None:
    batches: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        return [item * 2 for item in items]

    combiner = Combiner(work)
    assert [combiner(1), combiner(2)] == [2, 4]
    assert batches == [[1], [2]]


def test_those_who_come_meanwhile_go_together_and_no_more_than_the_most() -> None:
    batches: list[list[int]] = []
    away, back = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        away.set()
        assert back.wait(LIMIT)
        return [-item for item in items]

    combiner = Combiner(work, most=3)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(combiner, 0)
        assert away.wait(LIMIT)
        others = [pool.submit(combiner, number) for number in range(1, 8)]
        while len(combiner._waiting) < 7:
            assert not first.done()
        back.set()
        assert first.result(LIMIT) == 0
        assert [other.result(LIMIT) for other in others] == [-number for number in range(1, 8)]
    assert [len(batch) for batch in batches] == [1, 3, 3, 1]


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_each_gets_the_outcome_of_its_own_item_under_load(at_once: int) -> None:
    def work(items: list[int]) -> list[int | BaseException]:
        return [KeyError(item) if item % 7 == 0 else item + 1 for item in items]

    combiner: Combiner[int, int] = Combiner(work, most=5, at_once=at_once)

    def ask(number: int) -> bool:
        try:
            return combiner(number) == number + 1
        except KeyError as error:
            return error.args == (number,) and number % 7 == 0

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(3000)))


def test_a_trip_that_fails_fails_everyone_on_it_and_nobody_after_it() -> None:
    fails = True

    def work(items: list[int]) -> list[int]:
        if fails:
            raise ConnectionError("away")
        return items

    combiner = Combiner(work)
    with pytest.raises(ConnectionError):
        combiner(1)
    fails = False
    assert combiner(2) == 2


def test_a_leader_that_lingers_takes_a_returning_crowd_along_and_alone_waits_for_nobody() -> None:
    batches: list[int] = []

    def work(items: list[int]) -> list[int]:
        batches.append(len(items))
        return items

    combiner = Combiner(work, linger=5.0)
    for number in range(3):
        assert combiner(number) == number
    assert batches == [1, 1, 1], "alone"
    combiner._crowd = 4
    began = threading.Barrier(4)

    def ask(number: int) -> int:
        began.wait(LIMIT)
        return combiner(number)

    combiner._linger = 1.0
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [0, 1, 2, 3]
    assert batches[3:] == [4]
