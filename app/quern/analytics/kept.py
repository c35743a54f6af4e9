"""Answers that are kept: in Redis `cache`, keyed by the tenant's part of the warehouse and by the question.

A key names the files that were read, so nothing is ever stale: a publication that changes a tenant's files gives its
questions new keys. Redis may forget any of it, or be away: then the answer is computed.

What is dear to find in a file, the terms of its texts, is kept by file, so that a question pays for new files only. It
has words of answers in it: when a publication replaces a file, what was kept of it goes at once.
"""

import logging
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from hashlib import sha256
from typing import Final

import orjson
import pyarrow as pa
from redis import Redis
from redis.exceptions import RedisError

from quern.analytics.answer import Answer
from quern.analytics.engine import Part
from quern.analytics.question import Freshness, Question

_log = logging.getLogger(__name__)

_PREFIX: Final = "quern:analytics:2"
_PART: Final = f"{_PREFIX}:part:"
_FRESHNESS: Final = b"freshness"
#: Of the answers that are held in memory besides: the ones asked last.
_NEAR: Final = 256
_NEAR_BYTES: Final = 1 << 20
#: As long as the warehouse keeps the files that were replaced.
_RETIRED_SECONDS: Final = 900
#: What was found in one file: how long it is kept, so that every night goes on from the last, and bytes of the largest.
_PART_SECONDS: Final = 7 * 86_400
_PART_BYTES: Final = 8 << 20
#: Questions of a tenant that are remembered, to be answered anew after a publication.
_REMEMBERED: Final = 30
_REMEMBERED_SECONDS: Final = 7 * 86_400


class Kept:
    """The store of answers; safe to share between threads."""

    def __init__(self, redis: "Redis | None", seconds: int) -> None:
        self._redis, self._seconds = redis, seconds
        self._near: OrderedDict[str, Answer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, stamp: str, question: Question) -> Answer | None:
        """The answer to a question as of a stamp (`answer.stamp`), if it is still known."""
        key = f"{_PREFIX}:{stamp}:{question.fingerprint}"
        with self._lock:
            if (near := self._near.get(key)) is not None:
                self._near.move_to_end(key)
                return near
        if self._redis is None:
            return None
        try:
            raw = self._redis.get(key)
        except RedisError:
            _log.warning("Redis `cache` does not answer; answers are computed", exc_info=True)
            return None
        if not isinstance(raw, bytes):
            return None
        table = pa.ipc.open_stream(raw).read_all()
        made = Answer(table, Freshness.model_validate_json(table.schema.metadata[_FRESHNESS]))
        self._hold(key, made)
        return made

    def put(self, stamp: str, question: Question, answer: Answer) -> None:
        """Keep an answer."""
        key = f"{_PREFIX}:{stamp}:{question.fingerprint}"
        self._hold(key, answer)
        if self._redis is None:
            return
        marked = answer.table.replace_schema_metadata({_FRESHNESS: answer.freshness.model_dump_json()})
        try:
            self._redis.set(key, _packed(marked), ex=self._seconds)
        except RedisError:
            _log.warning("Redis `cache` does not answer; an answer is not kept", exc_info=True)

    def _hold(self, key: str, answer: Answer) -> None:
        if answer.table.nbytes > _NEAR_BYTES:
            return
        with self._lock:
            self._near[key] = answer
            self._near.move_to_end(key)
            while len(self._near) > _NEAR:
                self._near.popitem(last=False)

    def get_part(self, part: Part) -> pa.Table | None:
        """What was found in a file, if it is still known. Implements `answer.Parts`."""
        if self._redis is None:
            return None
        try:
            raw = self._redis.get(_key_of(part))
        except RedisError:
            return None
        return pa.ipc.open_stream(raw).read_all() if isinstance(raw, bytes) else None

    def put_part(self, part: Part, rows: pa.Table) -> bool:
        """Keep what was found in a file; whether it is kept. Implements `answer.Parts`."""
        if self._redis is None or len(packed := _packed(rows)) > _PART_BYTES:
            return False
        try:
            self._redis.set(_key_of(part), packed, ex=_PART_SECONDS)
        except RedisError:
            _log.warning("Redis `cache` does not answer; what was found in a file is not kept", exc_info=True)
            return False
        return True

    def drop_part(self, part: Part) -> None:
        """Let go of what was found in a file. Implements `answer.Parts`."""
        if self._redis is not None:
            with suppress(RedisError):
                self._redis.delete(_key_of(part))

    def retire_parts(self, files: set[str]) -> None:
        """Let go of what was found in other files than these, which are all that a warehouse has."""
        if self._redis is None:
            return
        try:
            for raw in self._redis.scan_iter(match=f"{_PART}*", count=1000):
                if raw.decode().removeprefix(_PART).rpartition(":")[0] not in files:
                    self._redis.delete(raw)
        except RedisError:
            _log.warning("Redis `cache` does not answer; what was found in replaced files ends soon", exc_info=True)

    def retire(self, stamp: str) -> None:
        """Let go of what is kept under other stamps of the same tenant: at once here, soon in Redis.

        A list that was begun may go on for a while; what a person's erasure took away must not outlive it.
        """
        tenant = stamp.partition(":")[0]
        own, current = f"{_PREFIX}:{tenant}:", f"{_PREFIX}:{stamp}:"
        with self._lock:
            for key in [key for key in self._near if key.startswith(own) and not key.startswith(current)]:
                del self._near[key]
        if self._redis is None:
            return
        try:
            for raw in self._redis.scan_iter(match=f"{own}*", count=1000):
                # NX and LT would need Redis 7; a key without an end is none of ours.
                if not raw.startswith(current.encode()) and int(self._redis.ttl(raw)) > _RETIRED_SECONDS:
                    self._redis.expire(raw, _RETIRED_SECONDS)
        except RedisError:
            _log.warning("Redis `cache` does not answer; old answers end by themselves", exc_info=True)

    def remember(self, tenant: str, question: Question) -> None:
        """Note that a question was asked, so that it is answered beforehand after the next publication."""
        if self._redis is None:
            return
        key = f"{_PREFIX}:asked:{tenant}"
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.zadd(key, {question.model_dump_json(by_alias=True): time.time()})
                pipe.zremrangebyrank(key, 0, -_REMEMBERED - 1)
                pipe.expire(key, _REMEMBERED_SECONDS)
                pipe.execute()
        except RedisError:
            _log.debug("a question is not remembered", exc_info=True)

    def remembered(self, tenant: str) -> list[Question]:
        """The questions that a tenant asked last, newest first."""
        if self._redis is None:
            return []
        try:
            found = self._redis.zrange(f"{_PREFIX}:asked:{tenant}", 0, -1, desc=True)
        except RedisError:
            return []
        return [Question.model_validate(orjson.loads(raw)) for raw in found if isinstance(raw, bytes)]


def _key_of(part: Part) -> str:
    bound = sorted(part.statement.parameters.items())
    return f"{_PART}{part.file}:{sha256(repr((part.statement.sql, bound)).encode()).hexdigest()[:32]}"


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed
