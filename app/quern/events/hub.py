"""One change stream for all clients of this process.

The change stream says only which job changed; of those, the jobs that somebody follows are read again, all that changed
meanwhile in one query. A subscriber always gets the whole log, so one that is behind skips straight to the newest and
nothing queues up; an event is known by its `seq`, so none is lost and none comes twice, however often the change stream
breaks. After a break, every followed job is read again.
"""

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError

from quern.events import metrics, sse
from quern.jobs.model import ENDED
from quern.store.clock import rfc3339
from quern.store.connection import Document

_log = logging.getLogger(__name__)

_PIPELINE: Final[list[Document]] = [
    {"$match": {"operationType": {"$in": ["update", "replace", "delete"]}}},
    {"$project": {"documentKey": 1}},
]
_FIELDS: Final = {"tenant": 1, "state": 1, "log": 1}
_MOST_IN_ONE_QUERY: Final = 500
_STALLED_SECONDS: Final = 10.0
_LONGEST_PAUSE_SECONDS: Final = 5.0


class JobLog:
    """A job's log as it was read: whose it is, whether it has ended, and its events."""

    __slots__ = ("_entries", "_frames", "ended", "tenant")

    def __init__(self, document: Document) -> None:
        self.tenant: str = document["tenant"]
        self.ended: bool = document["state"] in ENDED
        self._entries: list[Mapping[str, Any]] = document["log"]
        self._frames: dict[int, bytes] = {}

    @property
    def last(self) -> int:
        """The newest event's number."""
        return max((entry["seq"] for entry in self._entries), default=0)

    def after(self, number: int) -> list[bytes]:
        """The events with a greater number, in order, each as it goes over the wire."""
        fresh = sorted((entry for entry in self._entries if entry["seq"] > number), key=lambda entry: int(entry["seq"]))
        return [self._frame(entry) for entry in fresh]

    def _frame(self, entry: Mapping[str, Any]) -> bytes:
        number = entry["seq"]
        if number not in self._frames:
            document = {"seq": number, "type": entry["type"], "at": rfc3339(entry["at"]), "data": entry["data"]}
            self._frames[number] = sse.event(number, entry["type"], document)
        return self._frames[number]


class Subscription:
    """One client's view of one job: the newest log, and a bell that rings when there is a newer one."""

    __slots__ = ("_bell", "log")

    def __init__(self) -> None:
        self._bell = asyncio.Event()
        self.log: JobLog | None = None
        """None until the first read, and when there is no such job."""

    async def changed(self) -> None:
        """Wait for the next ring; those in between count as one."""
        await self._bell.wait()
        self._bell.clear()

    def ring(self) -> None:
        """Wake the client."""
        self._bell.set()


class Hub:
    """Tells subscribers when their jobs change. Of one event loop; `run` must be running.

    `jobs` gives the collection as of now, with read concern `majority`.
    """

    def __init__(self, jobs: Callable[[], AsyncCollection[Document]]) -> None:
        self._jobs = jobs
        self._followed: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._stale: set[str] = set()
        self._work = asyncio.Event()
        self._reads_fail = False
        self._following = False
        self.draining = False

    @property
    def live(self) -> bool:
        """Whether changes arrive now."""
        return self._following and not self._reads_fail

    @property
    def away(self) -> bool:
        """Whether the last read failed, so that a new subscriber would wait for nothing."""
        return self._reads_fail

    @contextmanager
    def subscribe(self, job: str) -> Iterator[Subscription]:
        """Follow a job; the bell rings as soon as it was first read, whether it exists or not."""
        subscription = Subscription()
        self._followed[job].add(subscription)
        metrics.WATCHED.set(len(self._followed))
        self._read_again([job])
        try:
            yield subscription
        finally:
            self._followed[job].discard(subscription)
            if not self._followed[job]:
                del self._followed[job]
            metrics.WATCHED.set(len(self._followed))

    def drain(self) -> None:
        """Wake every subscriber for good: the process is about to end."""
        self.draining = True
        for subscriptions in self._followed.values():
            for subscription in subscriptions:
                subscription.ring()

    async def run(self) -> None:
        """Follow and read until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._read())

    def _read_again(self, jobs: Iterable[str]) -> None:
        self._stale.update(jobs)
        self._work.set()

    async def _follow(self) -> None:
        failures = 0
        while True:
            try:
                async with asyncio.timeout(_STALLED_SECONDS):
                    stream = await self._jobs().watch(_PIPELINE, batch_size=1000)
                async with stream:
                    # Only now: what is written from here on is in the stream, and what was written before is read.
                    # So a new stream needs no resume token; pymongo keeps one for breaks that it mends itself.
                    self._read_again(self._followed)
                    self._following, failures = True, 0
                    metrics.LIVE.set(1)
                    while stream.alive:
                        async with asyncio.timeout(_STALLED_SECONDS):
                            change = await stream.try_next()
                        if change is not None and (job := change["documentKey"]["_id"]) in self._followed:
                            self._read_again([job])
                _log.warning("the change stream ended: the collection was dropped or renamed; it is opened again")
            except (PyMongoError, TimeoutError) as error:
                _log.warning("the change stream broke; it is opened again", extra={"error": type(error).__name__})
            self._following = False
            metrics.LIVE.set(0)
            metrics.BREAKS.inc()
            failures += 1
            await _pause(failures)

    async def _read(self) -> None:
        failures = 0
        while True:
            await self._work.wait()
            self._work.clear()
            wanted = [job for job in self._stale if job in self._followed]
            self._stale.clear()
            if not wanted:
                self._reads_fail = False
            for start in range(0, len(wanted), _MOST_IN_ONE_QUERY):
                chunk = wanted[start : start + _MOST_IN_ONE_QUERY]
                try:
                    async with asyncio.timeout(_STALLED_SECONDS):
                        await self._deliver(chunk)
                except (PyMongoError, TimeoutError) as error:
                    _log.warning("jobs could not be read; they are tried again", extra={"error": type(error).__name__})
                    self._reads_fail = True
                    self._read_again(wanted[start:])
                    failures += 1
                    await _pause(failures)
                    break
                self._reads_fail, failures = False, 0

    async def _deliver(self, jobs: list[str]) -> None:
        logs = {
            document["_id"]: JobLog(document)
            async for document in self._jobs().find({"_id": {"$in": jobs}}, _FIELDS, batch_size=_MOST_IN_ONE_QUERY)
        }
        for job in jobs:
            for subscription in self._followed.get(job, ()):
                subscription.log = logs.get(job)
                subscription.ring()


async def _pause(failures: int) -> None:
    """Exponential backoff from 0.1 s, with jitter over its upper half."""
    longest = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2.0 ** min(failures, 10))
    await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - spreads load, guards nothing
