"""Ends of jobs, written many at once while the threads that ran them go on.

A no-op job costs microseconds and its end a flush of the journal: a thread that waited for that would stand still most
of the time. Until its end is durable a job keeps its lease, so a crash in between means that it runs again, as ever.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ends(Generic[T]):
    """One thread that hands what was `put` to `write`, up to `most` at once. `write` must see to its own failures."""

    def __init__(self, write: Callable[[list[T]], None], *, most: int = 64) -> None:
        self._write, self._most = write, most
        self._changed = threading.Condition()
        self._waiting: list[T] = []
        self._put = 0
        self._written = 0
        self._started = False

    def put(self, end: T) -> None:
        """Have an end written soon; blocks while `most` wait already."""
        with self._changed:
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="ends", daemon=True).start()
            self._changed.wait_for(lambda: len(self._waiting) < self._most)
            self._waiting.append(end)
            self._put += 1
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was put so far is written; False when that took longer than `timeout` seconds."""
        with self._changed:
            wanted = self._put
            return self._changed.wait_for(lambda: self._written >= wanted, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                batch, self._waiting = self._waiting, []
                self._changed.notify_all()
            self._write(batch)
            with self._changed:
                self._written += len(batch)
                self._changed.notify_all()
