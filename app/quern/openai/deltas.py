"""Text on its way: what a worker tells of an answer while it is made, over Redis `queue`.

Each record gets a number, is kept in a list (for who comes later) and published (for who is there). None of it is the
truth: the whole answer, with the borders of its records, is in the request's document once the job has ended.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import orjson
from redis import Redis
from redis.exceptions import RedisError

from quern.inference.protocol import TokenLogprob
from quern.openai.outcome import Piece, Record

_log = logging.getLogger(__name__)

CHANNEL: Final = "quern:deltas"
#: Seconds between two records of an answer: a client sees text flow, and Redis gets few writes.
EVERY: Final = 0.06
#: Seconds that the list outlives its last record.
KEPT: Final = 900


def key(request: str) -> str:
    """The list of a request's records."""
    return f"quern:deltas:{request}"


def gone_key(request: str) -> str:
    """Set when nobody waits for a request any more."""
    return f"quern:gone:{request}"


def dump(record: Record) -> bytes:
    """A record on the wire."""
    return orjson.dumps(
        [
            [index, text, None if logprobs is None else [one.model_dump() for one in logprobs]]
            for index, text, logprobs in record
        ]
    )


def load(raw: bytes | str) -> Record:
    """A record from the wire."""
    return [
        (index, text, None if logprobs is None else [TokenLogprob.model_validate(one) for one in logprobs])
        for index, text, logprobs in orjson.loads(raw)
    ]


def announcement(request: str, number: int, raw: bytes) -> bytes:
    """What is published of a record."""
    return b"%s %d %s" % (request.encode(), number, raw)


def announced(message: bytes) -> tuple[str, int, Record]:
    """The request, number and record of an announcement."""
    request, number, raw = message.split(b" ", 2)
    return request.decode(), int(number), load(raw)


class Teller:
    """Tells one request's answer. Safe to share between the threads that make its choices."""

    def __init__(self, redis: "Redis", request: str, told: list[Record]) -> None:
        self._redis, self._request = redis, request
        self.records = list(told)
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[str, list[TokenLogprob] | None]] = {}
        self._last = 0.0

    def tell(self, piece: Piece) -> None:
        """Take more of a choice in; it goes out with others when it is time."""
        index, text, logprobs = piece
        with self._lock:
            before, earlier = self._pending.get(index, ("", None))
            joined = None if logprobs is None else [*(earlier or []), *logprobs]
            self._pending[index] = (before + text, joined)
            if time.monotonic() - self._last >= EVERY:
                self._flush()

    def flush(self) -> None:
        """Send what is left."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        record: Record = [
            (index, text, logprobs) for index, (text, logprobs) in sorted(self._pending.items()) if text or logprobs
        ]
        self._pending.clear()
        if not record:
            return
        self._last = time.monotonic()
        self.records.append(record)
        raw = dump(record)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.rpush(key(self._request), raw)
                pipeline.expire(key(self._request), KEPT)
                pipeline.publish(CHANNEL, announcement(self._request, len(self.records) - 1, raw))
                pipeline.execute()
        except (RedisError, OSError) as error:
            # The stream stands still; the answer comes whole at its end.
            _log.warning("a piece of an answer was not told", extra={"error": type(error).__name__})


def told_before(redis: "Redis", request: str) -> list[Record]:
    """What an attempt that ended without a word had told."""
    try:
        return [load(raw) for raw in redis.lrange(key(request), 0, -1)]
    except (RedisError, OSError):
        return []


def watch_gone(redis: "Redis", request: str, stop: Callable[[], bool]) -> Callable[[], bool]:
    """Says True as soon as the worker must stop, or nobody waits for the request any more."""

    def gone() -> bool:
        if stop():
            return True
        try:
            return bool(redis.exists(gone_key(request)))
        except (RedisError, OSError):
            return False

    return gone
