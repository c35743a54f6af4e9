"""Places for waiting clients: so many in a process, and of these so many to a tenant."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from quern.events import metrics
from quern.events.problem import ProblemError
from quern.events.settings import EventSettings


class Places:
    """Counts who waits. Of one event loop: not safe across threads."""

    def __init__(self, settings: EventSettings) -> None:
        self._settings = settings
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """Hold a place.

        Raises:
            ProblemError: 503 when the process is full, 429 when the tenant has its share.
        """
        if self._taken.total() >= self._settings.max_streams:
            metrics.REFUSED.labels("process").inc()
            raise ProblemError(503, "As many streams are open as this server holds.", {"Retry-After": "5"})
        if self._taken[tenant] >= self._settings.max_streams_per_tenant:
            metrics.REFUSED.labels("tenant").inc()
            limit = self._settings.max_streams_per_tenant
            raise ProblemError(429, f"At most {limit} streams can be open at once; close one.", {"Retry-After": "5"})
        self._taken[tenant] += 1
        metrics.STREAMS.inc()
        try:
            yield
        finally:
            metrics.STREAMS.dec()
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]
