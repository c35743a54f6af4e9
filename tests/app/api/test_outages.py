"""mongod or Redis away: 503 and Retry-After at once, recovery by itself, and nothing half-done."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

from quern.embedded.process import ChildProcess
from tests.app.api.client import Answer, Client, House, Json, until

FIELDS: list[Json] = [{"name": "n", "type": "text", "required": True}]
Way = Literal["killed", "frozen"]


def _take_away(service: ChildProcess, way: Way) -> None:
    if way == "killed":
        service.kill()
    else:
        assert service.pid is not None
        os.kill(service.pid, signal.SIGSTOP)


def _bring_back(service: ChildProcess, way: Way) -> None:
    if way == "killed":
        service.start()
    else:
        assert service.pid is not None
        os.kill(service.pid, signal.SIGCONT)


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    made = house.client(house.tenant(requests_per_minute=100_000))
    yield made
    # The next test finds the house as it was.
    until(lambda: {made.send("GET", "//readyz").status for _ in range(6)} == {200})


def _requests(client: Client, form: str) -> list[tuple[str, str, Json | None]]:
    return [
        ("GET", "/forms", None),
        ("GET", f"/forms/{form}/responses", None),
        ("GET", f"/forms/{form}/export", None),
        ("POST", "/forms", {"name": "during", "fields": FIELDS}),
        ("POST", f"/forms/{form}/responses", {"answers": {"n": "during"}}),
        ("POST", f"/forms/{form}/close", None),
        ("POST", "/keys", {"name": "during"}),
    ]


def _is_away(answer: Answer) -> None:
    assert answer.status == 503, answer.content
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:quern:problem:away"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("way", ["killed", "frozen"])
def test_without_mongod_everything_is_503_and_comes_back(house: House, client: Client, way: Way) -> None:
    form = client.form(FIELDS)
    client.submit(form, {"n": "before"})
    _take_away(house.stack.mongod, way)
    try:
        with ThreadPoolExecutor(4) as pool:
            for answer in pool.map(lambda request: client.send(*request), _requests(client, form)):
                _is_away(answer)
        assert client.send("GET", "//healthz").status == 200
        unready = client.send("GET", "//readyz")
        assert unready.status == 503
        assert "MongoDB" in unready.json()["problems"][0]
    finally:
        _bring_back(house.stack.mongod, way)
    until(lambda: client.send("GET", "/forms").status == 200)
    until(lambda: client.send("POST", f"/forms/{form}/responses", {"answers": {"n": "after"}}).status == 202)


def test_what_was_cut_off_was_done_whole_or_not_at_all(house: House, client: Client) -> None:
    """mongod is killed under writes; every change has its audit entry, and no entry lacks its change."""
    form = client.form(FIELDS)
    tenant = house.stack.runtime.store.db.forms.find_one({"_id": form})
    assert tenant is not None
    acknowledged: list[str] = []

    def change(number: int) -> None:
        for attempt in range(200):
            draft, key = {"name": f"f{number}", "fields": FIELDS}, {"Idempotency-Key": f"change-{number}"}
            answer = client.send("POST", "/forms", draft, headers=key)
            assert answer.status in (201, 409, 503), (attempt, answer.content)
            if answer.status == 201:
                acknowledged.append(answer.json()["id"])
                return
            until(lambda: client.send("GET", "/forms?limit=1").status == 200)
            # The first request with this key may have died: its mark goes some seconds later.
            time.sleep(0.1)
        pytest.fail("never acknowledged")

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(change, number) for number in range(120)]
        for _ in range(2):
            house.stack.mongod.kill()
            house.stack.mongod.start()
        for future in done:
            future.result()
    db, mine = house.stack.runtime.store.db, {"tenant": tenant["tenant"]}
    forms = {item["_id"]: item["name"] for item in db.forms.find(mine)}
    entries = db.audit.find({**mine, "action": "form.created"})
    created = [entry["subject"] for entry in entries]
    assert sorted(created) == sorted(forms)
    assert sorted(forms.values()) == sorted(["a form", *(f"f{number}" for number in range(120))])
    assert set(acknowledged) <= forms.keys()


@pytest.mark.parametrize("way", ["killed", "frozen"])
def test_without_redis_responses_are_kept_and_worked_on_later(house: House, client: Client, way: Way) -> None:
    free = house.client()
    hook = free.call("POST", "/webhooks", {"url": f"{house.stack.receiver.url}/without-redis-{way}"}, status=201)["id"]
    form = free.form(FIELDS, [{"name": "tell", "type": "webhook", "endpoint": hook}])
    _take_away(house.stack.redis, way)
    try:
        for answer in (client.send("GET", "/forms"), client.send("POST", "/forms", {"name": "x", "fields": FIELDS})):
            _is_away(answer)
        response = free.submit(form, {"n": "kept"})
        assert free.call("GET", f"/responses/{response}")["answers"] == {"n": "kept"}
        assert "Redis" in client.send("GET", "//readyz").json()["problems"][0]
    finally:
        _bring_back(house.stack.redis, way)
    until(lambda: client.send("GET", "/forms").status == 200)
    until(lambda: free.call("GET", f"/responses/{response}")["status"] == "processed")


def test_a_change_that_nobody_can_vouch_for_is_not_denied(house: House, client: Client) -> None:
    """A write that was under way says that it may have happened; only a read may say that nothing was changed."""
    form = client.form(FIELDS)
    client.submit(form, {"n": "warm"})
    _take_away(house.stack.mongod, "frozen")
    try:
        answer = client.send("POST", f"/forms/{form}/responses", {"answers": {"n": "who knows"}})
        _is_away(answer)
        if "went out of reach" not in answer.json()["detail"]:
            # The key had to be looked up first, so the write was never tried.
            assert "nothing was changed" in answer.json()["detail"]
        assert "nothing was changed" in client.send("GET", "/forms").json()["detail"]
    finally:
        _bring_back(house.stack.mongod, "frozen")
