"""The contract between the queue and what its jobs do. The queue knows no workflow; it knows handlers by kind."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pymongo.client_session import ClientSession

from quern.jobs.model import Job, NewJob, Queue, State
from quern.store.connection import Db, Store


class RetryLater(Exception):
    """The job failed in a way that may pass.

    Args:
        reason: one line without personal data. after: seconds until the next try; None: the backoff decides.
        charged: False when the job is not to blame (the engine crashed on a neighbour, a dependency is down).
        last: True when no further try should follow (the handler's own schedule is exhausted).
    """

    def __init__(self, reason: str, *, after: float | None = None, charged: bool = True, last: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after, self.charged, self.last = reason, after, charged, last


class Refused(Exception):
    """The job can never succeed: it goes to the dead letters at once. `reason`: one line without personal data."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Obsolete(Exception):
    """There is nothing left to do: what the job works on is gone. It is cancelled, which alarms nobody."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Followup:
    """What the end of a job sets off, written in the same transaction."""

    release: Sequence[str] = ()
    """Blocked jobs that may run now."""
    skip: Sequence[str] = ()
    """Blocked jobs that will never run."""
    enqueue: Sequence[NewJob] = ()


@dataclass
class Context:
    """What a handler may use while it runs."""

    store: Store
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the lease is lost, the job is cancelled or the worker must go: give up at the next good place."""
    traceparent: str | None = None

    @property
    def db(self) -> Db:
        return self.store.db


#: Runs the job and returns its result (JSON; small; without personal data unless the job has a subject).
Run = Callable[[Job, Context], dict[str, Any] | None]
#: Called inside the transaction that ends the job, whatever the end; writes what follows from it.
OnEnd = Callable[[Db, ClientSession, Job, State, dict[str, Any] | None, str | None], Followup]


@dataclass(frozen=True)
class Handler:
    """What to do with jobs of one kind."""

    kind: str
    run: Run
    on_end: OnEnd | None = None
    max_failures: int | None = None
    """None: the setting."""
    keeps_result: bool = True
    """False when `on_end` stores the result where it belongs (and where erasure finds it)."""


@dataclass(frozen=True)
class Family:
    """Handlers that are made together, when one of them is first wanted: what they import is much to hold for all."""

    queues: Mapping[str, Queue]
    """Kind to the queue that its jobs usually wait in."""
    make: Callable[[], Iterable[Handler]]
    """One handler for each of the kinds."""


class Registry:
    """Handlers by kind."""

    def __init__(self, handlers: Iterable[Handler] = (), families: Sequence[Family] = ()) -> None:
        self._by_kind = {handler.kind: handler for handler in handlers}
        self.families = families

    def get(self, kind: str) -> Handler | None:
        """The handler, or None during a rolling upgrade: the job then waits for a worker that knows it."""
        if kind not in self._by_kind:
            # Two threads may both make a family; either's handlers will do.
            for family in self.families:
                if kind in family.queues:
                    self._make(family)
        return self._by_kind.get(kind)

    def prepare(self, queue: Queue) -> None:
        """Make what the jobs of a queue need now, so that its first job need not wait for it."""
        for family in self.families:
            if queue in family.queues.values():
                self._make(family)

    def _make(self, family: Family) -> None:
        self._by_kind |= {handler.kind: handler for handler in family.make()}


@dataclass(frozen=True)
class Tick:
    """A periodic job: due whenever `minute % every == at`, counted in minutes since 1970 (UTC)."""

    name: str
    make: Callable[[datetime], NewJob]
    every: int
    at: int = 0
