"""The same unsafe request twice has one effect and the same answer twice."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from quern.api.app import operations
from quern.store import clock, identifier
from tests.app.api.client import Answer, Client, House, Json

FIELDS: list[Json] = [{"name": "day", "type": "date"}, {"name": "comment", "type": "long_text", "required": True}]
DRAFT: Json = {"name": "once", "fields": FIELDS}


def _again(client: Client, method: str, path: str, body: Json | None, key: str) -> Answer:
    return client.send(method, path, body, headers={"Idempotency-Key": key})


def _same(first: Answer, second: Answer) -> None:
    assert second.status == first.status
    assert second.content == first.content
    assert second.headers.get("location") == first.headers.get("location")
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"


@pytest.fixture
def form(owner: Client) -> str:
    return owner.form(FIELDS)


def test_a_change_is_made_once_and_answered_the_same_twice(owner: Client) -> None:
    first = _again(owner, "POST", "/forms", DRAFT, "k1")
    _same(first, _again(owner, "POST", "/forms", DRAFT, "k1"))
    assert len(owner.call("GET", "/forms")["items"]) == 1


def test_an_answer_without_a_body_is_the_same_twice(owner: Client, form: str) -> None:
    response = owner.submit(form, {"comment": "x"})
    first = _again(owner, "DELETE", f"/responses/{response}", None, "k1")
    assert first.status == 204
    assert "content-type" not in first.headers
    _same(first, _again(owner, "DELETE", f"/responses/{response}", None, "k1"))


def test_a_response_is_kept_once_and_answered_the_same_twice(owner: Client, form: str) -> None:
    path, body = f"/forms/{form}/responses", {"answers": {"comment": "once"}}
    first = _again(owner, "POST", path, body, "k1")
    assert first.status == 202
    _same(first, _again(owner, "POST", path, body, "k1"))
    assert len(owner.call("GET", path)["items"]) == 1


def test_a_cancel_and_a_replay_are_answered_the_same_twice(owner: Client, house: House) -> None:
    form = owner.form(FIELDS, [{"name": "mood", "type": "sentiment"}])
    response = owner.submit(form, {"comment": "x"})
    job = owner.call("GET", f"/responses/{response}")["jobs"][0]["id"]
    jobs = house.stack.runtime.store.db.jobs
    until_there = time.monotonic() + 60
    while jobs.find_one({"_id": job}) is None:
        assert time.monotonic() < until_there
        time.sleep(0.05)
    first = _again(owner, "POST", f"/jobs/{job}/cancel", None, "k1")
    assert first.status == 202
    _same(first, _again(owner, "POST", f"/jobs/{job}/cancel", None, "k1"))
    jobs.update_one({"_id": job}, {"$set": {"state": "dead"}})
    first = _again(owner, "POST", f"/jobs/{job}/replay", None, "k2")
    assert first.status == 202
    _same(first, _again(owner, "POST", f"/jobs/{job}/replay", None, "k2"))
    actions = [entry["action"] for entry in owner.call("GET", f"/audit?subject={job}")["items"]]
    assert sorted(actions) == ["job.cancelled", "job.replayed"]


def test_a_response_sent_again_after_the_form_was_closed_has_the_same_answer(owner: Client, form: str) -> None:
    path, body = f"/forms/{form}/responses", {"answers": {"comment": "in time"}}
    first = _again(owner, "POST", path, body, "k1")
    owner.call("POST", f"/forms/{form}/close")
    time.sleep(1.1)
    assert _again(owner, "POST", path, body, "k2").status == 409
    _same(first, _again(owner, "POST", path, body, "k1"))


def test_a_response_sent_again_after_a_new_version_has_the_same_answer(owner: Client, form: str) -> None:
    path, body = f"/forms/{form}/responses", {"answers": {"comment": "first version"}}
    first = _again(owner, "POST", path, body, "k1")
    owner.call("PUT", f"/forms/{form}", {"name": "next", "fields": [{"name": "other", "type": "text"}]})
    owner.call("POST", f"/forms/{form}/publish")
    time.sleep(1.1)
    assert _again(owner, "POST", path, body, "k2").status == 422
    _same(first, _again(owner, "POST", path, body, "k1"))


def test_the_key_of_an_erased_response_makes_no_second_one(owner: Client, form: str) -> None:
    path, body = f"/forms/{form}/responses", {"answers": {"comment": "gone"}}
    made = _again(owner, "POST", path, body, "k1").json()["id"]
    owner.call("DELETE", f"/responses/{made}", status=204)
    answer = _again(owner, "POST", path, body, "k1")
    assert answer.status == 409
    assert "erased" in answer.json()["detail"]


def test_another_body_under_the_same_key_is_refused(owner: Client, form: str) -> None:
    _again(owner, "POST", "/forms", DRAFT, "k1")
    other = _again(owner, "POST", "/forms", {**DRAFT, "name": "other"}, "k1")
    assert (other.status, other.json()["type"]) == (422, "urn:quern:problem:idempotency-key-reused")
    path = f"/forms/{form}/responses"
    _again(owner, "POST", path, {"answers": {"comment": "one"}}, "k2")
    other = _again(owner, "POST", path, {"answers": {"comment": "two"}}, "k2")
    assert (other.status, other.json()["type"]) == (422, "urn:quern:problem:idempotency-key-reused")


def test_the_same_key_on_another_path_is_another_request(owner: Client) -> None:
    one, two = owner.form(FIELDS), owner.form(FIELDS)
    assert _again(owner, "POST", f"/forms/{one}/close", None, "k1").json()["id"] == one
    assert _again(owner, "POST", f"/forms/{two}/close", None, "k1").json()["id"] == two


def test_a_request_that_failed_may_be_sent_again(owner: Client, form: str) -> None:
    refused = _again(owner, "POST", f"/forms/{form}/publish", None, "k1")
    assert refused.status == 409
    owner.call("PUT", f"/forms/{form}", DRAFT)
    assert _again(owner, "POST", f"/forms/{form}/publish", None, "k1").status == 200


def test_of_many_at_once_one_takes_effect(owner: Client, form: str) -> None:
    def send(path: str, body: Json) -> Answer:
        return _again(owner, "POST", path, body, "crowd")

    for path, body in (("/forms", DRAFT), (f"/forms/{form}/responses", {"answers": {"comment": "crowd"}})):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, p=path, b=body: send(p, b), range(16)))
        assert {answer.status for answer in found} <= {201, 202, 409}
        good = [answer for answer in found if answer.status < 300]
        assert len({answer.content for answer in good}) == 1
        for waiting in (answer for answer in found if answer.status == 409):
            assert waiting.json()["type"] == "urn:quern:problem:request-in-progress"
            assert int(waiting.headers["retry-after"]) >= 1
    assert len(owner.call("GET", "/forms")["items"]) == 2
    assert len(owner.call("GET", f"/forms/{form}/responses")["items"]) == 1


@pytest.fixture
def held_up(house: House, owner: Client) -> Iterator[tuple[str, str]]:
    """A record of a request that began and whose process died: (tenant, identifier)."""
    tenant = house.stack.runtime.store.db.keys.find_one({"_id": "key_" + str(owner.key).split("_")[2]})
    assert tenant is not None
    identity = identifier.derived("idm", tenant["tenant"], "POST /api/v1/forms", "k1")
    yield tenant["tenant"], identity


def test_while_the_first_runs_the_second_is_told_to_wait(owner: Client, house: House, held_up: tuple[str, str]) -> None:
    records = house.stack.runtime.store.db.idempotency
    _again(owner, "POST", "/forms", DRAFT, "k1")
    running = {"state": "running", "until": clock.now() + timedelta(seconds=30)}
    assert records.update_one({"_id": held_up[1]}, {"$set": running, "$unset": {"answer": ""}}).matched_count == 1
    waiting = _again(owner, "POST", "/forms", DRAFT, "k1")
    assert (waiting.status, waiting.json()["type"]) == (409, "urn:quern:problem:request-in-progress")
    assert waiting.headers["retry-after"] == "1"


def test_a_request_whose_process_died_is_taken_over(owner: Client, house: House, held_up: tuple[str, str]) -> None:
    records = house.stack.runtime.store.db.idempotency
    _again(owner, "POST", "/forms", DRAFT, "k1")
    died = {"state": "running", "until": clock.now() - timedelta(seconds=1)}
    records.update_one({"_id": held_up[1]}, {"$set": died, "$unset": {"answer": ""}})
    assert _again(owner, "POST", "/forms", DRAFT, "k1").status == 201
    assert records.count_documents({"_id": held_up[1], "state": "done"}) == 1


def test_an_attempt_that_was_taken_over_changes_nothing(owner: Client, house: House, held_up: tuple[str, str]) -> None:
    """The record is finished in the transaction of the change, so the loser's change is rolled back with it."""
    db = house.stack.runtime.store.db
    stop = threading.Event()

    def steal() -> None:
        while not stop.is_set():
            db.idempotency.update_one({"_id": held_up[1], "state": "running"}, {"$set": {"attempt": "another"}})

    thief = threading.Thread(target=steal)
    thief.start()
    try:
        for _ in range(100):
            answer = _again(owner, "POST", "/forms", DRAFT, "k1")
            stolen = answer.status != 201
            kept = db.forms.count_documents({"tenant": held_up[0]})
            assert kept == (0 if stolen else 1)
            if stolen:
                assert answer.status in (409, 503)
                break
            db.forms.delete_many({"tenant": held_up[0]})
            db.idempotency.delete_one({"_id": held_up[1]})
        else:
            pytest.fail("the thief was never fast enough")
    finally:
        stop.set()
        thief.join()


