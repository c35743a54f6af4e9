"""API keys: scoped, revocable, kept as a hash, and never the way to a stronger one."""

from datetime import timedelta
from typing import Any

import pytest

from quern.store import clock
from quern.tenants import keys, tenant
from tests.app.api.client import Client, House, Json, until


def _document(house: House, client: Client) -> Json:
    identity = "key_" + str(client.key).split("_")[2]
    found = house.stack.runtime.store.db.keys.find_one({"_id": identity})
    assert found is not None
    return found


def test_the_database_has_no_key(house: House, owner: Client) -> None:
    made = owner.call("POST", "/keys", {"name": "spare"}, status=201)["key"]
    secret = made.split("_", 3)[3]
    assert len(secret) >= 43
    stored = house.stack.runtime.store.db.keys.find_one({"name": "spare", "hint": secret[-4:]})
    assert stored is not None
    assert secret not in repr(stored)
    assert owner.with_key(made).send("GET", "/forms").status == 200


def test_a_key_is_shown_once(owner: Client) -> None:
    made = owner.call("POST", "/keys", {"name": "spare"}, status=201)
    for shown in (owner.call("GET", f"/keys/{made['id']}"), *owner.call("GET", "/keys")["items"]):
        assert "key" not in shown
        assert "hash" not in shown
        assert made["key"] not in repr(shown)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: None,
        lambda key: key[:-1],
        lambda key: key + "x",
        lambda key: key[:-1] + ("a" if key[-1] != "a" else "b"),
        lambda key: key.replace("qrn_", "QRN_"),
        lambda key: "qrn_sk_" + "0" * 26 + "_" + key.split("_", 3)[3],
        lambda key: "qrn_sk__",
        lambda key: "x" * 4000,
        lambda key: "é" * 20,
        lambda key: key.split("_", 3)[3],
        lambda key: "{'$ne': null}",
    ],
)
def test_a_wrong_key_is_refused(owner: Client, change: Any) -> None:
    given = change(owner.key)
    header = {} if given is None else {"Authorization": f"Bearer {given}"}
    answer = owner.with_key(None).send("GET", "/forms", headers=header)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["{}", "Basic {}", "Token {}", "Bearer"])
def test_only_a_bearer_key_counts(owner: Client, header: str) -> None:
    given = {"Authorization": header.format(owner.key)}
    assert owner.with_key(None).send("GET", "/forms", headers=given).status == 401
    assert owner.with_key(None).send("GET", "/forms", headers={"Authorization": f"bEARER {owner.key}"}).status == 200


def test_a_key_in_the_url_does_not_count(owner: Client) -> None:
    assert owner.with_key(None).send("GET", f"/forms?key={owner.key}").status == 401


def test_a_revoked_key_is_refused_everywhere_and_for_good(owner: Client) -> None:
    made = owner.call("POST", "/keys", {"name": "spare"}, status=201)
    other = owner.with_key(made["key"])
    assert other.send("GET", "/forms").status == 200
    revoked = owner.call("DELETE", f"/keys/{made['id']}")["revoked"]
    assert revoked is not None
    until(lambda: {other.send("GET", "/forms").status for _ in range(8)} == {401})
    assert owner.call("DELETE", f"/keys/{made['id']}")["revoked"] == revoked


def test_an_expired_key_is_refused(house: House, owner: Client) -> None:
    end = clock.now() + timedelta(seconds=2)
    made = owner.call("POST", "/keys", {"name": "short", "expires": clock.rfc3339(end)}, status=201)
    assert made["expires"] == owner.call("GET", f"/keys/{made['id']}")["expires"]
    other = owner.with_key(made["key"])
    until(lambda: {other.send("GET", "/forms").status for _ in range(8)} == {401})
    assert clock.now() >= end


def test_an_expiry_in_the_past_is_refused(owner: Client) -> None:
    answer = owner.send("POST", "/keys", {"name": "late", "expires": "2020-01-01T00:00:00Z"})
    assert (answer.status, answer.pointers) == (422, ["/expires"])


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "2030-01-01", 5, "soon"])
def test_an_expiry_that_no_calendar_has_is_refused(owner: Client, moment: Any) -> None:
    answer = owner.send("POST", "/keys", {"name": "never", "expires": moment})
    assert (answer.status, answer.pointers) == (422, ["/expires"])


