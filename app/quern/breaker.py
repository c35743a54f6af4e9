"""A circuit breaker in one process: what has failed several times in a row is let alone for a while.

Closed: everything passes. After some failures in a row it opens, and nothing passes until a pause is over. Then one
call passes as a probe, and its end closes or opens it again. (M. Nygard, "Release It!", 2nd edition, section 5.2.)
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CircuitOpenError(Exception):
    """Nothing was tried; the circuit may close in `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"let alone for another {seconds:.1f} s")
        self.seconds = seconds


class Breaker:
    """Counts the failures of a block of code; exceptions of `failures` kinds are failures, all others are answers."""

    def __init__(
        self,
        most: int,
        pause: float,
        failures: tuple[type[Exception], ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._pause, self._failures, self._clock = most, pause, failures, clock
        self._lock = threading.Lock()
        self._count = 0
        self._until = 0.0
        self._probing = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the block if the circuit lets it.

        Raises:
            CircuitOpenError: it does not.
        """
        self._admit()
        try:
            yield
        except self._failures:
            self._ended(failed=True)
            raise
        except BaseException:
            self._ended(failed=False)
            raise
        self._ended(failed=False)

    @property
    def is_open(self) -> bool:
        """Whether nothing passes at the moment."""
        with self._lock:
            return self._count >= self._most and (self._probing or self._clock() < self._until)

    def _admit(self) -> None:
        with self._lock:
            if self._count < self._most:
                return
            left = self._until - self._clock()
            if left > 0 or self._probing:
                raise CircuitOpenError(max(left, 0.1))
            self._probing = True

    def _ended(self, *, failed: bool) -> None:
        with self._lock:
            self._probing = False
            self._count = self._count + 1 if failed else 0
            if self._count >= self._most:
                self._until = self._clock() + self._pause
