"""How many answers are worked on at once, and how many of them for one tenant: nobody takes all places."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class BusyError(Exception):
    """As much is under way as may be; nothing was begun. `own`: as much of the asker's own."""

    def __init__(self, text: str, *, own: bool) -> None:
        super().__init__(text)
        self.own = own


class Places:
    """`most` in all, and `each` of one tenant. Nobody waits for one. Safe to share between threads."""

    def __init__(self, most: int, each: int, what: str) -> None:
        self._most, self._each, self._what = most, each, what
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """Hold a place as long as the block runs. Raises BusyError at once when there is none."""
        with self._lock:
            if self._taken[tenant] >= self._each:
                raise BusyError(
                    f"expected at most {self._each} {self._what} of a tenant at once, found as many under way; "
                    "ask again when one of them is answered",
                    own=True,
                )
            if self._taken.total() >= self._most:
                raise BusyError(f"{self._most} {self._what} of others are under way; try again", own=False)
            self._taken[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[tenant] -= 1
                self._taken += Counter()  # forgets who has none
