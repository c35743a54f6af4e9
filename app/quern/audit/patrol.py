"""The audit log verified without being asked: a little at a time, so that whatever it grows to, it costs little.

A round goes over the whole chain; the next begins a day after it began, or when it has ended, where that is later.
Nothing of it is kept: after a restart a new round begins, and finds again what there is to be found.
"""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from quern.audit import chain
from quern.observe import metrics
from quern.store import clock
from quern.store.connection import Db

#: From the begin of one round to the begin of the next.
EVERY = timedelta(days=1).total_seconds()
#: After so long a step ends: whatever else the process does waits for it.
STEP_SECONDS = 0.25
#: A round that found so much has found enough.
ENOUGH = 1000

_log = logging.getLogger(__name__)


class Patrol:
    """Goes on with the round at each step."""

    def __init__(self, step_seconds: float = STEP_SECONDS, now: Callable[[], float] = time.monotonic) -> None:
        self._step_seconds, self._now = step_seconds, now
        self._walk: chain.Walk | None = None
        self._next_round = float("-inf")
        #: What the last whole round found.
        self._found = 0

    def step(self, db: Db, keys: chain.KeyRing) -> None:
        """Verify for some time, at least one batch; with another ring of keys than at the last step, from the start."""
        began = self._now()
        metrics.AUDIT_ENTRIES.set(chain.head(db)[0])
        if self._walk is None:
            if began < self._next_round:
                return
            self._next_round = began + EVERY
        if self._walk is None or self._walk.keys.names != keys.names:
            self._walk = chain.Walk(keys)
        walk, before = self._walk, len(self._walk.problems)
        more = walk.go_on(db)
        while more and self._now() - began < self._step_seconds:
            more = walk.go_on(db)
        problems = walk.problems
        if len(problems) > before:
            _log.error("the audit log does not hold", extra={"problem": problems[before], "found": len(problems)})
        if not more or len(problems) >= ENOUGH:
            self._walk, self._found = None, len(problems)
        metrics.AUDIT_PROBLEMS.set(max(self._found, len(problems)))
        metrics.AUDIT_VERIFIED.set(clock.now().timestamp())