def test_a_suspended_tenant_is_refused_until_it_is_resumed(house: House) -> None:
    owner = house.tenant()
    client = house.client(owner)
    assert client.send("GET", "/forms").status == 200
    db = house.stack.runtime.store.db
    tenant.suspend(db, owner, True)
    until(lambda: {client.send("GET", "/forms").status for _ in range(8)} == {401})
    tenant.suspend(db, owner, False)
    until(lambda: {client.send("GET", "/forms").status for _ in range(8)} == {200})


def test_the_last_use_of_a_key_is_kept(house: House, owner: Client) -> None:
    before = clock.now()
    made = owner.call("POST", "/keys", {"name": "spare"}, status=201)
    assert owner.call("GET", f"/keys/{made['id']}")["last_used"] is None
    owner.with_key(made["key"]).call("GET", "/forms")
    used = _document(house, owner.with_key(made["key"]))["last_used"]
    assert before <= used <= clock.now()


def test_a_refused_key_leaves_no_sign_of_use(house: House, owner: Client) -> None:
    made = owner.call("POST", "/keys", {"name": "spare"}, status=201)
    owner.with_key(made["key"][:-1] + "?").send("GET", "/forms")
    assert owner.call("GET", f"/keys/{made['id']}")["last_used"] is None


def test_a_key_gives_no_scope_that_it_lacks(house: House) -> None:
    weak = house.client(scopes=["keys:write", "forms:read"])
    answer = weak.send("POST", "/keys", {"name": "more", "scopes": ["forms:read", "responses:read"]})
    assert answer.status == 403
    made = weak.call("POST", "/keys", {"name": "same"}, status=201)
    assert made["scopes"] == ["forms:read", "keys:write"]
    public = weak.call("POST", "/keys", {"name": "page", "kind": "publishable"}, status=201)
    assert public["scopes"] == []


def test_a_publishable_key_can_be_given_nothing_but_submitting(owner: Client) -> None:
    answer = owner.send("POST", "/keys", {"name": "page", "kind": "publishable", "scopes": ["forms:read"]})
    assert (answer.status, answer.pointers) == (422, ["/scopes"])
    made = owner.call("POST", "/keys", {"name": "page", "kind": "publishable"}, status=201)
    assert made["scopes"] == sorted(keys.PUBLISHABLE)
    assert made["key"].startswith("qrn_pk_")


def test_an_unknown_scope_is_refused(owner: Client) -> None:
    answer = owner.send("POST", "/keys", {"name": "odd", "scopes": ["everything"]})
    assert (answer.status, answer.pointers) == (422, ["/scopes"])


def test_a_key_with_an_end_makes_none_that_lives_longer(house: House) -> None:
    end = clock.now() + timedelta(hours=1)
    short = house.client(expires=end)
    later = clock.rfc3339(end + timedelta(hours=1))
    assert short.send("POST", "/keys", {"name": "later", "expires": later}).status == 403
    made = short.call("POST", "/keys", {"name": "same"}, status=201)
    assert made["expires"].removesuffix("Z")[:19] == clock.rfc3339(end)[:19]


def test_a_key_makes_none_with_a_greater_limit(house: House) -> None:
    owner = house.tenant(requests_per_minute=5000)
    slow = house.client(owner, requests_per_minute=1000)
    assert slow.send("POST", "/keys", {"name": "fast", "requests_per_minute": 1001}).status == 403
    assert slow.call("POST", "/keys", {"name": "same"}, status=201)["requests_per_minute"] == 1000
    raised = house.client(owner, requests_per_minute=9000)
    assert raised.send("POST", "/keys", {"name": "fast", "requests_per_minute": 5001}).status == 403
    freed = house.client(owner, requests_per_minute=0)
    assert freed.call("POST", "/keys", {"name": "ordinary"}, status=201)["requests_per_minute"] is None
    assert freed.send("POST", "/keys", {"name": "free", "requests_per_minute": 0}).status == 422