def test_a_kept_answer_cannot_be_read_at_rest(owner: Client, house: House) -> None:
    """A new API key is in the answer; neither it nor the caller's key nor the idempotency key is in the database."""
    made = _again(owner, "POST", "/keys", {"name": "secret in an answer"}, "idempotent-canary").json()["key"]
    again = _again(owner, "POST", "/keys", {"name": "secret in an answer"}, "idempotent-canary").json()["key"]
    assert again == made
    kept = [repr(document) for document in house.stack.runtime.store.db.idempotency.find()]
    assert kept
    for secret in (made.split("_", 3)[3], str(owner.key).split("_", 3)[3], "idempotent-canary"):
        assert not [text for text in kept if secret in text]


def test_another_api_key_of_the_tenant_cannot_read_a_kept_answer(house: House) -> None:
    tenant = house.tenant()
    one, two = house.client(tenant), house.client(tenant)
    made = _again(one, "POST", "/keys", {"name": "secret"}, "k1").json()["key"]
    answer = _again(two, "POST", "/keys", {"name": "secret"}, "k1")
    assert answer.status == 422
    assert made not in answer.content.decode()


def test_records_are_forgotten_after_a_day(house: House) -> None:
    index = house.stack.runtime.store.db.idempotency.index_information()["forget"]
    assert index["expireAfterSeconds"] == 0
    kept = house.stack.runtime.store.db.idempotency.find_one()
    assert kept is not None
    assert timedelta(hours=23) < kept["forget"] - clock.now() <= timedelta(days=1)


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256])
def test_a_malformed_key_is_refused(owner: Client, key: str) -> None:
    answer = owner.send("POST", "/forms", DRAFT, headers={"Idempotency-Key": key})
    assert answer.status == 400
    assert owner.call("GET", "/forms")["items"] == []


def test_keys_are_documented_on_every_unsafe_route(owner: Client) -> None:
    """Questions that are too long for a URL change nothing and take none."""
    described = owner.call("GET", "//api/openapi.json")
    questions = {f"/api/v1{one.path}" for one in operations() if one.method == "POST" and not one.unsafe}
    assert all(path.split("/")[3] in ("search", "analytics") for path in questions)
    for path, methods in described["paths"].items():
        if path.startswith("/v1/"):
            # As OpenAI has it: on what becomes a job (tests/app/openai/test_description.py).
            continue
        for method, operation in methods.items():
            named = {parameter["name"] for parameter in operation["parameters"]}
            unsafe = method in ("post", "put", "patch", "delete") and path not in questions
            assert ("Idempotency-Key" in named) == unsafe, (method, path)
