"""The delivery log, on a real mongod."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.database import Database

from quern.webhooks import deliveries
from quern.webhooks.indexes import INDEXES
from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.settings import WebhookSettings

Db = Database[dict[str, Any]]

NOW = datetime(2026, 3, 1, 12, 0, 0, 123_456, tzinfo=UTC)
SETTINGS = WebhookSettings(delivery_log_days=7)
REFUSED = DeliveryOutcome(
    500,
    None,
    "the receiver answered 500",
    timedelta(milliseconds=1234.6),
    excerpt="I could not store 'my cat is called Whiskers'",
    address="192.0.2.1",
    request_headers={"webhook-id": "job_1", "host": "hooks.example.com"},
)
DELIVERED = DeliveryOutcome(204, None, "the receiver answered 204", timedelta(milliseconds=5))
UNREACHABLE = DeliveryOutcome(None, Failure.DNS, "expected an address, found none", timedelta(milliseconds=5))


def record(db: Db, outcome: DeliveryOutcome = REFUSED, **changes: Any) -> deliveries.DeliveryRecord:
    values: dict[str, Any] = {
        "tenant": "ten_a",
        "endpoint": "whe_1",
        "job": "job_1",
        "attempt": 1,
        "event_type": "response.completed",
        "response": "rsp_1",
        "settings": SETTINGS,
        "now": NOW,
    } | changes
    return deliveries.record(db, values.pop("tenant"), outcome, **values)


def test_what_is_recorded_is_what_is_read(mongo_db: Db) -> None:
    entry = record(mongo_db)
    assert deliveries.get(mongo_db, "ten_a", entry.id) == entry
    assert (entry.status, entry.delivered, entry.duration_ms, entry.attempt) == (500, False, 1235, 1)
    assert entry.at == NOW.replace(microsecond=123_000)
    unreachable = record(mongo_db, UNREACHABLE)
    assert deliveries.get(mongo_db, "ten_a", unreachable.id).failure is Failure.DNS


def test_another_tenant_finds_nothing(mongo_db: Db) -> None:
    entry = record(mongo_db)
    with pytest.raises(LookupError):
        deliveries.get(mongo_db, "ten_b", entry.id)
    assert deliveries.page(mongo_db, "ten_b").deliveries == ()


def test_pages_run_from_the_newest_without_gap_or_repetition(mongo_db: Db) -> None:
    recorded = [record(mongo_db, attempt=n, now=NOW + timedelta(seconds=n)).id for n in range(1, 8)]
    record(mongo_db, tenant="ten_b")
    seen: list[str] = []
    after = None
    while True:
        page = deliveries.page(mongo_db, "ten_a", after=after, limit=3)
        seen += [entry.id for entry in page.deliveries]
        after = page.after
        if after is None:
            break
    assert seen == recorded[::-1]


def test_every_filter_narrows_the_list(mongo_db: Db) -> None:
    base = record(mongo_db).id
    endpoint = record(mongo_db, endpoint="whe_2").id
    job = record(mongo_db, job="job_2").id
    response = record(mongo_db, response="rsp_2").id
    delivered = record(mongo_db, DELIVERED).id
    later = record(mongo_db, now=NOW + timedelta(hours=1)).id

    def found(**filters: Any) -> set[str]:
        return {entry.id for entry in deliveries.page(mongo_db, "ten_a", **filters).deliveries}

    everything = {base, endpoint, job, response, delivered, later}
    assert found() == everything
    assert found(endpoint="whe_2") == {endpoint}
    assert found(job="job_2") == {job}
    assert found(response="rsp_2") == {response}
    assert found(delivered=True) == {delivered}
    assert found(delivered=False) == everything - {delivered}
    assert found(since=NOW + timedelta(minutes=1)) == {later}
    assert found(until=NOW + timedelta(minutes=1)) == everything - {later}
    assert found(since=NOW + timedelta(hours=2)) == set()


def test_an_excerpt_can_be_blanked(mongo_db: Db) -> None:
    blanked, other = record(mongo_db), record(mongo_db)
    deliveries.blank_excerpt(mongo_db, blanked)
    assert deliveries.get(mongo_db, "ten_a", blanked.id) == blanked.model_copy(update={"excerpt": ""})
    assert deliveries.get(mongo_db, "ten_a", other.id) == other


@pytest.mark.parametrize("shift", [timedelta(0), timedelta(microseconds=1), timedelta(milliseconds=-1)])
def test_a_span_begins_with_its_start_and_ends_before_its_end(mongo_db: Db, shift: timedelta) -> None:
    entry = record(mongo_db)
    bound = entry.at + shift
    since = deliveries.page(mongo_db, "ten_a", since=bound).deliveries
    until = deliveries.page(mongo_db, "ten_a", until=bound).deliveries
    assert bool(since) == (entry.at >= bound)
    assert bool(until) == (entry.at < bound)


@pytest.mark.parametrize("year", [1, 1969, 9999])
def test_any_time_is_a_bound(mongo_db: Db, year: int) -> None:
    entry = record(mongo_db)
    found = deliveries.page(mongo_db, "ten_a", since=datetime(year, 12, 31, tzinfo=UTC)).deliveries
    assert found == ((entry,) if year < 2000 else ())


def test_entries_end_after_the_days_that_the_operator_set(mongo_db: Db) -> None:
    for name, models in INDEXES.items():
        mongo_db[name].create_indexes(list(models))
    record(mongo_db)
    stored = mongo_db[deliveries.COLLECTION].find_one()
    assert stored is not None
    assert stored["expires_at"] - stored["at"] == timedelta(days=7)
    expiry = mongo_db[deliveries.COLLECTION].index_information()["expiry"]
    assert (expiry["key"], expiry["expireAfterSeconds"]) == ([("expires_at", 1)], 0)


@pytest.mark.parametrize("filters", [{}, {"endpoint": "whe_1"}, {"job": "job_1"}, {"response": "rsp_1"}])
def test_lists_are_read_from_an_index_in_their_order(mongo_db: Db, filters: dict[str, str]) -> None:
    for name, models in INDEXES.items():
        mongo_db[name].create_indexes(list(models))
    for n in range(20):
        record(mongo_db, now=NOW + timedelta(seconds=n), job=f"job_{n % 3}", response=f"rsp_{n % 4}")
    plan = mongo_db[deliveries.COLLECTION].find({"tenant": "ten_a"} | filters).sort("_id", -1).limit(5).explain()
    winning = repr(plan["queryPlanner"]["winningPlan"])
    assert "IXSCAN" in winning and "'stage': 'SORT'" not in winning and "_id_'" not in winning
