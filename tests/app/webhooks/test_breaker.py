"""The circuit breaker: pure transitions, and the same state shared by many workers in MongoDB."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo.database import Database

from quern.webhooks.breaker import (
    BreakerState,
    Circuit,
    CircuitOpenError,
    admit,
    apply,
    failed,
    failed_too_long,
    succeeded,
)
from quern.webhooks.settings import WebhookSettings

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SETTINGS = WebhookSettings(
    breaker_threshold=3,
    breaker_cooldown_seconds=10,
    breaker_cooldown_cap_seconds=60,
    deadline_seconds=5,
    disable_after_seconds=3_600,
)


def after_failures(count: int, now: datetime = NOW) -> BreakerState:
    state = BreakerState()
    for _ in range(count):
        state = failed(state, now=now, settings=SETTINGS)
    return state


def test_a_healthy_endpoint_passes_everything_and_never_changes() -> None:
    state = BreakerState()
    assert admit(state, now=NOW, settings=SETTINGS) == state
    assert succeeded(state) == state


def test_failures_in_a_row_open_the_circuit_and_a_success_between_them_does_not() -> None:
    assert after_failures(2).circuit is Circuit.CLOSED
    assert after_failures(3).circuit is Circuit.OPEN
    mended = succeeded(after_failures(2))
    assert failed(mended, now=NOW, settings=SETTINGS).circuit is Circuit.CLOSED


def test_nothing_passes_until_the_pause_is_over_and_then_one_probe_does() -> None:
    state = after_failures(3)
    with pytest.raises(CircuitOpenError) as caught:
        admit(state, now=NOW + timedelta(seconds=9), settings=SETTINGS)
    assert caught.value.until == NOW + timedelta(seconds=10)
    later = NOW + timedelta(seconds=10)
    probing = admit(state, now=later, settings=SETTINGS)
    assert probing.circuit is Circuit.HALF_OPEN
    with pytest.raises(CircuitOpenError):
        admit(probing, now=later, settings=SETTINGS)


def test_a_probe_that_succeeds_closes_and_one_that_fails_doubles_the_pause_up_to_its_cap() -> None:
    state, now, pauses = after_failures(3), NOW, []
    for _ in range(5):
        assert state.until is not None
        pauses.append((state.until - now).total_seconds())
        now = state.until
        state = failed(admit(state, now=now, settings=SETTINGS), now=now, settings=SETTINGS)
    assert pauses == [10, 20, 40, 60, 60]
    assert state.until is not None
    probe = admit(state, now=state.until, settings=SETTINGS)
    assert succeeded(probe) == BreakerState()


def test_a_probe_that_never_reports_loses_its_turn() -> None:
    probing = admit(after_failures(3), now=NOW + timedelta(seconds=10), settings=SETTINGS)
    lease_ends = NOW + timedelta(seconds=20)
    with pytest.raises(CircuitOpenError):
        admit(probing, now=lease_ends - timedelta(seconds=1), settings=SETTINGS)
    assert admit(probing, now=lease_ends, settings=SETTINGS).until == lease_ends + SETTINGS.probe_lease


def test_a_receiver_that_asks_for_a_pause_gets_it_at_the_first_failure() -> None:
    state = failed(BreakerState(), now=NOW, settings=SETTINGS, throttle=timedelta(minutes=7))
    assert state.circuit is Circuit.OPEN
    assert state.until == NOW + timedelta(minutes=7)


def test_late_failures_of_an_open_circuit_do_not_shorten_or_double_its_pause() -> None:
    state = failed(after_failures(3), now=NOW + timedelta(seconds=3), settings=SETTINGS)
    assert (state.until, state.openings) == (NOW + timedelta(seconds=10), 1)
    state = failed(state, now=NOW, settings=SETTINGS, throttle=timedelta(seconds=1))
    assert state.until == NOW + timedelta(seconds=10)
    state = failed(state, now=NOW, settings=SETTINGS, throttle=timedelta(seconds=99))
    assert (state.until, state.openings) == (NOW + timedelta(seconds=99), 1)


def test_only_an_endpoint_that_failed_all_the_time_is_to_be_disabled() -> None:
    state = after_failures(1)
    state = failed(state, now=NOW + timedelta(minutes=59), settings=SETTINGS)
    assert not failed_too_long(state, now=NOW + timedelta(minutes=59), settings=SETTINGS)
    assert failed_too_long(state, now=NOW + timedelta(minutes=60), settings=SETTINGS)
    assert not failed_too_long(succeeded(state), now=NOW + timedelta(days=9), settings=SETTINGS)


@given(
    st.lists(st.tuples(st.sampled_from(["admit", "success", "failure", "throttled"]), st.integers(0, 40)), max_size=60)
)
def test_no_history_blocks_an_endpoint_for_longer_than_the_longest_pause(history: list[tuple[str, int]]) -> None:
    state, now = BreakerState(), NOW
    longest = timedelta(seconds=SETTINGS.breaker_cooldown_cap_seconds)
    for event, seconds in history:
        now += timedelta(seconds=seconds)
        if event == "admit":
            try:
                state = admit(state, now=now, settings=SETTINGS)
            except CircuitOpenError as refused:
                assert now < refused.until <= now + longest
        elif event == "success":
            state = succeeded(state)
        else:
            throttle = timedelta(seconds=seconds) if event == "throttled" else None
            state = failed(state, now=now, settings=SETTINGS, throttle=throttle)
    admit(state, now=now + longest, settings=SETTINGS)


def test_the_state_survives_mongodb_unchanged(mongo_db: Database[dict[str, Any]]) -> None:
    endpoints = mongo_db["endpoints"]
    endpoints.insert_one({"_id": "e", "breaker": BreakerState().model_dump()})
    for _ in range(3):
        stored = apply(endpoints, {"_id": "e"}, lambda state: failed(state, now=NOW, settings=SETTINGS))
    assert stored == after_failures(3).model_copy(update={"revision": 3})
    document = endpoints.find_one({"_id": "e"})
    assert document is not None
    assert BreakerState.model_validate(document["breaker"]) == stored


def test_a_success_of_a_healthy_endpoint_writes_nothing(mongo_db: Database[dict[str, Any]]) -> None:
    endpoints = mongo_db["endpoints"]
    endpoints.insert_one({"_id": "e", "breaker": BreakerState().model_dump()})
    assert apply(endpoints, {"_id": "e"}, succeeded).revision == 0


def test_no_failure_of_many_workers_is_lost(mongo_db: Database[dict[str, Any]]) -> None:
    endpoints = mongo_db["endpoints"]
    endpoints.insert_one({"_id": "e", "breaker": BreakerState().model_dump()})
    patient = SETTINGS.model_copy(update={"breaker_threshold": 1_000})
    with ThreadPoolExecutor(8) as workers:
        done = [
            workers.submit(apply, endpoints, {"_id": "e"}, lambda state: failed(state, now=NOW, settings=patient))
            for _ in range(40)
        ]
        for future in done:
            future.result(60)
    document = endpoints.find_one({"_id": "e"})
    assert document is not None
    assert document["breaker"]["failures"] == 40


def test_of_many_workers_exactly_one_is_the_probe(mongo_db: Database[dict[str, Any]]) -> None:
    endpoints = mongo_db["endpoints"]
    endpoints.insert_one({"_id": "e", "breaker": after_failures(3).model_dump()})
    later = NOW + timedelta(seconds=10)

    def try_to_pass(_: int) -> bool:
        try:
            apply(endpoints, {"_id": "e"}, lambda state: admit(state, now=later, settings=SETTINGS))
        except CircuitOpenError:
            return False
        return True

    with ThreadPoolExecutor(8) as workers:
        assert sum(workers.map(try_to_pass, range(40))) == 1


def test_a_deleted_endpoint_is_told(mongo_db: Database[dict[str, Any]]) -> None:
    with pytest.raises(LookupError, match="deleted"):
        apply(mongo_db["endpoints"], {"_id": "gone"}, succeeded)
