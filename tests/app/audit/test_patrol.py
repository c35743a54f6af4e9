"""The audit log verified by itself: what is wrong is found within a round, and a round never holds up its process."""

import pytest
from prometheus_client import REGISTRY

from quern.audit import chain
from quern.audit.entry import entry, record
from quern.audit.patrol import EVERY, Patrol
from quern.store.connection import Store

OLD, NEW = "k" * 32, "n" * 32
KEYS = chain.KeyRing([OLD])
BATCH = 200


class Clock:
    """Stands still until it is moved."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def patrol(clock: Clock) -> Patrol:
    """One batch a step."""
    return Patrol(step_seconds=0, now=clock)


def seal(store: Store, count: int, keys: chain.KeyRing = KEYS) -> None:
    for _ in range(count):
        record(store.db, entry("ten_a", "key_1", "form.created", "frm_1"))
    while chain.seal_pending(store.db, keys):
        pass


def shown(name: str) -> float:
    found = REGISTRY.get_sample_value(f"quern_audit_{name}")
    assert found is not None, name
    return found


def test_what_holds_is_said_to_hold_with_how_much_there_is_and_when(store: Store, patrol: Patrol) -> None:
    seal(store, 20)
    before = shown("verified_timestamp_seconds")
    patrol.step(store.db, KEYS)
    assert (shown("entries"), shown("problems")) == (20, 0)
    assert shown("verified_timestamp_seconds") > before


def test_damage_is_found_in_whichever_batch_it_lies_and_stays_shown_until_a_round_finds_none(
    store: Store, patrol: Patrol, clock: Clock
) -> None:
    seal(store, 2 * BATCH + 50)
    store.db.audit.update_one({"seq": 2 * BATCH + 7}, {"$set": {"actor": "key_2"}})
    found = []
    for _ in range(3):
        patrol.step(store.db, KEYS)
        found.append(shown("problems"))
    assert found == [0, 0, 1]
    store.db.audit.update_one({"seq": 2 * BATCH + 7}, {"$set": {"actor": "key_1"}})
    clock.seconds += EVERY
    for _ in range(3):
        assert shown("problems") == 1
        patrol.step(store.db, KEYS)
    assert shown("problems") == 0


def test_a_round_begins_a_day_after_the_last_one_began(store: Store, patrol: Patrol, clock: Clock) -> None:
    seal(store, 5)
    patrol.step(store.db, KEYS)
    store.db.audit.update_one({"seq": 2}, {"$set": {"actor": "key_2"}})
    seal(store, 1)
    clock.seconds += EVERY - 1
    patrol.step(store.db, KEYS)
    # How much there is is looked at all the same: Prometheus remembers it, and sees an end that was cut off.
    assert (shown("entries"), shown("problems")) == (6, 0)
    clock.seconds += 1
    patrol.step(store.db, KEYS)
    assert shown("problems") == 1


def test_a_step_goes_on_for_as_long_as_it_may(store: Store) -> None:
    seal(store, 3 * BATCH)
    store.db.audit.update_one({"seq": 3 * BATCH}, {"$set": {"actor": "key_2"}})
    ticking = iter(range(100))
    Patrol(step_seconds=50, now=lambda: float(next(ticking))).step(store.db, KEYS)
    assert shown("problems") == 1


def test_a_key_that_is_replaced_in_mid_round_is_no_damage(store: Store, patrol: Patrol) -> None:
    seal(store, BATCH + 5)
    patrol.step(store.db, KEYS)
    rotated = chain.KeyRing([NEW, OLD])
    seal(store, 5, rotated)
    for _ in range(2):
        patrol.step(store.db, rotated)
    assert shown("problems") == 0


def test_a_key_that_is_lacking_is_damage(store: Store, patrol: Patrol) -> None:
    seal(store, 5)
    patrol.step(store.db, chain.KeyRing([NEW]))
    assert shown("problems") == 1


def test_a_log_that_is_all_forged_ends_the_round_early(store: Store, clock: Clock) -> None:
    """Each problem is a line in memory, and a thousand are as good an alarm as a million."""
    seal(store, 1000 + 2 * BATCH)
    store.db.audit.update_many({}, {"$set": {"actor": "key_2"}})
    patrol = Patrol(step_seconds=0, now=clock)
    for _ in range(9):
        patrol.step(store.db, KEYS)
    assert shown("problems") == 1000


def test_a_round_outlives_an_entry_of_which_nothing_is_left(store: Store, patrol: Patrol) -> None:
    seal(store, 5)
    store.db.audit.update_one({"seq": 3}, {"$unset": {"seal": "", "sealed_by": "", "action": "", "subject": ""}})
    store.db.audit.update_one({"seq": 4}, {"$set": {"mac": 7}})
    patrol.step(store.db, KEYS)
    assert shown("problems") >= 2
