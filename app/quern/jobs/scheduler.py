"""The scheduler process: reconciles, makes periodic jobs, and does what one process must do now and then."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pymongo.errors import PyMongoError

from quern.jobs import reconciler, schedule
from quern.jobs.handler import Registry, Tick
from quern.jobs.wake import Waker
from quern.store.connection import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chore:
    """Work that only the leader does, every `every` seconds."""

    name: str
    every: float
    do: Callable[[], object]


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
    while not stop.is_set():
        began = time.monotonic()
        try:
            reconciler.reconcile(store, registry, waker)
            if began >= next_ticks:
                waker.wake_all(schedule.run_due(store, ticks))
                next_ticks = began + 5.0
            for chore in chores:
                if began >= next_run[chore.name]:
                    next_run[chore.name] = began + chore.every
                    if schedule.take_lead(store, chore.name, holder, seconds=chore.every + 10):
                        chore.do()
        except PyMongoError as error:
            _log.warning("the scheduler waits for the database", extra={"error": type(error).__name__})
        except Exception:
            # One broken job or chore must not stop the rescue of all others.
            _log.exception("a pass of the scheduler failed")
        stop.wait(max(0.01, store.settings.job.reconcile_every - (time.monotonic() - began)))
