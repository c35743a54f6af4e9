"""Wake-ups: a hint that may be lost, and that never fails who gives it."""

from pathlib import Path

import pytest

from quern.jobs.wake import Waker, make_huey
from quern.store.connection import Store


@pytest.fixture
def waker(store: Store) -> Waker:
    url = store.settings.redis_queue_url.get_secret_value
    make_huey("default", url).storage.flush_queue()
    return Waker(url)


def waiting(store: Store) -> int:
    return int(make_huey("default", store.settings.redis_queue_url.get_secret_value).storage.queue_size())


def test_a_queue_holds_no_more_wake_ups_than_it_has_workers(store: Store, waker: Waker) -> None:
    for _ in range(50):
        assert waker.wake("default", 3)
    assert waiting(store) == 4


def test_a_failed_wake_up_fails_nobody(run_directory: Path) -> None:
    waker = Waker(lambda: f"unix://{run_directory}/nobody.sock")
    assert waker.wake("default") is False
    waker.wake_all([("default", 5, "ten_a", None)])
