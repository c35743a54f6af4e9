"""A circuit breaker per endpoint, so that a dead receiver costs one probe and not a worker's time per message.

Closed: everything passes. After `breaker_threshold` failures in a row it opens: nothing passes until a pause is over,
which doubles each time. Then it is half open: exactly one delivery passes as a probe, and its result closes or opens it
again. (M. Nygard, "Release It!", 2nd edition, section 5.2.)

The transitions are pure. The state lives in the endpoint's own document and changes by compare-and-set on its
revision, so that any number of workers can share it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict
from pymongo.client_session import ClientSession
from pymongo.collection import Collection

from quern.webhooks.settings import WebhookSettings

MAX_CONFLICTS = 50


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerState(BaseModel):
    """`until` ends the pause (open) or the probe's lease (half open); `failing_since` is the row's first failure."""

    model_config = ConfigDict(frozen=True)

    circuit: Circuit = Circuit.CLOSED
    failures: int = 0
    openings: int = 0
    until: datetime | None = None
    failing_since: datetime | None = None
    revision: int = 0


class CircuitOpenError(Exception):
    """No delivery may be tried before `until`; this is not an attempt and charges none."""

    def __init__(self, until: datetime) -> None:
        super().__init__(f"the endpoint's circuit is open until {until.isoformat()}")
        self.until = until


def admit(state: BreakerState, *, now: datetime, settings: WebhookSettings) -> BreakerState:
    """The state in which a delivery may go out now; raises CircuitOpenError if it may not.

    Whoever moves the circuit to half open is the probe. A probe that never reports loses its turn when its lease ends.
    """
    if state.circuit is Circuit.CLOSED:
        return state
    if state.until is not None and now < state.until:
        raise CircuitOpenError(state.until)
    return state.model_copy(update={"circuit": Circuit.HALF_OPEN, "until": now + settings.probe_lease})


def succeeded(state: BreakerState) -> BreakerState:
    """Any success closes the circuit and forgets the failures."""
    return BreakerState(revision=state.revision)


def failed(
    state: BreakerState, *, now: datetime, settings: WebhookSettings, throttle: timedelta | None = None
) -> BreakerState:
    """One more failure; `throttle` is what the receiver asked for, and opens the circuit at once for that long."""
    counted = state.model_copy(update={"failures": state.failures + 1, "failing_since": state.failing_since or now})
    asked = now + (throttle or timedelta(0))
    if state.circuit is Circuit.OPEN:
        # A delivery that was under way when the circuit opened: only what the receiver asks for is news.
        return counted.model_copy(update={"until": max(asked, state.until or asked)})
    if state.circuit is Circuit.CLOSED and counted.failures < settings.breaker_threshold and throttle is None:
        return counted
    # 2 ** 30 seconds is beyond any cap, and a float beyond 2 ** 1023 would overflow.
    pause = settings.breaker_cooldown_seconds * 2 ** min(state.openings, 30)
    until = now + timedelta(seconds=min(pause, settings.breaker_cooldown_cap_seconds))
    return counted.model_copy(
        update={"circuit": Circuit.OPEN, "openings": state.openings + 1, "until": max(asked, until)}
    )


def failed_too_long(state: BreakerState, *, now: datetime, settings: WebhookSettings) -> bool:
    """Whether the endpoint has only failed for so long that it should be disabled."""
    return state.failing_since is not None and now - state.failing_since >= timedelta(
        seconds=settings.disable_after_seconds
    )


def apply(
    collection: Collection[dict[str, Any]],
    selector: dict[str, Any],
    transition: Callable[[BreakerState], BreakerState],
    *,
    session: ClientSession | None = None,
) -> BreakerState:
    """Apply a transition to the `breaker` of the selected endpoint, atomically; returns the state that holds then.

    Writes nothing when the transition changes nothing, which is the everyday case of a healthy endpoint. Raises
    LookupError if no endpoint matches, RuntimeError if others changed it 50 times in between, and whatever the
    transition raises.
    """
    for _ in range(MAX_CONFLICTS):
        document = collection.find_one(selector, {"breaker": 1}, session=session)
        if document is None:
            raise LookupError("expected a webhook endpoint, found none: it was deleted")
        before = BreakerState.model_validate(document["breaker"])
        after = transition(before)
        if after == before:
            return before
        after = after.model_copy(update={"revision": before.revision + 1})
        result = collection.update_one(
            selector | {"breaker.revision": before.revision}, {"$set": {"breaker": after.model_dump()}}, session=session
        )
        if result.modified_count:
            return after
    raise RuntimeError(f"expected to update the circuit breaker, found it changed {MAX_CONFLICTS} times in between")
