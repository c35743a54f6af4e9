"""Wake-ups: Huey carries "there is work in this queue", nothing else.

One stable task a queue, whose meaning never changes: a consumer of any version knows it. Wake-ups may be merged or
lost; the reconciler sends another within its period.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final

from huey import RedisHuey
from huey.api import TaskWrapper
from redis.exceptions import RedisError

from quern.jobs.model import CONCURRENCY, Queue
from quern.observe import metrics
from quern.store.redis_connection import pool

TASK: Final = "work"
RELAY: Final = "relay"
_log = logging.getLogger(__name__)


def make_huey(queue: str, url: str, timeout: float = 1.0) -> RedisHuey:
    """The Huey of one queue. Results, schedules and retries stay unused: the job document has them.

    `timeout` (seconds) must exceed Huey's blocking read of 1 s in a consumer.
    """
    return RedisHuey(f"quern_{queue}", results=False, utc=True, connection_pool=pool(url, timeout))


def bind(huey: RedisHuey, work: Callable[[], None]) -> TaskWrapper:
    """Make `work` the one task of this Huey."""
    return huey.task(name=TASK)(work)


def _never_runs_here() -> None:
    raise RuntimeError("a waker does not work; start `quern worker` for this queue")


class Waker:
    """Sends wake-ups. A failed one is counted and forgotten: it never fails who called."""

    def __init__(self, url: str) -> None:
        names = [*(queue.value for queue in Queue), RELAY]
        self._hueys = {name: make_huey(name, url, timeout=0.5) for name in names}
        self._tasks = {name: bind(huey, _never_runs_here) for name, huey in self._hueys.items()}
        self._most: dict[str, int] = {queue.value: CONCURRENCY[queue] for queue in Queue} | {RELAY: 1}

    def wake(self, queue: str, count: int = 1) -> bool:
        """Wake up to `count` workers of a queue; fewer where enough wake-ups wait already. False when Redis is away."""
        try:
            waiting = self._hueys[queue].storage.queue_size()
            for _ in range(min(count, self._most[queue] - waiting)):
                self._tasks[queue]()
        except (RedisError, OSError) as error:
            metrics.WAKE_FAILED.labels(queue).inc()
            _log.warning("a wake-up was not sent; the reconciler will", extra={"queue": queue, "error": type(error).__name__})
            return False
        return True

    def wake_all(self, opened: Iterable[tuple[str, int, str, object]]) -> None:
        """Wake the queues of work that was just opened."""
        counts: dict[str, int] = {}
        for queue, *_ in opened:
            counts[queue] = counts.get(queue, 0) + 1
        for queue, count in counts.items():
            self.wake(queue, count)
