"""What workers tell of answers in the making, for all streams of this process over one subscription to Redis."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from quern.openai import deltas
from quern.openai.outcome import Record

_log = logging.getLogger(__name__)


class Feed:
    """One client's view of one answer: the records that have come, and a bell that rings when there are more."""

    __slots__ = ("_records", "bell", "request")

    def __init__(self, request: str) -> None:
        self.request = request
        self.bell = asyncio.Event()
        self._records: dict[int, Record] = {}

    def put(self, number: int, record: Record) -> None:
        self._records.setdefault(number, record)
        self.bell.set()

    def after(self, count: int) -> list[Record]:
        """The records that follow the first `count`, as far as none is missing; they are let go of."""
        found = []
        while (record := self._records.pop(count, None)) is not None:
            found.append(record)
            count += 1
        return found

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come."""
        return not self._records

    def lacks(self, count: int) -> bool:
        """Whether a record was missed: there is a later one, and not this."""
        return bool(self._records) and count not in self._records


class Feeds:
    """Of one event loop; `run` must be running. `url` gives where Redis is, as of now."""

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self._followed: defaultdict[str, set[Feed]] = defaultdict(set)

    @contextmanager
    def follow(self, request: str) -> Iterator[Feed]:
        """Hear what is told of a request from now on; `catch_up` adds what was told before."""
        feed = Feed(request)
        self._followed[request].add(feed)
        try:
            yield feed
        finally:
            self._followed[request].discard(feed)
            if not self._followed[request]:
                del self._followed[request]

    async def catch_up(self, feed: Feed) -> None:
        """Add what is kept of the records told so far. Without Redis the answer comes whole at its end."""
        redis = Redis.from_url(self._url(), socket_timeout=2.0)
        with suppress(RedisError, OSError, TimeoutError):
            await self._load(redis, feed)
        await redis.aclose()

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            redis = Redis.from_url(
                self._url(), socket_timeout=None, socket_connect_timeout=2.0, health_check_interval=15
            )
            try:
                async with redis.pubsub() as subscription:
                    await subscription.subscribe(deltas.CHANNEL)
                    for feed in [feed for feeds in self._followed.values() for feed in feeds]:
                        await self._load(redis, feed)
                    async for message in subscription.listen():
                        if message["type"] == "message":
                            self._hear(message["data"])
            except (RedisError, OSError, TimeoutError) as error:
                _log.warning("streams stand still: Redis is away", extra={"error": type(error).__name__})
            finally:
                with suppress(RedisError, OSError):
                    await redis.aclose()
            await asyncio.sleep(0.5)

    def _hear(self, message: bytes) -> None:
        request = message.split(b" ", 1)[0].decode()
        feeds = self._followed.get(request)
        if feeds:
            _, number, record = deltas.announced(message)
            for feed in feeds:
                feed.put(number, record)

    @staticmethod
    async def _load(redis: "Redis", feed: Feed) -> None:
        for number, raw in enumerate(await redis.lrange(deltas.key(feed.request), 0, -1)):
            feed.put(number, deltas.load(raw))
