"""Combining: what many threads ask for at once becomes one trip to the database.

After "Flat Combining" (Hendler, Incze, Shavit, Tzafrir, 2010) and the group commit of databases: a thread that finds no
trip under way makes one at once, alone; those that come meanwhile wait, and one of them takes all of them along on the
next. So a lone thread waits for nobody, and a crowd pays for few trips and few journal flushes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Entry(Generic[T, R]):
    __slots__ = ("gate", "item", "leads", "outcome")

    def __init__(self, item: T) -> None:
        self.item = item
        self.outcome: R | BaseException | None = None
        self.leads = False
        self.gate = threading.Lock()
        self.gate.acquire()


class Combiner(Generic[T, R]):
    """Calls `work` with up to `most` items at once, for at most `at_once` batches at a time.

    `work` returns one outcome for each item, in order; an outcome that is an exception is raised in the thread whose
    item it was. What `work` itself raises is raised in every thread of the batch.

    `linger`: seconds that a leader waits for others where there have just been others (PostgreSQL's `commit_delay`):
    threads that call again and again would else go alone and all the rest by turns.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Sequence[R | BaseException]],
        *,
        most: int = 32,
        at_once: int = 1,
        linger: float = 0.0,
    ) -> None:
        self._work, self._most, self._at_once, self._linger = work, most, at_once, linger
        self._crowd = 0
        self._lock = threading.Lock()
        self._waiting: deque[_Entry[T, R]] = deque()
        self._leaders = 0

    def __call__(self, item: T) -> R:
        """The outcome of `item`; blocks until its batch is done."""
        mine: _Entry[T, R] = _Entry(item)
        with self._lock:
            mine.leads = self._leaders < self._at_once
            if mine.leads:
                self._leaders += 1
            else:
                self._waiting.append(mine)
        if not mine.leads:
            # Released by a leader: with an outcome, or with the lead.
            mine.gate.acquire()
        if mine.leads:
            self._lead(mine)
        if isinstance(mine.outcome, BaseException):
            raise mine.outcome
        return mine.outcome  # type: ignore[return-value]  # set by the batch; R may itself be optional

    def _lead(self, mine: _Entry[T, R]) -> None:
        if self._linger and len(self._waiting) + 1 < self._crowd:
            time.sleep(self._linger)
        with self._lock:
            batch = [mine]
            while self._waiting and len(batch) < self._most:
                batch.append(self._waiting.popleft())
        try:
            outcomes = self._work([entry.item for entry in batch])
            for entry, outcome in zip(batch, outcomes, strict=True):
                entry.outcome = outcome
        except BaseException as error:
            for entry in batch:
                entry.outcome = error
        finally:
            with self._lock:
                # All that were here during this batch; half of what was before, lest one crowd be waited for for ever.
                self._crowd = max(len(batch) + len(self._waiting), self._crowd // 2)
                if self._waiting:
                    following = self._waiting.popleft()
                    following.leads = True
                    following.gate.release()
                else:
                    self._leaders -= 1
            for entry in batch[1:]:
                entry.gate.release()
