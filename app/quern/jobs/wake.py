"""Wake-ups: Huey carries "there is work in this queue", nothing else.

One stable task a queue, whose meaning never changes: a consumer of any version knows it. Wake-ups may be merged or
lost; the reconciler sends another within its period.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from huey import RedisHuey
from huey.api import TaskWrapper
from redis.exceptions import RedisError

from quern.jobs.model import CONCURRENCY, Queue
from quern.observe import metrics
from quern.store.redis_connection import Url, connect, pool

TASK: Final = "work"
#: Adds wake-ups until so many wait: KEYS the queue's list, ARGV the message, how many are wanted, how many may wait.
_WAKE: Final = """
local n = math.min(tonumber(ARGV[2]), tonumber(ARGV[3]) - redis.call('LLEN', KEYS[1]))
for _ = 1, n do redis.call('LPUSH', KEYS[1], ARGV[1]) end
"""
RELAY: Final = "relay"
#: Seconds in which nudges of one process are merged.
_MERGED: Final = 0.02
_log = logging.getLogger(__name__)


def make_huey(queue: str, url: Url, timeout: float = 1.0) -> RedisHuey:
    """The Huey of one queue. Results, schedules and retries stay unused: the job document has them.

    `timeout` (seconds) must exceed Huey's blocking read of 1 s in a consumer.
    """
    return RedisHuey(f"quern_{queue}", results=False, utc=True, connection_pool=pool(url, timeout))


def bind(huey: RedisHuey, work: Callable[[], None]) -> TaskWrapper:
    """Make `work` the one task of this Huey, under a name that does not depend on who works."""

    def run() -> None:
        work()

    return huey.task(name=TASK)(run)


def _never_runs_here() -> None:
    raise RuntimeError("a waker does not work; start `quern worker` for this queue")


class Waker:
    """Sends wake-ups. A failed one is counted and forgotten: it never fails who called."""

    def __init__(self, url: Url) -> None:
        most: dict[str, int] = {queue.value: CONCURRENCY[queue] for queue in Queue} | {RELAY: 1}
        redis = connect(url, timeout=0.5)
        self._add = redis.register_script(_WAKE)
        self._messages: dict[str, tuple[str, bytes, int]] = {}
        for name, waiting in most.items():
            huey = make_huey(name, url, timeout=0.5)
            # All wake-ups of a queue are the same message: nobody ever asks for one of them by its id.
            message = huey.serialize_task(bind(huey, _never_runs_here).s())
            self._messages[name] = (huey.storage.queue_key, message, waiting)

    def wake(self, queue: str, count: int = 1) -> bool:
        """Wake up to `count` workers of a queue; fewer where enough wake-ups wait already. False when Redis is away."""
        key, message, most = self._messages[queue]
        try:
            self._add(keys=[key], args=[message, count, most])
        except (RedisError, OSError) as error:
            metrics.WAKE_FAILED.labels(queue).inc()
            _log.warning(
                "a wake-up was not sent; the reconciler will", extra={"queue": queue, "error": type(error).__name__}
            )
            return False
        return True

    def wake_all(self, opened: Iterable[tuple[str, int, str, object]]) -> None:
        """Wake the queues of work that was just opened."""
        counts: dict[str, int] = {}
        for queue, *_ in opened:
            counts[queue] = counts.get(queue, 0) + 1
        for queue, count in counts.items():
            self.wake(queue, count)


class Nudger:
    """Wakes queues from a thread of its own: who nudges never waits for Redis, and many nudges make one wake-up."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._lock = threading.Condition()
        self._wanted: set[str] = set()
        self._pid = 0

    def nudge(self, queue: str) -> None:
        with self._lock:
            if self._pid != os.getpid():
                # Threads do not survive the fork of a pre-forking server.
                self._pid = os.getpid()
                threading.Thread(target=self._run, name="nudger", daemon=True).start()
            self._wanted.add(queue)
            self._lock.notify()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._wanted:
                    self._lock.wait()
                wanted, self._wanted = self._wanted, set()
            for queue in wanted:
                self._waker.wake(queue)
            # Nudges of the next moment are one wake-up; the relay that they are for takes a breath of its own.
            time.sleep(_MERGED)
