"""Enqueue one job: durable when the call returns.

Threads that enqueue at the same moment share one insert, one flush of the journal and one wake-up. Who makes jobs in a
transaction, or many at once, calls `queue.insert`, `turns.open_many` and the waker itself.
"""

from pymongo.errors import PyMongoError

from quern.jobs import queue, turns
from quern.jobs.model import NewJob
from quern.jobs.wake import Waker
from quern.store.combine import Combiner
from quern.store.connection import Store

#: Seconds, of those that the journal's flush takes.
_LINGER = 0.0005


class Enqueuer:
    """Enqueues jobs of any thread of this process."""

    def __init__(self, store: Store, waker: Waker) -> None:
        self._store, self._waker = store, waker
        self._add: Combiner[NewJob, None] = Combiner(self._add_all, most=64, linger=_LINGER)

    def __call__(self, job: NewJob) -> None:
        """Make a job durable, unless it exists, and wake a worker for it.

        Raises:
            PyMongoError: whether the job was made is not known; the same call again makes it once.
        """
        self._add(job)

    def _add_all(self, jobs: list[NewJob]) -> list[PyMongoError | None]:
        opened = queue.insert(self._store.db, jobs)
        turns.open_many(self._store.db, opened)
        for name in {item[0] for item in opened}:
            # One is enough: a worker that leaves work behind wakes the next.
            self._waker.wake(name)
        return [None] * len(jobs)
