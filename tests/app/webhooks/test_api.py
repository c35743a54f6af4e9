"""`/api/v1/webhooks`: the real application, mongod, Redis, receiver, and the code of the real worker."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from cryptography.fernet import Fernet
from flask.testing import FlaskClient
from pymongo import MongoClient

from quern.api.app import create_app
from quern.config import LiveSettings, Settings
from quern.embedded.mongod import Mongod
from quern.embedded.receiver import Answer, Receiver
from quern.embedded.redis_server import RedisServer
from quern.jobs import queue
from quern.jobs.model import Queue
from quern.jobs.worker import Worker
from quern.migrations import migrate
from quern.runtime import Runtime
from quern.store import clock
from quern.tenants import keys, tenant
from quern.webhooks.sign import verify
from quern.workflows import relay

Json = dict[str, Any]


@dataclass
class House:
    """The service in one process: API, relay and the worker of `webhooks`."""

    runtime: Runtime
    client: FlaskClient
    tenant: str
    key: str

    def call(self, method: str, path: str, body: Json | None = None, status: int = 200, **headers: str) -> Json:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        given["Authorization"] = f"Bearer {self.key}"
        answer = self.client.open(f"/api/v1{path}", method=method, json=body, headers=given)
        assert answer.status_code == status, answer.get_data(as_text=True)
        found: Json = answer.get_json() if answer.data else {}
        return found

    def neighbour(self) -> "House":
        """The same house as another tenant sees it."""
        other = tenant.create(self.runtime.store.db, "neighbour")["_id"]
        _, key = keys.create(self.runtime.store.db, other, "all")
        return House(self.runtime, self.client, other, key)

    def work(self) -> None:
        """Run every webhook job that is due."""
        while relay.drain(self.runtime.store, self.runtime.versions, self.runtime.waker):
            pass
        Worker(self.runtime.store, self.runtime.registry, self.runtime.waker, Queue.WEBHOOKS).drain()

    def make_due(self) -> None:
        """As if all the waiting were over."""
        db = self.runtime.store.db
        past = clock.now() - timedelta(seconds=1)
        db.jobs.update_many({"state": "queued"}, {"$set": {"due": past}})
        db.turns.update_many({}, {"$set": {"ready": past}})
        db.webhook_endpoints.update_many({"breaker.until": {"$ne": None}}, {"$set": {"breaker.until": past}})

    def endpoint(self, receiver: Receiver, **changes: Any) -> Json:
        return self.call("POST", "/webhooks", {"url": receiver.url + "/hook"} | changes, 201)

    def submit(self, endpoint: str, text: str = "I like it") -> str:
        """A response whose one step is a webhook to the endpoint; returns its id."""
        fields = [{"name": "comment", "type": "long_text"}]
        steps = [{"name": "tell", "type": "webhook", "endpoint": endpoint}]
        form = self.call("POST", "/forms", {"name": "f", "fields": fields, "workflow": {"steps": steps}}, 201)["id"]
        self.call("POST", f"/forms/{form}/publish")
        accepted = self.call("POST", f"/forms/{form}/responses", {"answers": {"comment": text}}, 202)
        return str(accepted["id"])

    def job(self, response: str) -> Json:
        found = self.runtime.store.db.jobs.find_one({"subject": response, "kind": "webhook"})
        assert found is not None
        return self.call("GET", f"/jobs/{found['_id']}")

    def deliveries(self, endpoint: str, query: str = "") -> list[Json]:
        found: list[Json] = self.call("GET", f"/webhooks/{endpoint}/deliveries{query}")["items"]
        return found


@pytest.fixture(scope="module")
def runtime(mongo_client: MongoClient[Json], mongod: Mongod, redis_queue: RedisServer) -> Iterator[Runtime]:
    """One migrated database for all tests here: making the indexes takes longer than any of them."""
    settings = Settings.model_validate(
        {
            "mongodb_uri": mongod.uri,
            "mongodb_database": f"test_{secrets.token_hex(6)}",
            "redis_queue_url": redis_queue.url,
            "secret_keys": Fernet.generate_key().decode(),
            "audit_key": "a" * 40,
            "requests_per_minute": 0,
            "webhook": {
                "allow_http": True,
                "allow_ports": ["1024-65535"],
                "allow_networks": ["127.0.0.1/32"],
                "schedule_seconds": [0, 60, 60],
                "breaker_threshold": 3,
            },
        }
    )
    made = Runtime(LiveSettings(settings))
    migrate(made.store.db)
    yield made
    made.store.client.close()
    mongo_client.drop_database(settings.mongodb_database)


@pytest.fixture
def house(runtime: Runtime) -> House:
    """A tenant of its own, and no jobs of the tests before."""
    for name in ("jobs", "turns", "responses"):
        runtime.store.db[name].delete_many({})
    owner = tenant.create(runtime.store.db, "owner")["_id"]
    _, key = keys.create(runtime.store.db, owner, "all")
    return House(runtime, create_app(runtime).test_client(), owner, key)


def audited(house: House) -> list[str]:
    found = house.runtime.store.db.audit.find({"tenant": house.tenant}).sort("_id", 1)
    return [entry["action"] for entry in found]


def test_an_endpoint_is_made_read_changed_and_deleted(house: House, receiver: Receiver) -> None:
    made = house.endpoint(receiver, description="ours", event_types=["response.processed"])
    path = f"/webhooks/{made['id']}"
    assert made["secret"].startswith("whsec_")
    read = house.call("GET", path)
    assert read == {name: value for name, value in made.items() if name != "secret"}
    assert (read["circuit"]["state"], read["enabled"]) == ("closed", True)
    changed = house.call("PATCH", path, {"description": "theirs"})
    assert (changed["description"], changed["url"]) == ("theirs", made["url"])
    house.call("DELETE", path, status=204)
    house.call("GET", path, status=404)
    assert audited(house) == ["webhook.created", "webhook.changed", "webhook.deleted"]


def test_the_secret_is_in_no_later_answer_and_not_in_the_audit_log(house: House, receiver: Receiver) -> None:
    made = house.endpoint(receiver)
    secret = made["secret"].removeprefix("whsec_")
    for path in ("/webhooks", f"/webhooks/{made['id']}", f"/webhooks/{made['id']}/deliveries"):
        assert secret not in str(house.call("GET", path))
    assert secret not in str(list(house.runtime.store.db.audit.find()))


def test_a_repeated_creation_makes_one_endpoint_and_shows_the_same_secret(house: House, receiver: Receiver) -> None:
    body = {"url": receiver.url}
    first = house.call("POST", "/webhooks", body, 201, Idempotency_Key="once")
    again = house.call("POST", "/webhooks", body, 201, Idempotency_Key="once")
    assert first == again
    assert len(house.call("GET", "/webhooks")["items"]) == 1


@pytest.mark.parametrize(
    "url", ["https://10.0.0.1/", "https://localhost/", "ftp://a.example.com/", "https://u:p@a.example.com/"]
)
def test_a_forbidden_url_is_refused_with_its_place(house: House, receiver: Receiver, url: str) -> None:
    problem = house.call("POST", "/webhooks", {"url": url}, 422)
    assert problem["errors"][0]["pointer"] == "/url"
    made = house.endpoint(receiver)
    house.call("PATCH", f"/webhooks/{made['id']}", {"url": url}, 422)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": 1},
        {"url": "x", "secret": "whsec_x"},
        {"url": "x", "event_types": ["A b"]},
        {"url": "x", "description": "\x00"},
    ],
)
def test_a_body_of_the_wrong_shape_is_refused(house: House, body: Json) -> None:
    house.call("POST", "/webhooks", body, 422)


def test_endpoints_are_listed_a_page_at_a_time(house: House, receiver: Receiver) -> None:
    made = {house.endpoint(receiver)["id"] for _ in range(5)}
    seen: list[str] = []
    query = "?limit=2"
    while True:
        page = house.call("GET", f"/webhooks{query}")
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        query = f"?limit=2&cursor={page['next_cursor']}"
    assert len(seen) == 5 and set(seen) == made


def test_another_tenant_finds_nothing_of_it(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    house.submit(endpoint)
    house.work()
    delivery = house.deliveries(endpoint)[0]["id"]
    other = house.neighbour()
    path = f"/webhooks/{endpoint}"
    assert other.call("GET", "/webhooks")["items"] == []
    for method, rest, body in (
        ("GET", "", None),
        ("PATCH", "", {"description": "x"}),
        ("DELETE", "", None),
        ("POST", "/rotate", None),
        ("POST", "/enable", None),
        ("POST", "/disable", None),
        ("POST", "/test", None),
        ("GET", "/deliveries", None),
        ("GET", f"/deliveries/{delivery}", None),
        ("POST", f"/deliveries/{delivery}/replay", None),
        ("POST", "/replay", {"since": "2020-01-01T00:00:00Z"}),
    ):
        other.call(method, path + rest, body, 404)
    own = other.endpoint(receiver)["id"]
    other.call("GET", f"/webhooks/{own}/deliveries/{delivery}", status=404)
    assert house.call("GET", path)["description"] == ""


def test_a_test_event_arrives_signed_even_for_an_endpoint_that_wants_other_events(
    house: House, receiver: Receiver
) -> None:
    made = house.endpoint(receiver, event_types=["response.processed"])
    job = house.call("POST", f"/webhooks/{made['id']}/test", status=202, X_Request_ID="request-0001")
    house.work()
    [request] = receiver.requests
    verify(request.body, dict(request.headers), [made["secret"]], now=clock.now())
    assert b'"type":"webhook.test"' in request.body
    assert request.headers["x-request-id"] == "request-0001"
    assert request.headers["traceparent"]
    assert house.call("GET", f"/jobs/{job['id']}")["status"] == "done"
    [delivery] = house.deliveries(made["id"])
    assert (delivery["delivered"], delivery["event_type"], delivery["job"]) == (True, "webhook.test", job["id"])


def test_a_test_event_that_fails_is_not_tried_again_and_says_why(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(500, body=b"out of order"))
    job = house.call("POST", f"/webhooks/{endpoint}/test", status=202)
    house.work()
    ended = house.call("GET", f"/jobs/{job['id']}")
    assert (ended["status"], ended["attempt"]) == ("dead", 1)
    [delivery] = house.deliveries(endpoint)
    assert (delivery["status"], delivery["excerpt"]) == (500, "out of order")


def test_after_a_rotation_both_secrets_verify_what_is_sent(house: House, receiver: Receiver) -> None:
    made = house.endpoint(receiver)
    rotated = house.call("POST", f"/webhooks/{made['id']}/rotate")
    house.call("POST", f"/webhooks/{made['id']}/test", status=202)
    house.work()
    [request] = receiver.requests
    for secret in (made["secret"], rotated["secret"]):
        verify(request.body, dict(request.headers), [secret], now=clock.now())


def test_a_response_is_told_with_its_answers_and_the_log_is_not(house: House, receiver: Receiver) -> None:
    made = house.endpoint(receiver)
    response = house.submit(made["id"], "my cat is called Whiskers")
    house.work()
    [request] = receiver.requests
    assert b"Whiskers" in request.body
    assert request.headers["webhook-id"] == "msg_" + house.job(response)["id"].removeprefix("job_")
    assert "Whiskers" not in str(house.deliveries(made["id"]))


def test_failures_are_tried_by_the_schedule_under_one_id_and_then_are_dead(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.default = Answer(503)
    response = house.submit(endpoint)
    for _ in range(5):
        house.work()
        house.make_due()
    assert house.job(response)["status"] == "dead"
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert [delivery["attempt"] for delivery in house.deliveries(endpoint)] == [3, 2, 1]
    assert house.call("GET", f"/webhooks/{endpoint}")["circuit"]["state"] == "open"


def test_a_dead_delivery_is_replayed_under_the_same_id(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(500), Answer(500), Answer(500))
    response = house.submit(endpoint)
    for _ in range(4):
        house.work()
        house.make_due()
    delivery = house.deliveries(endpoint)[0]["id"]
    house.call("POST", f"/webhooks/{endpoint}/deliveries/{delivery}/replay", status=202)
    house.call("POST", f"/webhooks/{endpoint}/deliveries/{delivery}/replay", status=409)
    house.make_due()
    house.work()
    assert house.job(response)["status"] == "done"
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert len(receiver.requests) == 4


def test_a_delivered_message_can_be_sent_again_under_the_same_id(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    house.submit(endpoint)
    house.work()
    path = f"/webhooks/{endpoint}/deliveries/{house.deliveries(endpoint)[0]['id']}/replay"
    first = house.call("POST", path, status=202, Idempotency_Key="once")
    assert house.call("POST", path, status=202, Idempotency_Key="once")["id"] == first["id"]
    house.work()
    again = house.deliveries(endpoint)[0]
    assert again["job"] == first["id"]
    house.call("POST", f"/webhooks/{endpoint}/deliveries/{again['id']}/replay", status=202)
    house.work()
    assert len(receiver.requests) == 3
    assert len({(request.headers["webhook-id"], request.body) for request in receiver.requests}) == 1


def test_an_endpoint_that_answers_410_is_disabled_and_its_messages_are_kept_for_later(
    house: House, receiver: Receiver
) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(410))
    before = clock.now() - timedelta(seconds=1)
    first, second = house.submit(endpoint), house.submit(endpoint)
    house.work()
    shown = house.call("GET", f"/webhooks/{endpoint}")
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "gone")
    assert audited(house).count("webhook.disabled") == 1
    assert len(receiver.requests) == 1
    assert {house.job(first)["status"], house.job(second)["status"]} == {"dead"}
    assert {delivery["failure"] for delivery in house.deliveries(endpoint)} == {None, "endpoint_disabled"}
    for rest in ("/test", "/replay", f"/deliveries/{house.deliveries(endpoint)[0]['id']}/replay"):
        body = {"since": before.isoformat()} if rest == "/replay" else None
        house.call("POST", f"/webhooks/{endpoint}{rest}", body, 409)
    house.call("POST", f"/webhooks/{endpoint}/enable")
    replayed = house.call("POST", f"/webhooks/{endpoint}/replay", {"since": before.isoformat()}, 202)
    assert (len(replayed["jobs"]), replayed["more"]) == (2, False)
    house.work()
    assert {house.job(first)["status"], house.job(second)["status"]} == {"done"}
    assert house.call("POST", f"/webhooks/{endpoint}/replay", {"since": before.isoformat()}, 202)["jobs"] == []


def test_a_replay_of_failures_keeps_to_its_span(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(410))
    house.submit(endpoint)
    house.work()
    house.call("POST", f"/webhooks/{endpoint}/enable")
    later = (clock.now() + timedelta(seconds=1)).isoformat()
    body = {"since": "2020-01-01T00:00:00Z", "until": "2021-01-01T00:00:00+01:00"}
    assert house.call("POST", f"/webhooks/{endpoint}/replay", body, 202)["jobs"] == []
    assert house.call("POST", f"/webhooks/{endpoint}/replay", {"since": later}, 202)["jobs"] == []
    house.call("POST", f"/webhooks/{endpoint}/replay", {"since": "2020-01-01T00:00:00"}, 422)


def test_an_open_circuit_holds_messages_back_without_charging_them(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(429, {"Retry-After": "600"}))
    responses = [house.submit(endpoint) for _ in range(4)]
    house.work()
    assert len(receiver.requests) == 1
    jobs = [house.job(response) for response in responses]
    assert {job["status"] for job in jobs} == {"queued"}
    assert all((clock.now() + timedelta(seconds=500)).isoformat() < job["due"] for job in jobs)
    assert len(house.deliveries(endpoint)) == 1
    held = house.runtime.store.db.jobs.find({"tenant": house.tenant})
    assert sorted(job["failures"] for job in held) == [0, 0, 0, 1]
    house.make_due()
    house.work()
    assert {house.job(response)["status"] for response in responses} == {"done"}


def test_an_owner_can_disable_and_enable(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    disabled = house.call("POST", f"/webhooks/{endpoint}/disable")
    assert (disabled["enabled"], disabled["disabled_reason"]) == (False, "owner")
    response = house.submit(endpoint)
    house.work()
    assert (receiver.requests, house.job(response)["status"]) == ([], "dead")
    assert house.call("POST", f"/webhooks/{endpoint}/enable")["enabled"]


def test_the_delivery_log_is_filtered_and_paged(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(500))
    responses = [house.submit(endpoint) for _ in range(3)]
    house.work()
    everything = house.deliveries(endpoint)
    assert len(everything) == 3
    assert len(house.deliveries(endpoint, "?delivered=false")) == 1
    assert len(house.deliveries(endpoint, f"?response={responses[0]}")) == 1
    assert house.deliveries(endpoint, f"?since={quote(everything[0]['at'])}")[0] == everything[0]
    page = house.call("GET", f"/webhooks/{endpoint}/deliveries?limit=2")
    rest = house.call("GET", f"/webhooks/{endpoint}/deliveries?limit=2&cursor={page['next_cursor']}")
    assert page["items"] + rest["items"] == everything
    one = everything[1]
    assert house.call("GET", f"/webhooks/{endpoint}/deliveries/{one['id']}") == one
    house.call("GET", f"/webhooks/{endpoint}/deliveries?limit=0", status=422)
    house.call("GET", f"/webhooks/{endpoint}/deliveries?cursor=x", status=422)


def test_erasing_a_response_erases_what_its_receiver_quoted_and_ends_its_replays(
    house: House, receiver: Receiver
) -> None:
    endpoint = house.endpoint(receiver)["id"]
    receiver.script(Answer(500, body=b"cannot store 'Whiskers'"))
    response = house.submit(endpoint, "Whiskers")
    house.work()
    delivery = house.deliveries(endpoint)[0]
    assert "Whiskers" in delivery["excerpt"]
    house.call("DELETE", f"/responses/{response}", status=204)
    assert house.deliveries(endpoint)[0]["excerpt"] == ""
    house.call("POST", f"/webhooks/{endpoint}/deliveries/{delivery['id']}/replay", status=409)


def test_what_a_receiver_quotes_after_the_erasure_is_not_kept(
    house: House, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = house.endpoint(receiver)["id"]
    response = house.submit(endpoint, "Whiskers")
    while relay.drain(house.runtime.store, house.runtime.versions, house.runtime.waker):
        pass
    receiver.script(Answer(500, body=b"cannot store 'Whiskers'"))
    running = queue.claim(house.runtime.store.db, "webhooks", 60)
    assert running is not None
    answer = receiver.handle

    def erase_first(*request: Any) -> Answer:
        # While the receiver has the message and has not answered yet.
        house.call("DELETE", f"/responses/{response}", status=204)
        return answer(*request)

    monkeypatch.setattr(receiver, "handle", erase_first)
    Worker(house.runtime.store, house.runtime.registry, house.runtime.waker, Queue.WEBHOOKS).run_one(running)
    assert len(receiver.requests) == 1
    [delivery] = house.deliveries(endpoint)
    assert (delivery["status"], delivery["excerpt"]) == (500, "")


def test_a_key_needs_the_scope(house: House, receiver: Receiver) -> None:
    endpoint = house.endpoint(receiver)["id"]
    db = house.runtime.store.db
    _, reader = keys.create(db, house.tenant, "reader", scopes=["webhooks:read"])
    reading = House(house.runtime, house.client, house.tenant, reader)
    reading.call("GET", f"/webhooks/{endpoint}")
    for rest in ("/rotate", "/test", "/enable", "/disable"):
        reading.call("POST", f"/webhooks/{endpoint}{rest}", status=403)
