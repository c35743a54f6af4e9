"""The scheduler process: reconciles, makes periodic jobs, and does what one process must do now and then."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pymongo.errors import PyMongoError

from quern.jobs import reconciler, schedule
from quern.jobs.enqueue import Enqueuer
from quern.jobs.handler import Registry, Tick
from quern.jobs.wake import Waker
from quern.store.connection import Store

_log = logging.getLogger(__name__)
_TICK_EVERY = 5.0
#: Passes of the reconciler for one that also mends what crashes and deadlines left: that may wait a little.
_MEND_EVERY = 4


@dataclass(frozen=True)
class Chore:
    """Work that only the leader does, every `every` seconds."""

    name: str
    every: float
    do: Callable[[], object]


class _Lead:
    """Whether this scheduler does a chore: a lease, which is renewed by the time that half of it is over."""

    def __init__(self, store: Store, chore: Chore, holder: str) -> None:
        self._take = partial(schedule.take_lead, store, chore.name, holder, seconds=chore.every + 10)
        self._half = (chore.every + 10) / 2
        self._renew = 0.0

    def holds(self) -> bool:
        now = time.monotonic()
        if now < self._renew:
            return True
        if not self._take():
            return False
        self._renew = now + self._half
        return True


def _chore(chore: Chore, lead: _Lead) -> None:
    if lead.holds():
        chore.do()


def _attempt(name: str, do: Callable[[], object]) -> None:
    """Do one part of a pass; whatever is wrong with it must not stop the others."""
    try:
        do()
    except PyMongoError as error:
        _log.warning("the scheduler waits for the database", extra={"part": name, "error": type(error).__name__})
    except Exception:
        _log.exception("a part of the scheduler's pass failed", extra={"part": name})


def main(
    store: Store,
    registry: Registry,
    waker: Waker,
    ticks: Sequence[Tick],
    chores: Sequence[Chore],
    stop: threading.Event,
) -> None:
    """Run until `stop`. Any number of schedulers may run; reconciling is idempotent and chores have one leader."""
    holder = f"{socket.gethostname()}:{os.getpid()}"
    next_run = {chore.name: 0.0 for chore in chores}
    leads = {chore.name: _Lead(store, chore, holder) for chore in chores}
    next_ticks, passes = 0.0, 0
    enqueue = Enqueuer(store, waker)
    while not stop.is_set():
        began = time.monotonic()
        if passes % _MEND_EVERY == 0:
            _attempt("mend", lambda: reconciler.mend(store, registry))
        passes += 1
        _attempt("wake", lambda: reconciler.wake_ready(store, waker))
        if began >= next_ticks:
            next_ticks = began + _TICK_EVERY
            for tick in ticks:
                _attempt(tick.name, partial(schedule.run_due, store, enqueue, [tick]))
        for chore in chores:
            if began >= next_run[chore.name]:
                next_run[chore.name] = began + chore.every
                _attempt(chore.name, partial(_chore, chore, leads[chore.name]))
        stop.wait(max(0.01, store.settings.job.reconcile_every - (time.monotonic() - began)))
