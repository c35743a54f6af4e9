"""The store of endpoints, on a real mongod: secrets sealed, tenants apart, rotation with two signatures."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import ValidationError
from pymongo.database import Database

from quern.webhooks import breaker, endpoints
from quern.webhooks.endpoints import (
    DisabledReason,
    Endpoint,
    EndpointChange,
    EndpointDraft,
    TooManyEndpointsError,
    WithSecret,
)
from quern.webhooks.guard import ForbiddenURLError
from quern.webhooks.indexes import INDEXES
from quern.webhooks.settings import WebhookSettings
from quern.webhooks.sign import signature_headers, verify

Db = Database[dict[str, Any]]

NOW = datetime(2026, 3, 1, 12, 0, 0, 123_456, tzinfo=UTC)
SETTINGS = WebhookSettings(rotation_grace_seconds=3_600)
CIPHER = MultiFernet([Fernet(Fernet.generate_key())])
URL = "https://hooks.example.com/quern"


def create(db: Db, tenant: str = "ten_a", at: datetime = NOW, **draft: Any) -> WithSecret:
    wanted = EndpointDraft.model_validate({"url": URL} | draft)
    return endpoints.create(db, tenant, wanted, cipher=CIPHER, settings=SETTINGS, now=at)


def rotate(db: Db, endpoint_id: str, at: datetime) -> str:
    return endpoints.rotate_secret(db, "ten_a", endpoint_id, cipher=CIPHER, settings=SETTINGS, now=at).secret


def active(db: Db, endpoint_id: str, at: datetime) -> tuple[str, ...]:
    return endpoints.load_for_delivery(db, "ten_a", endpoint_id, cipher=CIPHER, now=at).secrets


def test_what_is_created_is_what_is_read(mongo_db: Db) -> None:
    created = create(mongo_db, description="ours", event_types=["response.completed"])
    endpoint = created.endpoint
    assert endpoints.get(mongo_db, "ten_a", endpoint.id) == endpoint
    assert endpoint.id.startswith("whe_")
    assert (endpoint.url, endpoint.enabled, endpoint.disabled_reason) == (URL, True, None)
    assert active(mongo_db, endpoint.id, NOW) == (created.secret,)


def test_no_secret_is_stored_in_clear_or_shown_again(mongo_db: Db) -> None:
    created = create(mongo_db)
    secret = created.secret.removeprefix("whsec_")
    stored = repr(mongo_db[endpoints.COLLECTION].find_one())
    assert secret not in stored
    assert "secret" not in endpoints.get(mongo_db, "ten_a", created.endpoint.id).model_dump_json()


def test_a_changed_ciphertext_is_not_signed_with(mongo_db: Db) -> None:
    created = create(mongo_db)
    mongo_db[endpoints.COLLECTION].update_one({}, {"$set": {"secrets.0.sealed": b"gAAAA" + bytes(60)}})
    with pytest.raises(InvalidToken):
        active(mongo_db, created.endpoint.id, NOW)


@pytest.mark.parametrize("url", ["http://hooks.example.com/", "https://10.0.0.1/", "https://localhost/", "nonsense"])
def test_a_url_against_the_policy_is_refused_at_creation_and_at_change(mongo_db: Db, url: str) -> None:
    with pytest.raises(ForbiddenURLError):
        create(mongo_db, url=url)
    endpoint = create(mongo_db).endpoint
    with pytest.raises(ForbiddenURLError):
        endpoints.update(mongo_db, "ten_a", endpoint.id, EndpointChange(url=url), settings=SETTINGS, now=NOW)
    assert endpoints.get(mongo_db, "ten_a", endpoint.id).url == URL


@pytest.mark.parametrize("name", ["", "A.b", "a..b", ".a", "a b", "a.*", "$where", "a" * 65, "a\n"])
def test_a_wrong_event_type_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        EndpointDraft(url=URL, event_types=(name,))


def test_another_tenant_finds_nothing(mongo_db: Db) -> None:
    endpoint = create(mongo_db).endpoint
    other = "ten_b"
    calls: list[Callable[[], object]] = [
        lambda: endpoints.get(mongo_db, other, endpoint.id),
        lambda: endpoints.update(mongo_db, other, endpoint.id, EndpointChange(), settings=SETTINGS, now=NOW),
        lambda: endpoints.enable(mongo_db, other, endpoint.id, now=NOW),
        lambda: endpoints.disable(mongo_db, other, endpoint.id, DisabledReason.OWNER, now=NOW),
        lambda: endpoints.rotate_secret(mongo_db, other, endpoint.id, cipher=CIPHER, settings=SETTINGS, now=NOW),
        lambda: endpoints.load_for_delivery(mongo_db, other, endpoint.id, cipher=CIPHER, now=NOW),
        lambda: endpoints.delete(mongo_db, other, endpoint.id),
    ]
    for call in calls:
        with pytest.raises(LookupError):
            call()
    assert endpoints.page(mongo_db, other).endpoints == ()
    assert endpoints.subscribed(mongo_db, other, "response.completed") == []
    assert endpoints.get(mongo_db, "ten_a", endpoint.id) == endpoint


def test_pages_follow_each_other_without_gap_or_repetition(mongo_db: Db) -> None:
    created = [create(mongo_db, at=NOW + timedelta(seconds=i)).endpoint.id for i in range(7)]
    create(mongo_db, "ten_b")
    seen: list[str] = []
    after = None
    while True:
        page = endpoints.page(mongo_db, "ten_a", after=after, limit=3)
        seen += [endpoint.id for endpoint in page.endpoints]
        after = page.after
        if after is None:
            break
    assert seen == created


def test_events_reach_the_enabled_endpoints_that_want_them(mongo_db: Db) -> None:
    everything = create(mongo_db, at=NOW).endpoint
    chosen = create(mongo_db, at=NOW + timedelta(seconds=1), event_types=["response.completed"]).endpoint
    create(mongo_db, event_types=["response.erased"])
    disabled = create(mongo_db).endpoint
    endpoints.disable(mongo_db, "ten_a", disabled.id, DisabledReason.OWNER, now=NOW)
    found = endpoints.subscribed(mongo_db, "ten_a", "response.completed")
    assert [endpoint.id for endpoint in found] == [everything.id, chosen.id]
    assert all(endpoint.wants("response.completed") for endpoint in found)


def test_an_update_changes_only_what_it_names(mongo_db: Db) -> None:
    endpoint = create(mongo_db, description="before", event_types=["a.b"]).endpoint
    later = NOW + timedelta(hours=1)
    changed = endpoints.update(
        mongo_db, "ten_a", endpoint.id, EndpointChange(description="after"), settings=SETTINGS, now=later
    )
    assert (changed.description, changed.url, changed.event_types) == ("after", URL, ("a.b",))
    assert changed.updated_at > endpoint.updated_at
    cleared = endpoints.update(
        mongo_db, "ten_a", endpoint.id, EndpointChange(event_types=()), settings=SETTINGS, now=later
    )
    assert cleared.event_types == ()


def test_a_new_url_and_enabling_start_with_a_closed_circuit(mongo_db: Db) -> None:
    endpoint = create(mongo_db).endpoint
    strict = SETTINGS.model_copy(update={"breaker_threshold": 1})
    change = EndpointChange(url=URL + "2")
    mends: list[Callable[[], Endpoint]] = [
        lambda: endpoints.update(mongo_db, "ten_a", endpoint.id, change, settings=SETTINGS, now=NOW),
        lambda: endpoints.enable(mongo_db, "ten_a", endpoint.id, now=NOW),
    ]
    for mend in mends:
        broken = breaker.apply(
            endpoints.collection(mongo_db),
            endpoints.selector(endpoint),
            lambda state: breaker.failed(state, now=NOW, settings=strict),
        )
        assert broken.circuit is breaker.Circuit.OPEN
        mended = mend().breaker
        assert mended.circuit is breaker.Circuit.CLOSED
        assert mended.revision > broken.revision


def test_disabling_keeps_its_reason_until_it_is_enabled(mongo_db: Db) -> None:
    endpoint = create(mongo_db).endpoint
    disabled = endpoints.disable(mongo_db, "ten_a", endpoint.id, DisabledReason.GONE, now=NOW)
    assert (disabled.enabled, disabled.disabled_reason) == (False, DisabledReason.GONE)
    assert disabled.disabled_at is not None
    enabled = endpoints.enable(mongo_db, "ten_a", endpoint.id, now=NOW)
    assert (enabled.enabled, enabled.disabled_reason, enabled.disabled_at) == (True, None, None)


def test_a_deleted_endpoint_is_gone(mongo_db: Db) -> None:
    endpoint = create(mongo_db).endpoint
    endpoints.delete(mongo_db, "ten_a", endpoint.id)
    with pytest.raises(LookupError):
        endpoints.delete(mongo_db, "ten_a", endpoint.id)


def test_after_a_rotation_messages_carry_two_signatures_until_the_grace_ends(mongo_db: Db) -> None:
    created = create(mongo_db)
    endpoint_id = created.endpoint.id
    new = rotate(mongo_db, endpoint_id, NOW)
    during = NOW + timedelta(minutes=59)
    secrets = active(mongo_db, endpoint_id, during)
    assert secrets == (new, created.secret)
    headers = signature_headers("job_1", during, b"{}", secrets)
    for secret in secrets:
        verify(b"{}", headers, [secret], now=during)
    assert active(mongo_db, endpoint_id, NOW + timedelta(minutes=61)) == (new,)


def test_a_second_rotation_does_not_lengthen_the_first_ones_grace(mongo_db: Db) -> None:
    first = create(mongo_db)
    endpoint_id = first.endpoint.id
    second = rotate(mongo_db, endpoint_id, NOW)
    third = rotate(mongo_db, endpoint_id, NOW + timedelta(minutes=30))
    assert active(mongo_db, endpoint_id, NOW + timedelta(minutes=45)) == (third, second, first.secret)
    assert active(mongo_db, endpoint_id, NOW + timedelta(minutes=75)) == (third, second)
    assert active(mongo_db, endpoint_id, NOW + timedelta(minutes=95)) == (third,)


def test_expired_secrets_leave_the_store_and_no_more_than_four_are_kept(mongo_db: Db) -> None:
    endpoint_id = create(mongo_db).endpoint.id
    for minute in range(8):
        newest = rotate(mongo_db, endpoint_id, NOW + timedelta(minutes=minute))
    kept = active(mongo_db, endpoint_id, NOW + timedelta(minutes=8))
    assert len(kept) == 4 and kept[0] == newest
    newest = rotate(mongo_db, endpoint_id, NOW + timedelta(days=1))
    document = mongo_db[endpoints.COLLECTION].find_one({"_id": endpoint_id})
    assert document is not None and len(document["secrets"]) == 2


def test_rotations_at_the_same_time_lose_no_secret_that_was_handed_out(mongo_db: Db) -> None:
    endpoint_id = create(mongo_db).endpoint.id
    with ThreadPoolExecutor(3) as workers:
        handed_out = list(workers.map(lambda _: rotate(mongo_db, endpoint_id, NOW), range(3)))
    assert set(handed_out) < set(active(mongo_db, endpoint_id, NOW))


def test_a_tenant_has_a_bounded_number_of_endpoints(mongo_db: Db) -> None:
    small = SETTINGS.model_copy(update={"max_endpoints_per_tenant": 1})
    draft = EndpointDraft(url=URL)
    create(mongo_db, "ten_b")
    endpoints.create(mongo_db, "ten_a", draft, cipher=CIPHER, settings=small, now=NOW)
    with pytest.raises(TooManyEndpointsError):
        endpoints.create(mongo_db, "ten_a", draft, cipher=CIPHER, settings=small, now=NOW)


def test_a_transaction_that_is_aborted_leaves_nothing(mongo_db: Db) -> None:
    mongo_db.create_collection(endpoints.COLLECTION)
    with mongo_db.client.start_session() as session, session.start_transaction():
        created = endpoints.create(
            mongo_db, "ten_a", EndpointDraft(url=URL), cipher=CIPHER, settings=SETTINGS, now=NOW, session=session
        )
        assert endpoints.get(mongo_db, "ten_a", created.endpoint.id, session=session) == created.endpoint
        session.abort_transaction()
    assert endpoints.page(mongo_db, "ten_a").endpoints == ()


def test_the_indexes_can_be_made_and_serve_the_list(mongo_db: Db) -> None:
    for name, models in INDEXES.items():
        mongo_db[name].create_indexes(list(models))
    plan = mongo_db[endpoints.COLLECTION].find({"tenant": "ten_a"}).sort("_id", 1).explain()
    assert "IXSCAN" in repr(plan["queryPlanner"]["winningPlan"])
    assert "SORT" not in repr(plan["queryPlanner"]["winningPlan"]).replace("SORT_KEY", "")
