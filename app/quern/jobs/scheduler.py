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


@dataclass(frozen=True)
class Chore:
    """Work that only the leader does, every `every` seconds."""

    name: str
    every: float
    do: Callable[[], object]


def _chore(store: Store, chore: Chore, holder: str) -> None:
    if schedule.take_lead(store, chore.name, holder, seconds=chore.every + 10):
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
    next_ticks = 0.0
    enqueue = Enqueuer(store, waker)
    while not stop.is_set():
        began = time.monotonic()
        _attempt("reconcile", lambda: reconciler.reconcile(store, registry, waker))
        if began >= next_ticks:
            next_ticks = began + _TICK_EVERY
            for tick in ticks:
                _attempt(tick.name, partial(schedule.run_due, store, enqueue, [tick]))
        for chore in chores:
            if began >= next_run[chore.name]:
                next_run[chore.name] = began + chore.every
                _attempt(chore.name, partial(_chore, store, chore, holder))
        stop.wait(max(0.01, store.settings.job.reconcile_every - (time.monotonic() - began)))
