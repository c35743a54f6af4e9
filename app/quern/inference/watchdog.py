"""Which of the steps at work hang: what got no processor only waits its turn.

The engine has what others leave. On a host that is driven to its limits a step may take minutes, most of them spent
waiting for a processor; to end its process would lose the work and blame the request. So where a thread of the process
runs or would, only the time counts that it ran, as `/proc/PID/task/TID/stat` tells (proc_pid_stat(5)). What sleeps for
ever wants no processor, and what spins gets its part: both grow old.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from quern.inference.steprecord import Entry

_PROC = Path("/proc")
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Thread(NamedTuple):
    """What a thread is at: whether it runs or would, and the seconds that it has run."""

    runnable: bool
    ran: float


class Watchdog:
    """Looks again and again at the steps at work.

    Args:
        patience: seconds after which a step hangs.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._ages: dict[float, float] = {}
        self._looked = 0.0
        self._threads: Mapping[str, Thread] = {}

    def hanging(self, entries: Iterable[Entry], now: float, threads: Mapping[str, Thread]) -> Entry | None:
        """The first step that has had its time since it was first seen here, or since this was last said of it.

        Args:
            now: seconds of a clock that goes on.
            threads: of the process that does the steps, as they are now.
        """
        listed, passed = list(entries), now - self._looked
        ran = max((thread.ran - self._threads.get(name, thread).ran for name, thread in threads.items()), default=0.0)
        counted = ran if any(thread.runnable for thread in threads.values()) else passed
        self._ages = {
            entry.since: self._ages[entry.since] + counted if entry.since in self._ages else 0.0 for entry in listed
        }
        self._looked, self._threads = now, threads
        for entry in listed:
            if self._ages[entry.since] > self._patience:
                self._ages[entry.since] = 0.0
                return entry
        return None


def threads_of(process: int) -> dict[str, Thread]:
    """A process's threads; none when it is gone."""
    found = {}
    for path in (_PROC / str(process) / "task").glob("*/stat"):
        try:
            # The name in parentheses may have anything in it.
            state, *fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[path.parent.name] = Thread(state == "R", (int(fields[10]) + int(fields[11])) * _TICK)
    return found
